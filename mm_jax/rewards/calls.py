"""Calls to a service that fails now and then: retries, limits, spend cap and circuit breaker.

Used by everything that talks to an endpoint (judge, similarity service).
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import random
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


class CallError(Exception):
    """A call that failed, for a short countable `reason`; `transient` ones are worth a retry."""

    def __init__(
        self, reason: str, detail: str = "", transient: bool = True, wait: float | None = None
    ):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.transient, self.wait = reason, transient, wait


class SpendCapError(RuntimeError):
    """The spend cap is reached; no call is made any more."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """How hard a service may be asked.

    attempts of a call; timeout, backoff and backoff_max in seconds (the wait doubles from backoff
    on, with full jitter); requests and tokens a minute, spend_cap in the currency of the prices a
    million tokens, all 0: no limit. After `breaker_failures` failed attempts in a row calls fail at
    once for breaker_seconds, then one tries again.
    """

    attempts: int = 5
    timeout: float = 60.0
    backoff: float = 0.5
    backoff_max: float = 30.0
    concurrency: int = 16
    requests_per_minute: float = 0.0
    tokens_per_minute: float = 0.0
    price_in: float = 0.0
    price_out: float = 0.0
    spend_cap: float = 0.0
    breaker_failures: int = 20
    breaker_seconds: float = 30.0


class Bucket:
    """A token bucket: `rate` a minute, at most a minute's worth at once."""

    def __init__(self, rate: float):
        self.rate = rate
        self.level, self.at = rate, time.monotonic()

    async def take(self, amount: float) -> None:
        if self.rate <= 0:
            return
        while True:
            now = time.monotonic()
            self.level = min(self.rate, self.level + (now - self.at) * self.rate / 60)
            self.at = now
            if self.level >= min(amount, self.rate):
                self.level -= amount
                return
            await asyncio.sleep((min(amount, self.rate) - self.level) * 60 / self.rate)


class Calls:
    """Makes calls within `limits`; belongs to one event loop.

    failed: reason -> failed attempts; usage: calls, attempts, tokens and spend so far.
    """

    def __init__(self, limits: Limits, seed: int = 0):
        self.limits = limits
        self.failed: collections.Counter[str] = collections.Counter()
        self.calls = self.attempts = 0
        self.tokens_in = self.tokens_out = 0
        self._random = random.Random(seed)  # of the jitter alone
        self._slots = asyncio.Semaphore(limits.concurrency)
        self._requests = Bucket(limits.requests_per_minute)
        self._tokens = Bucket(limits.tokens_per_minute)
        self._in_a_row = 0
        self._closed_until = 0.0

    @property
    def spend(self) -> float:
        return (
            self.tokens_in * self.limits.price_in + self.tokens_out * self.limits.price_out
        ) / 1e6

    def used(self, tokens_in: int, tokens_out: int) -> None:
        """What an answer says it cost."""
        self.tokens_in += tokens_in
        self.tokens_out += tokens_out

    async def run(self, call: Callable[[], Awaitable[T]], tokens: int = 0) -> T:
        """The answer of `call()`, tried again after transient CallErrors and time-outs.

        tokens: an estimate for the rate limit. Raises CallError with the last reason, or
        SpendCapError.
        """
        limits = self.limits
        self.calls += 1
        async with self._slots:
            for attempt in range(1, limits.attempts + 1):
                if limits.spend_cap and self.spend >= limits.spend_cap:
                    raise SpendCapError(
                        f"spend cap reached: {self.spend:.4f} of {limits.spend_cap} spent"
                    )
                if time.monotonic() < self._closed_until:
                    raise CallError("circuit open", transient=False)
                await self._requests.take(1)
                await self._tokens.take(tokens)
                self.attempts += 1
                try:
                    answer = await asyncio.wait_for(call(), limits.timeout)
                except TimeoutError:
                    error = CallError("timeout")
                except CallError as caught:
                    error = caught
                else:
                    self._in_a_row = 0
                    return answer
                self._count(error.reason)
                if not error.transient or attempt == limits.attempts:
                    raise error
                longest = min(limits.backoff_max, limits.backoff * 2 ** (attempt - 1))
                wait = self._random.uniform(0, longest)
                # What the service asks for, but not longer than our own longest wait.
                await asyncio.sleep(max(wait, min(error.wait or 0.0, limits.backoff_max)))
        raise AssertionError("unreachable")

    def _count(self, reason: str) -> None:
        self.failed[reason] += 1
        self._in_a_row += 1
        if self._in_a_row >= self.limits.breaker_failures:
            self._closed_until = time.monotonic() + self.limits.breaker_seconds
            self._in_a_row = self.limits.breaker_failures - 1  # one failure opens it again
            self.failed["circuit opened"] += 1
