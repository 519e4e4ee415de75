"""The memory of a host: what glibc's malloc keeps and gives back."""

from __future__ import annotations

import ctypes
import functools
import pathlib

COMPILED = "/jax/core/compile/backend_compile_duration"  # of jax.monitoring


def keep_freed_memory() -> None:
    """On a host without a GPU, lets glibc's malloc keep what is freed; before jax is imported.

    XLA takes a program's buffers anew for every run on CPU. Where malloc gives them back to the
    system in between, a fifth of a training step's time goes into page faults. The price: all
    threads share one heap, and where small blocks have taken the place of a program's buffers the
    process grows by them once more.
    """
    if pathlib.Path("/dev/nvidiactl").exists():
        return
    mallopt = glibc("mallopt")
    if mallopt is None:
        return
    trim_threshold, mmap_max, arena_max = -1, -4, -8  # malloc.h
    mallopt(arena_max, 1)  # a thread's own arena has small heaps and maps all that is larger
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, -1)  # never


@functools.cache
def give_back_compiler_memory() -> None:
    """Lets glibc's malloc give what it holds free back to the system after every long compilation.

    XLA's compiler leaves a hundred megabytes and more of freed blocks in the heap, to which a
    program's own buffers would be added.
    """
    import jax  # not needed by commands that compile nothing

    trim = glibc("malloc_trim")

    def after(event: str, seconds: float, **_) -> None:
        if event == COMPILED and seconds > 0.5:
            trim(0)

    if trim is not None:
        jax.monitoring.register_event_duration_secs_listener(after)


def glibc(name: str):
    """A function of glibc's; None where malloc is another's."""
    return getattr(ctypes.CDLL(None), name, None)
