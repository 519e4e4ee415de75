"""The reward contract: a request in, a score or a failure with its reason out.

A failure (a judge that does not answer, a service that is down) is NaN and `valid` is False; it is
masked out of its group. It is never 0: 0 is what a bad response earns.
"""

from __future__ import annotations

import asyncio
import dataclasses
import importlib
import inspect
import json
import math
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from mm_jax.config import ConfigError
from mm_jax.data.records import Sample


@dataclasses.dataclass(frozen=True)
class Request:
    """A response to score, with what it answers.

    completion: the policy's whole text; response: the reply parsed from it ("" where there is
    none). labels: the labels parsed from it. sample: the prompt's sample, with the reference reply.
    """

    sample: Sample
    response: str
    completion: str = ""
    labels: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Score:
    """value float in [0, 1], or NaN where not `valid`, for `reason` (short and countable).

    A valid score may have a reason too: a rule that decided it. raw: the value before scaling;
    detail: what the reward wants in samples.jsonl; seconds: how long it took.
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


class Reward(Protocol):
    """Scores requests; `counts` are running counters for the log (reason -> number)."""

    name: str

    async def score(self, requests: Sequence[Request]) -> list[Score]: ...

    def counts(self) -> dict[str, int]: ...

    async def close(self) -> None: ...


class FunctionReward:
    """A user's `f(requests) -> list of float, None or Score`, plain (on a thread of its own) or
    async.

    What is no finite number is a failure; so is everything of a call that raised, by the
    exception's type.
    """

    def __init__(self, name: str, function: Callable):
        self.name, self.function = name, function

    async def score(self, requests: Sequence[Request]) -> list[Score]:
        began = time.perf_counter()
        try:
            if inspect.iscoroutinefunction(self.function):
                values = self.function(requests)
            else:  # the rewards beside it go on
                values = await asyncio.to_thread(self.function, requests)
            if inspect.isawaitable(values):
                values = await values
        except Exception as error:
            return [failure(type(error).__name__, message=str(error)[:300])] * len(requests)
        try:
            values = list(values)
        except TypeError as error:
            got = type(values).__name__
            raise ConfigError(
                f"reward {self.name}: expected {len(requests)} scores, got {got}"
            ) from error
        if len(values) != len(requests):
            raise ConfigError(
                f"reward {self.name}: expected {len(requests)} scores, got {len(values)}"
            )
        seconds = time.perf_counter() - began
        return [self._score(value, seconds) for value in values]

    def _score(self, value, seconds: float) -> Score:
        if isinstance(value, Score):
            try:  # samples.jsonl and other processes read it
                json.dumps(value.detail)
            except (TypeError, ValueError) as error:
                raise ConfigError(
                    f"reward {self.name}: Score.detail: expected JSON values: {error}"
                ) from error
            numbers = {k: float(getattr(value, k)) for k in ("value", "raw", "seconds")}
            return dataclasses.replace(value, **numbers)
        try:
            number = math.nan if value is None else float(value)
        except (TypeError, ValueError, OverflowError):
            return failure("not a number")
        if not math.isfinite(number):
            return failure("no value" if math.isnan(number) else "not finite")
        return Score(number, raw=number, seconds=seconds)

    def counts(self) -> dict[str, int]:
        return {}

    async def close(self) -> None:
        pass


def load_function(spec: str) -> FunctionReward:
    """The reward `module:function`. Raises ConfigError where it cannot be imported."""
    module, _, name = spec.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"reward {spec!r}: expected module:function: {error}") from error
    if not callable(function):
        raise ConfigError(f"reward {spec!r}: expected a function, got {type(function).__name__}")
    return FunctionReward(spec, function)
