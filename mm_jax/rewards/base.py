"""Defines the reward contract: a request in, a score or a failure with its reason out.

A failure (a judge that does not answer, a service that is down) is NaN with `valid` False, and is
masked out of its group. It is never 0: 0 is what a bad response earns.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib
import inspect
import json
import math
import threading
import time
import unicodedata
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from mm_jax.config.errors import ConfigError
from mm_jax.data.records import Sample

T = TypeVar("T")
LARGEST = 1e15  # squares of scores are summed in float32, which ends at 3e38


@dataclasses.dataclass(frozen=True)
class Request:
    """Holds a response to score, with what it answers.

    completion: the policy's whole text; response and labels: the reply ("" where there is none) and
    the labels parsed from it; sample: the prompt's sample, with the reference reply.
    """

    sample: Sample
    response: str
    completion: str = ""
    labels: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Score:
    """Holds a value in [0, 1], or NaN where not `valid`, for `reason` (short and countable).

    A valid score may have a reason too: the rule that decided it. raw: the value before scaling;
    detail: what the reward writes to samples.jsonl; seconds: how long it took.
    """

    value: float
    valid: bool = True
    reason: str = ""
    raw: float = math.nan
    detail: dict = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    cached: bool = False

    def __post_init__(self):
        if self.valid != math.isfinite(self.value):
            raise ValueError(f"score: valid is {self.valid}, but the value is {self.value}")
        if not self.valid and not self.reason:
            raise ValueError("score: a failure needs a reason")


def failure(reason: str, **detail) -> Score:
    return Score(math.nan, False, reason, detail=detail)


def is_blank(text: str) -> bool:
    """Tells whether a text shows nothing, such as zero-width characters alone."""
    return all(c.isspace() or unicodedata.category(c) in ("Cc", "Cf") for c in text)


async def on_thread(function: Callable[..., T], *args) -> T:
    """Runs `function(*args)` on its own thread. A hung call blocks neither other calls nor
    interpreter exit."""
    # A new daemon thread, no executor: its pool would fill up with hung calls, and Python waits for
    # the threads of an executor at exit.
    loop, future = asyncio.get_running_loop(), asyncio.Future()

    def settle(set_it: Callable, what) -> None:
        if not future.done():  # else the caller gave up, by a time-out or cancellation
            set_it(what)

    def run() -> None:
        try:
            outcome = (future.set_result, function(*args))
        except StopIteration as error:  # a future refuses this type
            outcome = (future.set_exception, RuntimeError(repr(error)))
        except BaseException as error:
            outcome = (future.set_exception, error)
        with contextlib.suppress(RuntimeError):  # the loop is closed and nobody waits
            loop.call_soon_threadsafe(settle, *outcome)

    threading.Thread(target=run, daemon=True).start()
    return await future


class Scorer(Protocol):
    """Scores requests; `counts` gives running counters for the log (reason -> number)."""

    name: str

    async def score(self, requests: Sequence[Request]) -> list[Score]: ...

    def counts(self) -> dict[str, int]: ...

    async def close(self) -> None: ...


class FunctionReward:
    """Wraps a user's `f(requests) -> list of float, None or Score`, async or plain (on its own
    thread, one call at a time). A call has the responses that were finished together.

    A value that is not a finite number is a failure. Where a call raises, or takes more than
    `timeout` seconds, all its scores are failures, named by the exception's type or "timeout".
    """

    def __init__(self, name: str, function: Callable, timeout: float = 600.0):
        self.name, self.function, self.timeout = name, function, timeout
        self.turn = asyncio.Lock()

    async def score(self, requests: Sequence[Request]) -> list[Score]:
        if not inspect.iscoroutinefunction(self.function):
            async with self.turn:
                return await self._scores(requests)
        return await self._scores(requests)

    async def _scores(self, requests: Sequence[Request]) -> list[Score]:
        began = time.perf_counter()
        try:
            async with asyncio.timeout(self.timeout) as limit:
                values = await self._call(requests)
            odd = isinstance(values, (str, bytes, dict, set, frozenset))
            listed = None if odd or not hasattr(values, "__iter__") else list(values)
        except (Exception, asyncio.CancelledError, SystemExit, KeyboardInterrupt) as error:
            if isinstance(error, TimeoutError) and limit.expired():
                return [failure("timeout", message=f"{self.timeout:g} s")] * len(requests)
            return [failure(type(error).__name__, message=str(error)[:300])] * len(requests)
        expected = f"reward {self.name}: expected a list of {len(requests)} scores, got"
        if listed is None:
            raise ConfigError(f"{expected} {type(values).__name__}")
        values = listed
        if len(values) != len(requests):
            raise ConfigError(f"{expected} {len(values)}")
        seconds = time.perf_counter() - began
        return [self._score(value, seconds) for value in values]

    async def _call(self, requests: Sequence[Request]):
        if inspect.iscoroutinefunction(self.function):
            values = self.function(requests)
        else:  # on a thread, so that other rewards go on
            values = await on_thread(self.function, requests)
        return await values if inspect.isawaitable(values) else values

    def _score(self, value, seconds: float) -> Score:
        if isinstance(value, Score):
            try:  # samples.jsonl and other processes must be able to read it
                written = json.dumps(value.detail, ensure_ascii=False, allow_nan=False)
                (written + value.reason).encode()
                dict(value.detail)
            except (TypeError, ValueError, RecursionError) as error:
                raise ConfigError(
                    f"reward {self.name}: Score: expected JSON in detail and reason: {error}"
                ) from error
            numbers = {k: float(getattr(value, k)) for k in ("value", "raw", "seconds")}
            flags = {k: bool(getattr(value, k)) for k in ("valid", "cached")}
            value = dataclasses.replace(value, **numbers, **flags)
            return value if not abs(value.value) > LARGEST else failure("too large")
        try:
            number = math.nan if value is None else float(value)
        except Exception:  # an object's __float__ may raise anything
            return failure("not a number")
        if isinstance(value, (str, bytes)):
            return failure("not a number")
        if not math.isfinite(number):
            return failure("no value" if math.isnan(number) else "not finite")
        if abs(number) > LARGEST:
            return failure("too large")
        return Score(number, raw=number, seconds=seconds)

    def counts(self) -> dict[str, int]:
        return {}

    async def close(self) -> None:
        pass


def load_function(spec: str, timeout: float = 600.0) -> FunctionReward:
    """Loads the reward `module:function`. Raises ConfigError where it cannot be imported."""
    module, _, name = spec.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:  # a user's module may raise anything
        said = f"{type(error).__name__}: {error}"
        raise ConfigError(f"reward {spec!r}: expected module:function: {said}") from error
    if not callable(function):
        raise ConfigError(f"reward {spec!r}: expected a function, got {type(function).__name__}")
    return FunctionReward(spec, function, timeout)
