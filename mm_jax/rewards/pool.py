"""Scores responses on a thread of its own while the devices sample others."""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import logging
import pathlib
import threading
from collections.abc import Sequence

import numpy as np

from mm_jax.config.errors import ConfigError, UserError
from mm_jax.config.reward import Reward
from mm_jax.rewards.base import FunctionReward, Request, Score, Scorer, load_function
from mm_jax.rewards.calls import Cache, Ledger, SpendCapError, StopError, gather_all
from mm_jax.rewards.chat import api_key
from mm_jax.rewards.judge import TrustJudge, TwoJudges
from mm_jax.rewards.similarity import BgeSimilarity, LexicalSimilarity

log = logging.getLogger(__name__)

CACHE_FILE = "reward_cache.sqlite"


class RewardFailureError(UserError, RuntimeError):
    """Says that a reward failed too often or may spend no more; the run must not go on without."""


class RewardPool:
    """Runs every reward on every request, concurrently.

    `submit` returns a future at once; its result is reward name -> scores, in the order of the
    requests. `check` raises RewardFailureError where `failure_limit` x `window` of a reward's last
    `window` scores have failed.
    """

    def __init__(self, rewards: Sequence[Scorer], failure_limit: float = 0.5, window: int = 100):
        self.rewards, self.failure_limit, self.window = list(rewards), failure_limit, window
        names = [r.name for r in self.rewards]
        if len(set(names)) < len(names):
            raise ValueError(f"rewards: a name occurs twice: {names}")
        self._recent = {name: collections.deque(maxlen=window) for name in names}
        # One loop for the pool's life: semaphores, rate limits and HTTP clients belong to a loop.
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def submit(
        self, requests: Sequence[Request]
    ) -> concurrent.futures.Future[dict[str, list[Score]]]:
        return asyncio.run_coroutine_threadsafe(self._score(list(requests)), self._loop)

    async def _score(self, requests: list[Request]) -> dict[str, list[Score]]:
        try:
            found = await gather_all(r.score(requests) for r in self.rewards)
        except StopError as error:
            cap = isinstance(error, SpendCapError)
            cure = "raise reward.limits.spend_cap" if cap else "fix that"
            raise RewardFailureError(f"{error}; {cure} to continue with --resume") from error
        except (ConfigError, RewardFailureError):
            raise
        except Exception as error:  # as one type, so that all processes handle it alike
            log.warning("a reward raised an error", exc_info=True)
            raise RewardFailureError(f"rewards: {type(error).__name__}: {error}") from error
        out = {}
        for reward, scores in zip(self.rewards, found, strict=True):
            if len(scores) != len(requests):
                raise ConfigError(
                    f"reward {reward.name}: expected {len(requests)} scores, got {len(scores)}"
                )
            out[reward.name] = scores
        return out

    def check(self, scores: dict[str, list[Score]]) -> None:
        """Counts the failures of a step's scores. Raises RewardFailureError."""
        for name in self._recent.keys() & scores.keys():
            own, recent = scores[name], self._recent[name]
            # Cached scores say nothing about the service now.
            recent.extend(s for s in own if not s.cached)
            failed = [s for s in recent if not s.valid]
            if len(failed) >= self.failure_limit * self.window:
                raise RewardFailureError(
                    f"reward {name}: {len(failed)} of the last {len(recent)} scores failed "
                    f"({reasons(failed)}), reward.failure_limit={self.failure_limit} of "
                    f"{self.window}; fix the service, then continue with --resume"
                )

    def counts(self) -> dict[str, dict[str, int]]:
        """Counts failed attempts since the start: reward name -> reason -> number."""
        return {r.name: r.counts() for r in self.rewards}

    def close(self) -> None:
        """Closes the pool after giving running calls a few seconds: they are paid for, and may
        still reach the cache."""

        async def end():
            waiting = asyncio.all_tasks() - {asyncio.current_task()}
            if waiting:
                await asyncio.wait(waiting, timeout=5)
            for reward in self.rewards:
                await reward.close()

        try:
            asyncio.run_coroutine_threadsafe(end(), self._loop).result(timeout=10)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(timeout=10)
            self._loop.close()
        except Exception as error:  # must not hide the error that ended the run
            log.warning("rewards did not close: %s: %s", type(error).__name__, error)


def reasons(failed: Sequence[Score]) -> str:
    """Words the most frequent reasons of failed scores, and the last message of one."""
    counts = collections.Counter(s.reason for s in failed).most_common(3)
    said = [s.detail["message"] for s in failed if s.detail.get("message")]
    return ", ".join(f"{reason} {n}" for reason, n in counts) + (f": {said[-1]}" if said else "")


def score_metrics(scores: dict[str, list[Score]]) -> dict[str, float]:
    """Summarises every reward: mean and deviation of its valid values, mean raw value, latency, and
    the shares of failed and of cached scores."""
    out = {}
    for name, own in scores.items():
        values = np.array([s.value for s in own if s.valid])
        raw = np.array([s.raw for s in own if s.valid and np.isfinite(s.raw)])
        asked = [s.seconds for s in own if s.valid and not s.cached]
        if len(values):  # without a valid score there is no mean, and 0 would look like one
            out[f"reward/{name}"] = float(values.mean())
            out[f"reward/{name}_std"] = float(values.std())
        if len(raw):
            out[f"reward/{name}_raw"] = float(raw.mean())
        out[f"reward/{name}_seconds"] = float(np.mean(asked)) if asked else 0.0
        out[f"reward/{name}_failed"] = float(np.mean([not s.valid for s in own]))
        out[f"reward/{name}_cached"] = float(np.mean([s.cached for s in own]))
        apart = [s.detail.get("disagreement") for s in own]
        apart = [x for x in apart if isinstance(x, float)]
        if apart:
            out[f"reward/{name}_disagreement"] = float(np.mean(apart))
    return out


def check_services(reward: Reward) -> None:
    """Checks keys and functions that `make_pool` will need, before anything is trained. Raises
    ConfigError."""
    for judge in reward.judges:
        api_key(judge.model, judge.base_url, judge.key_variable)
    if reward.function in reward.weights:
        load_function(reward.function, reward.function_timeout)


def label_share(requests: Sequence[Request]) -> list[float]:
    """Computes, per response, the share of tasks with a gold label whose label is right."""
    shares = []
    for request in requests:
        gold = {t: request.sample.target(t) for t in request.labels}
        hits = [request.labels[t] == label for t, label in gold.items() if label]
        shares.append(sum(hits) / len(hits) if hits else 0.0)
    return shares


def make_pool(reward: Reward, workdir: pathlib.Path, replies: Sequence[str]) -> RewardPool:
    """Builds the pool of all components with a weight, except the reward model, which runs on the
    devices.

    `replies` are those of the train split, for the lexical similarity's idf. Answers are cached in
    `workdir/reward_cache.sqlite`.
    """
    weights, limits = reward.weights, reward.limits
    cache = Cache(workdir / CACHE_FILE)
    ledger = Ledger(cache)
    rewards: list[Scorer] = []
    judges = [TrustJudge(judge, limits, cache, ledger=ledger) for judge in reward.judges]
    if judges:
        rewards.append(TwoJudges(*judges) if len(judges) > 1 else judges[0])
    if "similarity" in weights:
        # Our own service is free and answers one call after the other, so two failed calls in a row
        # already mean that it hangs.
        prices = ("price_in", "price_out", "spend_cap", "requests_per_minute", "tokens_per_minute")
        free = limits.model_copy(
            update=dict.fromkeys(prices, 0.0)
            | dict(concurrency=1, breaker_failures=min(2, limits.breaker_failures))
        )
        rewards.append(BgeSimilarity(reward.similarity_url, free, cache, reward.similarity_both))
    if "lexical" in weights:
        rewards.append(LexicalSimilarity(replies))
    if "labels" in weights:
        rewards.append(FunctionReward("labels", label_share))
    if reward.function in weights:
        rewards.append(load_function(reward.function, reward.function_timeout))
    return RewardPool(rewards, reward.failure_limit)
