"""Calls to services that fail now and then: a cache of answers, retries, rate limits, a spend cap,
a circuit breaker, and the chat model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import asyncio
import collections
import hashlib
import json
import os
import pathlib
import re
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
ANSWER_TOKENS = 256  # that an answer is expected to have before one is known


# ---- cache -------------------------------------------------------------------------------------


def cache_key(**fields) -> str:
    """SHA-256 of everything an answer depends on."""
    text = json.dumps(fields, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


class Cache:
    """key -> JSON value. Failures are never put in. Several processes may share the file."""

    def __init__(self, path: pathlib.Path | None):
        path and path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        try:
            self._db = sqlite3.connect(
                ":memory:" if path is None else str(path), timeout=30, check_same_thread=False
            )
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
        """The value, or None."""
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
        """Adds to the number at a key (0 at first), and what it is then."""
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
        """Returns the seconds before the next attempt: those the service asks for, but never more
        than `backoff_max`, or an exponential back-off with full jitter where that is more."""
        longest = self.limits.backoff_max
        jitter = tenacity.wait_random_exponential(self.limits.backoff, longest)(state)
        return max(jitter, min(state.outcome.exception().wait or 0.0, longest))

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
            raise SpendCapError(f"spend cap reached: {ledger.spent:.4f} of {cap:g} spent")
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


# ---- chat models -------------------------------------------------------------------------------


def api_key(model: str, base_url: str, key_variable: str) -> str:
    """The key of an endpoint. Raises ConfigError where OpenAI's has none."""
    key = os.environ.get(key_variable, "")
    if not key and not base_url:
        raise ConfigError(f"model {model}: the environment variable {key_variable} holds no key")
    return key or "none"  # local servers want some


class Chat:
    """model and base_url of an endpoint ("": OpenAI's); the key is in the environment variable
    ("": there is none).

    endpoint: where it really is; answered_as: the model names that it gave with its answers;
    complaints: reason of a failed attempt -> the last message of the service.
    """

    def __init__(
        self,
        model: str,
        base_url: str,
        key_variable: str,
        limits: Limits = Limits(),
        ledger: Ledger | None = None,
    ):
        import openai

        key = api_key(model, base_url, key_variable)
        self.model = model
        self._openai = openai
        self._client = openai.AsyncOpenAI(
            api_key=key, base_url=base_url or None, max_retries=0, timeout=limits.timeout
        )
        self.endpoint = str(self._client.base_url)
        self.calls = Calls(limits, ledger=ledger)
        self.answered_as: set[str] = set()
        self.complaints: dict[str, str] = {}

    async def close(self) -> None:
        await self._client.close()

    async def ask(
        self,
        messages: Callable[[], list[dict]],
        parse: Callable[[str], T],
        tokens: int,
        schema: dict | None = None,
        temperature: float = 0.0,
        max_tokens: int | None = None,
    ) -> T:
        """`parse` of the answer's text, tried again as `Calls.run` does. `messages()` is called for
        every attempt; `tokens` is an estimate for the rate limit; `parse` raises CallError."""
        form = {"response_format": {"type": "json_schema", "json_schema": schema}} if schema else {}
        if max_tokens is not None:
            form["max_tokens"] = max_tokens
        return await self.calls.run(
            lambda: self._once(messages(), parse, tokens, temperature, form), tokens=tokens
        )

    async def _once(self, messages, parse, tokens, temperature, form):
        errors = self._openai
        try:
            answer = await self._client.chat.completions.create(
                model=self.model, messages=messages, temperature=temperature, **form
            )
        except errors.APITimeoutError as error:
            raise CallError("timeout") from error
        except errors.APIConnectionError as error:
            raise CallError("connection") from error
        except errors.APIStatusError as error:
            transient = error.status_code in (408, 409, 429) or error.status_code >= 500
            wait = error.response.headers.get("retry-after", "")
            seconds = float(wait) if re.fullmatch(r"\d+(\.\d+)?", wait) else None
            reason = f"HTTP {error.status_code}"
            said = re.sub(r"\b(sk|key)-\S+", "...", str(error.message))[:300]  # no part of a key
            self.complaints[reason] = said
            raise CallError(reason, said, transient, seconds) from error
        except (errors.APIError, ValueError, RecursionError) as error:  # no JSON that one can read
            raise CallError("malformed answer", str(error)[:200]) from error
        if not hasattr(answer, "choices") or not answer.choices:
            raise CallError("malformed answer", "no choices")
        try:  # the client does not check what it is sent
            text = answer.choices[0].message.content or ""
        except (AttributeError, KeyError, TypeError) as error:
            raise CallError("malformed answer", "no message") from error
        counts = [getattr(answer.usage, f"{k}_tokens", None) for k in ("prompt", "completion")]
        # It does not count, or nonsense: our estimate.
        if not all(type(n) is int and 0 < n < 1e9 for n in counts):
            counts = [tokens, len(str(text)) // 3]
        self.calls.used(*counts)
        if not isinstance(text, str):
            raise CallError("malformed answer", f"expected text, got {type(text).__name__}")
        self.answered_as.add(str(answer.model))
        return parse(text)
