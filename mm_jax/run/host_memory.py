"""Controls what memory glibc's malloc keeps and what it returns to the system."""

from __future__ import annotations

import ctypes
import functools
import math
import os
import pathlib
import threading
import time

COMPILED = "/jax/core/compile/backend_compile_duration"  # event of jax.monitoring


def keep_freed_memory() -> None:
    """Makes glibc's malloc keep freed memory on a host without a GPU; call before importing jax.

    On CPU, XLA allocates a program's buffers anew for every run. If malloc returns them to the
    system in between, a fifth of a training step's time goes into page faults. The price: all
    threads share one heap, and if small blocks have taken the place of a program's buffers, the
    process grows by the size of those buffers, for every shape anew; `bound_kept_memory` ends that.
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


KEPT_SHARE = 0.25  # of the machine's memory: so much freed memory may be kept
MOST_KEPT = 0.5  # where a quarter is not even the buffers of the programs that run
SOON = 120.0  # seconds


@functools.cache
def bound_kept_memory() -> None:
    """Starts a thread that returns freed memory to the system once a quarter of the machine's
    memory is kept, so that the buffers of many shapes do not add up. If as much is kept again soon,
    the programs need it: twice as much may then be kept. Without a GPU only: see
    `keep_freed_memory`."""
    count, trim = glibc("mallinfo2"), glibc("malloc_trim")
    if count is None or trim is None or pathlib.Path("/dev/nvidiactl").exists():
        return
    count.restype = MallInfo

    def held() -> int:
        info = count()
        return max(0, own_memory() - info.uordblks - info.hblkhd)

    def watch() -> None:
        others = 0  # memory that is not malloc's, which no trimming returns
        kept, most = (share * memory_limit() for share in (KEPT_SHARE, MOST_KEPT))
        last = -math.inf
        while True:
            time.sleep(1.0)
            others = min(others, held())
            if held() > others + kept:
                trim(0)
                others = held()
                if time.monotonic() - last < SOON:
                    kept = min(2 * kept, most)
                last = time.monotonic()

    threading.Thread(target=watch, name="kept memory", daemon=True).start()


class MallInfo(ctypes.Structure):
    """Counts of glibc's malloc in bytes (struct mallinfo2): `uordblks` are in use, `hblkhd` are
    mapped."""

    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names.split(" ")]


def own_memory() -> int:
    """Returns the bytes of this process in memory that it shares with no file."""
    _, resident, shared, *_ = map(int, pathlib.Path("/proc/self/statm").read_text().split())
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def memory_limit() -> int:
    """Returns the bytes of memory that this machine, or the container around it, has."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        path = pathlib.Path("/sys/fs/cgroup") / name
        if path.is_file() and (text := path.read_text().strip()).isdigit():
            limits.append(int(text))
    return min(limits)


def glibc(name: str):
    """Returns a function of glibc, or None with another C library."""
    return getattr(ctypes.CDLL(None), name, None)
