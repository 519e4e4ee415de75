"""Controls what memory glibc's malloc keeps and what it returns to the system."""

from __future__ import annotations

import ctypes
import functools
import pathlib

COMPILED = "/jax/core/compile/backend_compile_duration"  # event of jax.monitoring


def keep_freed_memory() -> None:
    """Makes glibc's malloc keep freed memory on a host without a GPU; call before importing jax.

    On CPU, XLA allocates a program's buffers anew for every run. If malloc returns them to the
    system in between, a fifth of a training step's time goes into page faults. The price: all
    threads share one heap, and if small blocks have taken the place of a program's buffers, the
    process grows by the size of those buffers.
    """
    if pathlib.Path("/dev/nvidiactl").exists():
        return
    mallopt = glibc("mallopt")
    if mallopt is None:
        return
    trim_threshold, mmap_max, arena_max = -1, -4, -8  # malloc.h
    mallopt(arena_max, 1)  # a thread's own arena has small heaps and maps anything larger
    mallopt(mmap_max, 0)  # mapped blocks are unmapped when they are freed
    mallopt(trim_threshold, -1)  # never


@functools.cache
def give_back_compiler_memory() -> None:
    """Makes glibc's malloc return free memory to the system after every long compilation.

    XLA's compiler leaves some 150 MB of freed blocks in the heap, and a program's own buffers would
    come on top of them.
    """
    import jax  # not needed by commands that compile nothing

    trim = glibc("malloc_trim")

    def after(event: str, seconds: float, **_) -> None:
        if event == COMPILED and seconds > 0.5:
            trim(0)

    if trim is not None:
        jax.monitoring.register_event_duration_secs_listener(after)


def glibc(name: str):
    """Returns a function of glibc, or None with another C library."""
    return getattr(ctypes.CDLL(None), name, None)
