"""From `config.reward` to the pool of rewards of a run."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

from ml_collections import ConfigDict

from mm_jax.config.errors import ConfigError, check_url, one_of, require
from mm_jax.rewards.base import FunctionReward, Request, Reward, load_function
from mm_jax.rewards.cache import Cache
from mm_jax.rewards.calls import Ledger, Limits
from mm_jax.rewards.chat import api_key
from mm_jax.rewards.combine import COMBINATIONS
from mm_jax.rewards.judge import JudgeConfig, TrustJudge, TwoJudges
from mm_jax.rewards.pool import RewardPool
from mm_jax.rewards.similarity import BgeSimilarity, LexicalSimilarity

CACHE_FILE = "reward_cache.sqlite"
SIMILARITIES = ("bge", "lexical")


def reward_weights(c: ConfigDict) -> dict[str, float]:
    """Component name -> weight, of those that count."""
    names = {
        "trust": c.trust,
        "lexical" if c.similarity_kind == "lexical" else "similarity": c.similarity,
        "labels": c.labels,
        "learned": c.learned,
        c.function or "function": c.function_weight if c.function else 0.0,
    }
    return {name: weight for name, weight in names.items() if weight > 0}


def validate_rewards(c: ConfigDict) -> None:
    """Raises ConfigError."""
    one_of("reward.similarity_kind", c.similarity_kind, SIMILARITIES)
    one_of("reward.combination", c.combination, COMBINATIONS)
    require(
        bool(reward_weights(c)),
        "reward: no component has a weight: set reward.trust, similarity, labels, "
        "learned or function",
    )
    require(
        0 < c.failure_limit <= 1,
        f"reward.failure_limit: expected 0 < limit <= 1, got {c.failure_limit}",
    )
    for name in ("trust", "similarity", "labels", "learned", "function_weight"):
        require(c[name] >= 0, f"reward.{name}: expected at least 0, got {c[name]}")
    require(
        c.function_timeout > 0,
        f"reward.function_timeout: expected above 0, got {c.function_timeout}",
    )
    judge_config(c.judge)
    trusted = "trust" in reward_weights(c)
    require(not trusted or bool(c.judge.model), "reward.judge.model: expected a name, got ''")
    if c.second_judge.model:
        judge_config(c.second_judge, "reward.second_judge")
    if "similarity" in reward_weights(c):
        check_url("reward.similarity_url", c.similarity_url)
    Limits(**c.limits)


def check_services(c: ConfigDict) -> None:
    """What `make_pool` will need, before anything is trained. Raises ConfigError."""
    weights = reward_weights(c)
    for judge in (c.judge, c.second_judge) if "trust" in weights else ():
        if judge.model:
            api_key(judge.model, judge.base_url, judge.key_variable)
    if c.function and c.function in weights:
        load_function(c.function, c.function_timeout)


def judge_config(c: ConfigDict, name: str = "reward.judge") -> JudgeConfig:
    if c.base_url:
        check_url(f"{name}.base_url", c.base_url)
    try:
        return JudgeConfig(**c)
    except TypeError as error:
        raise ConfigError(f"{name}: {error}") from error


def label_share(requests: Sequence[Request]) -> list[float]:
    """The share of the label tasks with a gold label that the response's labels get right."""
    shares = []
    for request in requests:
        gold = {t: request.sample.target(t) for t in request.labels}
        hits = [request.labels[t] == label for t, label in gold.items() if label]
        shares.append(sum(hits) / len(hits) if hits else 0.0)
    return shares


def make_pool(c: ConfigDict, workdir: pathlib.Path, replies: Sequence[str]) -> RewardPool:
    """The pool of every component with a weight.

    `replies` are those of the train split, for the lexical similarity's idf. Answers are kept in
    `workdir/reward_cache.sqlite`.
    """
    weights = reward_weights(c)
    limits = Limits(**c.limits)
    cache = Cache(workdir / CACHE_FILE)
    ledger = Ledger(cache)
    rewards: list[Reward] = []
    if "trust" in weights:
        judge = TrustJudge(judge_config(c.judge), limits, cache, ledger=ledger)
        if c.second_judge.model:
            second = TrustJudge(judge_config(c.second_judge), limits, cache, ledger=ledger)
            judge = TwoJudges(judge, second)
        rewards.append(judge)
    if "similarity" in weights:
        # Our own service costs nothing and answers one call after the other, so that two that were
        # given up say that it hangs.
        prices = ("price_in", "price_out", "spend_cap", "requests_per_minute", "tokens_per_minute")
        free = dataclasses.replace(
            limits,
            concurrency=1,
            breaker_failures=min(2, limits.breaker_failures),
            **dict.fromkeys(prices, 0.0),
        )
        rewards.append(BgeSimilarity(c.similarity_url, free, cache, c.similarity_both))
    if "lexical" in weights:
        rewards.append(LexicalSimilarity(replies))
    if "labels" in weights:
        rewards.append(FunctionReward("labels", label_share))
    if c.function and c.function in weights:
        rewards.append(load_function(c.function, c.function_timeout))
    return RewardPool(rewards, c.failure_limit)
