"""Calls to a service that fails now and then: retries, limits, spend cap and circuit breaker.

Used by everything that talks to an endpoint (judge, similarity service).
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import random
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

from mm_jax.config.errors import ConfigError
from mm_jax.rewards.cache import Cache

T = TypeVar("T")
CIRCUIT_OPEN = "circuit open"
ANSWER_TOKENS = 256  # that an answer is expected to have before one is known


class CallError(Exception):
    """A call that failed, for a short countable `reason`; `transient` ones are worth a retry."""

    def __init__(
        self, reason: str, detail: str = "", transient: bool = True, wait: float | None = None
    ):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.transient, self.wait = reason, transient, wait


class SpendCapError(RuntimeError):
    """The spend cap is reached; no call is made any more."""


async def gather_all(calls: Iterable[Awaitable[T]]) -> list[T]:
    """The results of all, once all have ended: what is under way at another's error is paid for and
    belongs into the cache. Then raises the first error, if any; a CallError, which fails a score
    alone, only where there is no other."""
    found = await asyncio.gather(*calls, return_exceptions=True)
    errors = [result for result in found if isinstance(result, BaseException)]
    for error in sorted(errors, key=lambda e: isinstance(e, CallError)):
        raise error
    return found


@dataclasses.dataclass(frozen=True)
class Limits:
    """How hard a service may be asked.

    attempts of a call; timeout, backoff and backoff_max in seconds (the wait doubles from backoff
    on, with full jitter); requests and tokens a minute, spend_cap in the currency of the prices a
    million tokens, all 0: no limit; the cap is that of the `Ledger`, and of an answer under way the
    longest so far is expected. After `breaker_failures` calls in a row that failed after their
    attempts, calls fail at once for breaker_seconds (`breaker_waits`: they wait); then one tries
    again, and those beside it wait for what becomes of it.
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
    breaker_waits: bool = False

    def __post_init__(self):
        for name in ("attempts", "concurrency", "breaker_failures"):
            if vars(self)[name] < 1:
                raise ConfigError(f"limits.{name}: expected at least 1, got {vars(self)[name]}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value < 0:
                raise ConfigError(f"limits.{field.name}: expected at least 0, got {value}")
        if self.timeout <= 0:
            raise ConfigError(f"limits.timeout: expected above 0, got {self.timeout}")
        if self.spend_cap and not (self.price_in or self.price_out):
            raise ConfigError(
                f"limits.spend_cap: {self.spend_cap} needs price_in or price_out: without a price "
                "nothing is ever spent"
            )


class Ledger:
    """What several `Calls` have spent together, and what calls under way may still cost.

    With a cache its spend is kept there: that of a whole run, with what other processes have spent
    and what was spent before a resume.
    """

    def __init__(self, cache: Cache | None = None):
        self.cache = cache
        self.spent = 0.0
        self.reserved = 0.0
        self.pay(0.0)

    def pay(self, cost: float) -> None:
        self.spent = self.cache.add("spent", cost) if self.cache else self.spent + cost


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

    failed: reason -> failed attempts; lost: reason -> calls that got no answer at all; usage:
    calls, attempts, tokens and spend so far. The spend cap is that of the ledger.
    """

    def __init__(self, limits: Limits, seed: int = 0, ledger: Ledger | None = None):
        self.limits = limits
        self.ledger = ledger if ledger is not None else Ledger()
        self.failed: collections.Counter[str] = collections.Counter()
        self.lost: collections.Counter[str] = collections.Counter()
        self.calls = self.attempts = 0
        self.tokens_in = self.tokens_out = 0
        self._random = random.Random(seed)  # of the jitter alone
        self._slots = asyncio.Semaphore(limits.concurrency)
        self._requests = Bucket(limits.requests_per_minute)
        self._tokens = Bucket(limits.tokens_per_minute)
        self._in_a_row = 0
        self._closed_until = 0.0  # 0: no failure has opened the breaker
        self._probing = False
        self._longest = ANSWER_TOKENS

    @property
    def spend(self) -> float:
        return self.cost(self.tokens_in, self.tokens_out)

    def cost(self, tokens_in: int, tokens_out: int) -> float:
        return (tokens_in * self.limits.price_in + tokens_out * self.limits.price_out) / 1e6

    def used(self, tokens_in: int, tokens_out: int) -> None:
        """What an answer says it cost."""
        self.tokens_in += tokens_in
        self.tokens_out += tokens_out
        self._longest = max(self._longest, tokens_out)
        self.ledger.pay(self.cost(tokens_in, tokens_out))

    async def run(self, call: Callable[[], Awaitable[T]], tokens: int = 0) -> T:
        """The answer of `call()`, tried again after transient CallErrors and time-outs.

        tokens: an estimate for the rate limit and of what the call will cost. Raises CallError with
        the last reason, or SpendCapError.
        """
        self.calls += 1
        try:
            return await self._run(call, tokens)
        except CallError as error:
            self.lost[error.reason] += 1
            raise

    async def _run(self, call: Callable[[], Awaitable[T]], tokens: int) -> T:
        limits = self.limits
        async with self._slots:
            for attempt in range(1, limits.attempts + 1):
                try:
                    return await self._attempt(call, tokens)
                except CallError as error:
                    if not error.transient or attempt == limits.attempts:
                        self._gave_up(error)
                        raise
                    asked = error.wait or 0.0
                longest = min(limits.backoff_max, limits.backoff * 2 ** (attempt - 1))
                wait = self._random.uniform(0, longest)
                # What the service asks for, but not longer than our own longest wait.
                await asyncio.sleep(max(wait, min(asked, limits.backoff_max)))
        raise AssertionError("unreachable")

    async def _attempt(self, call: Callable[[], Awaitable[T]], tokens: int) -> T:
        limits, ledger, probe = self.limits, self.ledger, await self._admitted()
        try:
            self._estimate(tokens)  # nobody waits for the rate limit only to be refused
            await self._requests.take(1)
            await self._tokens.take(tokens)
            estimate = self._estimate(tokens)
            self.attempts += 1
            ledger.reserved += estimate
            try:
                answer = await asyncio.wait_for(call(), limits.timeout)
            except TimeoutError as error:
                self._count("timeout", probe)
                raise CallError("timeout") from error
            except CallError as error:
                self._count(error.reason, probe)
                raise
            finally:
                ledger.reserved -= estimate
            self._in_a_row = 0
            if probe:
                self._closed_until = 0.0
            return answer
        finally:
            if probe:
                self._probing = False

    def _estimate(self, tokens: int) -> float:
        """What a call may cost. Raises SpendCapError where that is more than is left."""
        cap, ledger = self.limits.spend_cap, self.ledger
        estimate, known = self.cost(tokens, self._longest), ledger.spent + ledger.reserved
        if cap and (known >= cap or known + estimate > cap):
            raise SpendCapError(f"spend cap reached: {ledger.spent:.4f} of {cap} spent")
        return estimate

    async def _admitted(self) -> bool:
        """Waits for the breaker, or fails; whether this call is the one that tries again."""
        while self._closed_until:
            closed = self._closed_until - time.monotonic()
            if closed <= 0 and not self._probing:
                self._probing = True
                return True
            if closed > 0 and not self.limits.breaker_waits:
                raise CallError(CIRCUIT_OPEN, transient=False)
            await asyncio.sleep(max(closed, 0.05))
        return False

    def _count(self, reason: str, probe: bool) -> None:
        self.failed[reason] += 1
        if probe:
            self._open()

    def _gave_up(self, error: CallError) -> None:
        """A call ends without an answer; one that the open breaker refused says nothing new."""
        if error.reason != CIRCUIT_OPEN and not self._closed_until:
            self._in_a_row += 1
            if self._in_a_row >= self.limits.breaker_failures:
                self._open()

    def _open(self) -> None:
        self._closed_until = time.monotonic() + self.limits.breaker_seconds
        self._in_a_row = 0
        self.failed["circuit opened"] += 1
