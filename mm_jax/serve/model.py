"""Runs a model on a thread of its own, for an event loop whose requests come and go."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import itertools
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable

from mm_jax.generation.live import Draft, Failure, Live, Piece, Turn
from mm_jax.serve.counters import Counters

log = logging.getLogger(__name__)


class ModelError(RuntimeError):
    """Says that the model failed at a turn."""


class ModelThread:
    """Gives `Live` to an event loop: the thread alone touches the model."""

    def __init__(self, live: Live, counters: Counters):
        self.live, self.counters = live, counters
        self._names = itertools.count()
        self._calls: collections.deque[Callable[[], None]] = collections.deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._told: dict[int, Callable[[list], None]] = {}  # of the thread's turns
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    def name(self) -> int:
        return next(self._names)

    async def answer(self, turn: Turn) -> AsyncIterator[Draft | Piece]:
        """Yields what a turn is answered; leaving early cancels it. Raises PromptError, and
        ModelError for what is not the turn's fault."""
        loop, events = asyncio.get_running_loop(), asyncio.Queue()

        def tell(told: list) -> None:
            for event in told:
                events.put_nowait(event)

        def submit() -> None:
            self._told[turn.name] = lambda told: loop.call_soon_threadsafe(tell, told)
            self.live.submit(turn)

        def cancel() -> None:
            self._told.pop(turn.name, None)
            self.live.cancel(turn.name)

        self._call(submit)
        missing = len(turn.seeds)
        try:
            while missing:
                event = await events.get()
                if isinstance(event, Failure):
                    missing = 0
                    raise event.error
                missing -= isinstance(event, Piece) and bool(event.finished)
                yield event
        finally:
            self._call(cancel)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def stop(self) -> None:
        """Ends the thread; turns that still run are told nothing more."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    def _call(self, call: Callable[[], None]) -> None:
        with self._wake:
            self._calls.append(call)
            self._wake.notify()

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._calls and self.live.is_idle and not self._stopping:
                    self._wake.wait()
                if self._stopping:
                    return
                calls = list(self._calls)
                self._calls.clear()
            for call in calls:
                call()
            if self.live.is_idle:
                continue
            try:
                began = time.perf_counter()
                told = self.live.step()
                took = time.perf_counter() - began
                self.counters.step(told, self.live.fill, len(self.live.waiting), took)
            except Exception:  # of the device or the code: these turns fail, the server goes on
                log.exception("the model failed")
                self.counters.failures.inc()
                error = ModelError("the model failed; the server's log says how")
                self.live.clear()
                told = [Failure(name, error) for name in self._told]
            own = collections.defaultdict(list)
            for event in told:
                own[event.name].append(event)
            for name, events in own.items():
                if name in self._told:
                    with contextlib.suppress(RuntimeError):  # the loop has ended
                        self._told[name](events)
