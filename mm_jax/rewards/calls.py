"""Calls services that fail now and then: with a cache of answers, retries, rate limits, a spend cap
and a circuit breaker."""

from __future__ import annotations

import asyncio
import collections
import hashlib
import json
import logging
import pathlib
import sqlite3
import threading
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

import tenacity

from mm_jax.config.errors import ConfigError
from mm_jax.config.reward import Limits

T = TypeVar("T")
CIRCUIT_OPEN = "circuit open"
NEVER_ANSWERED = 5  # outages in a row of a service that no call has reached yet
log = logging.getLogger(__name__)
ANSWER_TOKENS = 256  # expected length of an answer, until a longer one is seen


# ---- cache -------------------------------------------------------------------------------------


def cache_key(**fields) -> str:
    """Returns the SHA-256 of everything an answer depends on."""
    text = json.dumps(fields, sort_keys=True, ensure_ascii=False)
    # A model's text may hold lone surrogates, which plain UTF-8 refuses.
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


class Cache:
    """Stores key -> JSON value, never a failure. Several processes may share the file."""

    def __init__(self, path: pathlib.Path | None):
        path and path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        try:
            self._db = sqlite3.connect(
                ":memory:" if path is None else str(path), timeout=30, check_same_thread=False
            )
            # Write-ahead logging lets other processes read while one writes.
            self._db.execute("pragma journal_mode=wal")
            self._db.execute(
                "create table if not exists answers (key text primary key, value text)"
            )
            self._db.commit()
        except sqlite3.OperationalError as error:  # locked, or nowhere to write
            raise ConfigError(f"{path}: {error}") from error
        except sqlite3.DatabaseError as error:
            raise ConfigError(
                f"{path}: {error}; remove it: answers are then paid for again, and what was spent "
                "is forgotten"
            ) from error

    def get(self, key: str):
        """Returns the value, or None."""
        with self._lock:
            found = self._db.execute("select value from answers where key = ?", (key,)).fetchone()
        return None if found is None else json.loads(found[0])

    def put(self, key: str, value) -> None:
        with self._lock:
            self._db.execute(
                "insert or replace into answers values (?, ?)", (key, json.dumps(value))
            )
            self._db.commit()

    def add(self, key: str, amount: float) -> float:
        """Adds to the number at a key (0 at first); returns the sum."""
        # One statement, so that additions of several processes cannot overwrite each other.
        with self._lock:
            (total,) = self._db.execute(
                "insert into answers values (?, ?) on conflict (key) do update set "
                "value = value + excluded.value returning value",
                (key, amount),
            ).fetchone()
            self._db.commit()
        return float(total)

    def close(self) -> None:
        with self._lock:
            self._db.close()


# ---- calls -------------------------------------------------------------------------------------


class CallError(Exception):
    """Says that a call failed, for a short countable `reason`.

    transient: a retry may help; wait: seconds that the service asks for; answered: the service
    works, but what it said is of no use.
    """

    def __init__(
        self,
        reason: str,
        detail: str = "",
        transient: bool = True,
        wait: float | None = None,
        answered: bool = False,
    ):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.transient, self.wait, self.answered = reason, transient, wait, answered


class StopError(RuntimeError):
    """Says that no further call is made, because none could succeed."""


class SpendCapError(StopError):
    """Says that the spend cap is reached."""


class RefusedError(StopError):
    """Says that a service refuses every call, with its own message: a wrong key, model or address,
    or no credit. Waiting does not help."""


async def gather_all(calls: Iterable[Awaitable[T]]) -> list[T]:
    """Waits for all calls and returns their results; then raises the first error, if any, with a
    CallError, which fails only one score, after all others."""
    # Plain gather() would raise at the first error, while the other calls still run: those are paid
    # for, and their answers belong in the cache.
    found = await asyncio.gather(*calls, return_exceptions=True)
    errors = [result for result in found if isinstance(result, BaseException)]
    for error in sorted(errors, key=lambda e: isinstance(e, CallError)):
        raise error
    return found


class Ledger:
    """Counts what several `Calls` have spent together, and what running calls may still cost.

    With a cache the spend is kept there, and is that of the whole run: it includes what other
    processes have spent and what was spent before a resume.
    """

    def __init__(self, cache: Cache | None = None):
        self.cache = cache
        self.spent = 0.0
        self.reserved = 0.0
        self.pay(0.0)

    def pay(self, cost: float) -> None:
        self.spent = self.cache.add("spent", cost) if self.cache else self.spent + cost


class Bucket:
    """Limits a rate by a token bucket: `rate` per minute, at most one minute's worth at once."""

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
            # A call larger than the bucket goes when it is full, and leaves it in debt; it would
            # wait for ever for a level that the bucket cannot reach.
            if self.level >= min(amount, self.rate):
                self.level -= amount
                return
            await asyncio.sleep((min(amount, self.rate) - self.level) * 60 / self.rate)


class Calls:
    """Makes calls within `limits`; belongs to one event loop.

    failed: reason -> failed attempts; lost: reason -> calls that never got an answer; calls,
    attempts, tokens and spend count what was used so far. The spend cap counts the whole ledger.
    """

    def __init__(self, limits: Limits, ledger: Ledger | None = None):
        self.limits = limits
        self.ledger = ledger if ledger is not None else Ledger()
        self.failed: collections.Counter[str] = collections.Counter()
        self.lost: collections.Counter[str] = collections.Counter()
        self.calls = self.attempts = 0
        self.tokens_in = self.tokens_out = 0
        self._slots = asyncio.Semaphore(limits.concurrency)
        self._requests = Bucket(limits.requests_per_minute)
        self._tokens = Bucket(limits.tokens_per_minute)
        self._in_a_row = 0
        self._answers = self._outages = 0
        self._stopped: StopError | None = None
        self._closed_until = 0.0  # 0: the breaker lets calls through
        self._probing = False
        self._longest = ANSWER_TOKENS

    @property
    def spend(self) -> float:
        return self.cost(self.tokens_in, self.tokens_out)

    def cost(self, tokens_in: int, tokens_out: int) -> float:
        return (tokens_in * self.limits.price_in + tokens_out * self.limits.price_out) / 1e6

    def used(self, tokens_in: int, tokens_out: int) -> None:
        """Counts the tokens of an answer and pays for them."""
        self.tokens_in += tokens_in
        self.tokens_out += tokens_out
        self._longest = max(self._longest, tokens_out)
        self.ledger.pay(self.cost(tokens_in, tokens_out))

    async def run(self, call: Callable[[], Awaitable[T]], tokens: int = 0) -> T:
        """Returns the answer of `call()`, retrying after transient CallErrors and time-outs.

        tokens: an estimate of the prompt's, for the rate limit and the cost. Raises CallError with
        the last reason, or StopError.
        """
        self.calls += 1
        try:
            return await self._run(call, tokens)
        except CallError as error:
            self.lost[error.reason] += 1
            raise

    async def _run(self, call: Callable[[], Awaitable[T]], tokens: int) -> T:
        retrying = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(self.limits.attempts),
            wait=self._wait,
            retry=tenacity.retry_if_exception(lambda e: isinstance(e, CallError) and e.transient),
            reraise=True,
        )
        async with self._slots:
            try:
                return await retrying(self._attempt, call, tokens)
            except CallError as error:
                self._gave_up(error)
                raise

    def _wait(self, state: tenacity.RetryCallState) -> float:
        """Returns the seconds before the next attempt: at least what the service asks for, but
        never more than `backoff_max`."""
        longest = self.limits.backoff_max
        # Full jitter: calls that failed together must not come back together.
        jitter = tenacity.wait_random_exponential(self.limits.backoff, longest)(state)
        return max(jitter, min(state.outcome.exception().wait or 0.0, longest))

    async def _attempt(self, call: Callable[[], Awaitable[T]], tokens: int) -> T:
        limits, ledger, probe = self.limits, self.ledger, await self._admitted()
        try:
            if self._stopped:
                raise self._stopped
            # Checked before the rate limit, so that no call waits only to be refused, and again
            # after it, because other calls have spent in the meantime.
            self._estimate(tokens)
            await self._requests.take(1)
            await self._tokens.take(tokens)
            estimate = self._estimate(tokens)
            self.attempts += 1
            # Reserved until the answer says what it cost: concurrent calls would otherwise all see
            # the same free budget and exceed the cap together.
            ledger.reserved += estimate
            try:
                answer = await asyncio.wait_for(call(), limits.timeout)
            except TimeoutError as error:
                self._count("timeout", probe)
                raise CallError("timeout") from error
            except CallError as error:
                self._count(error.reason, probe and not error.answered)
                if error.answered:
                    self._reached(probe)
                raise
            except RefusedError as error:
                self._stopped = error
                raise
            finally:
                ledger.reserved -= estimate
            self._reached(probe)
            return answer
        finally:  # also when the probe is cancelled: else every later call would wait for it
            if probe:
                self._probing = False

    def _estimate(self, tokens: int) -> float:
        """Estimates what a call may cost. Raises SpendCapError where less than that is left."""
        cap, ledger = self.limits.spend_cap, self.ledger
        estimate, known = self.cost(tokens, self._longest), ledger.spent + ledger.reserved
        if cap and (known >= cap or known + estimate > cap):
            raise SpendCapError(f"spend cap reached: {ledger.spent:.4f} of {cap:g} spent")
        return estimate

    async def _admitted(self) -> bool:
        """Waits for the breaker, or fails; returns whether this call is the one that probes the
        service. One call probes while the others wait, so that a recovering service is not hit by
        all at once."""
        while self._closed_until and not self._stopped:
            closed = self._closed_until - time.monotonic()
            if closed <= 0 and not self._probing:
                self._probing = True
                return True
            if closed > 0 and not self.limits.breaker_waits:
                raise CallError(CIRCUIT_OPEN, transient=False)
            await asyncio.sleep(max(closed, 0.05))
        return False

    def _reached(self, probe: bool) -> None:
        self._in_a_row = self._outages = 0
        self._answers += 1
        if probe:
            self._closed_until = 0.0

    def _count(self, reason: str, probe: bool) -> None:
        self.failed[reason] += 1
        if probe:
            self._open(reason)

    def _gave_up(self, error: CallError) -> None:
        """Counts a call that got no answer; one that the open breaker refused says nothing new."""
        if error.reason != CIRCUIT_OPEN and not error.answered and not self._closed_until:
            self._in_a_row += 1
            if self._in_a_row >= self.limits.breaker_failures:
                self._open(error.reason)

    def _open(self, reason: str) -> None:
        limits = self.limits
        self._closed_until = time.monotonic() + limits.breaker_seconds
        self._in_a_row = 0
        self._outages += 1
        self.failed["circuit opened"] += 1
        if limits.breaker_waits and not self._answers and self._outages >= NEVER_ANSWERED:
            self._stopped = RefusedError(f"the service never answered: {reason}; is it running?")
        waits = "calls wait" if limits.breaker_waits else "calls fail"
        log.warning(
            "a service is out (%s): %s for %g s, then one tries again",
            reason,
            waits,
            limits.breaker_seconds,
        )
