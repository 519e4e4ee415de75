"""Compiles a stage's programs in threads, ahead of their first call."""

from __future__ import annotations

import concurrent.futures
import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import jax
from jax.sharding import Mesh


class Ahead:
    """Compiles in threads while the stage goes on; tell(text) shows the progress.

    Jit keeps what was compiled, so that a call with the same shapes and shardings takes it. A
    program must not be called while it is being compiled (`wait`), as it would be compiled twice.
    """

    def __init__(self, mesh: Mesh, tell: Callable[[str], None]):
        self.mesh, self.tell = mesh, tell
        # A compilation uses about two cores itself. The processes of a job must compile in one
        # order: XLA's autotuning shares its work.
        cores = os.cpu_count() or 1
        threads = max(1, min(4, cores // 2)) if jax.process_count() == 1 else 1
        self.pool = concurrent.futures.ThreadPoolExecutor(threads, "compile")

    def add(self, compile_it: Callable[..., Any], *arguments: Any) -> Future:
        """Queues `compile_it(*arguments)`, which runs with the mesh set."""
        return self.pool.submit(self._run, functools.partial(compile_it, *arguments))

    def _run(self, compile_it: Callable[[], Any]) -> None:
        with jax.set_mesh(self.mesh):
            compile_it()

    def wait(self, programs: Sequence[Future]) -> None:
        """Waits for programs, and raises the first error."""
        for future in programs:
            if not future.done():
                ready = sum(other.done() for other in programs)
                self.tell(f"compiling, {ready} of {len(programs)} programs ready")
            future.result()

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)


def compile_for(jitted: Any, *arguments: Any, **static: Any) -> None:
    """Compiles a jitted function for arguments of these shapes and shardings."""
    jitted.lower(*arguments, **static).compile()


def shapes_of(tree: Any) -> Any:
    """Returns arrays on devices as shapes with shardings."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), tree)
