"""The fields of rewards and of the services they call (see schema.py)."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from mm_jax.config.errors import check_url, require
from mm_jax.config.section import Section, field


class Limits(Section):
    """Limits on calls to a service, and what happens when they fail."""

    attempts: int = field(5, "Attempts per call.", ge=1)
    timeout: float = field(60.0, "Seconds per attempt.", gt=0)
    backoff: float = field(
        0.5, "Seconds before the second attempt; doubles, with full jitter.", ge=0
    )
    backoff_max: float = field(30.0, "Longest wait in seconds.", ge=0)
    concurrency: int = field(16, "Calls at a time.", ge=1)
    requests_per_minute: float = field(0.0, "Most calls per minute; 0: no limit.", ge=0)
    tokens_per_minute: float = field(0.0, "Most tokens per minute; 0: no limit.", ge=0)
    price_in: float = field(0.0, "Price of a million prompt tokens.", ge=0)
    price_out: float = field(0.0, "Price of a million answer tokens.", ge=0)
    spend_cap: float = field(0.0, "The run stops at this cost, resumed or not; 0: no cap.", ge=0)
    breaker_failures: int = field(20, "Failed calls in a row that open the circuit breaker.", ge=1)
    breaker_seconds: float = field(30.0, "Seconds until a call tries again.", ge=0)
    breaker_waits: bool = field(
        False, "While the breaker is open calls wait instead of failing at once."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        require(
            self.spend_cap == 0 or self.price_in + self.price_out > 0,
            f"spend_cap: {self.spend_cap:g} needs price_in or price_out: without a price nothing "
            "is ever spent",
        )
        return self


class Judge(Section):
    """A language model that rates replies, at an OpenAI-compatible endpoint."""

    model: str = field("gpt-4o-2024-08-06", "Pinned model id.")
    base_url: str = field("", "Endpoint; empty: OpenAI's.")
    key_variable: str = field("OPENAI_API_KEY", "Environment variable of the key.")
    unit: Literal["sentence", "response"] = field(
        "sentence", "Unit that is rated; the ratings of sentences are averaged (paper)."
    )
    context: bool = field(True, "False: the judge sees the reply only (released code).")
    parsing: Literal["schema", "released"] = field(
        "schema", "released: the published parser, for comparison."
    )
    history_turns: int = field(6, "Utterances of history that the judge sees.", ge=0)
    max_units: int = field(12, "A reply with more units scores 0 without a call.", ge=1)
    max_characters: int = field(4000, "A longer reply scores 0 without a call.", ge=1)
    temperature: float = field(0.0, "Sampling temperature of the judge.", ge=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.base_url:
            check_url("base_url", self.base_url)
        return self


class Reward(Section):
    """Rewards of reinforcement stages: weighted components in [0, 1] each (paper eq. 7)."""

    trust: float = field(1.0, "Weight of the judge's ratings.", ge=0)
    similarity: float = field(1.0, "Weight of similarity to the reference reply.", ge=0)
    labels: float = field(0.0, "Weight of the share of right labels (not in the paper).", ge=0)
    reward_model: float = field(
        0.0, "Weight of the reward model of the last preference stage.", ge=0
    )
    function: str = field("", "Your own reward, module:function (rewards/base.py).")
    function_weight: float = field(1.0, "Weight of the function.", ge=0)
    function_timeout: float = field(
        600.0, "Seconds per call of the function, after which its scores count as failed.", gt=0
    )
    combination: Literal["sum", "normalise_then_sum"] = field(
        "sum", "Weighted mean, or each component standardised in its group first."
    )
    safety_veto: bool = field(
        True, "Replies that the screen of rewards/combine.py flags get the lowest reward."
    )
    failure_limit: float = field(
        0.5, "The run stops if this share of the last 100 scores failed.", gt=0, le=1
    )
    similarity_kind: Literal["bge", "lexical"] = field(
        "bge", "bge: tools/serve_reward.py; lexical: needs no weights."
    )
    similarity_url: str = field("http://127.0.0.1:8100", "Address of the bge service.")
    similarity_both: bool = field(False, "Also scaled by the response's similarity to itself.")
    judge: Judge = Judge()
    second_judge: Judge = Judge(model="")
    limits: Limits = Limits()

    @property
    def weights(self) -> dict[str, float]:
        """Maps the components with a weight to it."""
        named = {
            "trust": self.trust,
            "lexical" if self.similarity_kind == "lexical" else "similarity": self.similarity,
            "labels": self.labels,
            "reward_model": self.reward_model,
            self.function or "function": self.function_weight if self.function else 0.0,
        }
        return {name: weight for name, weight in named.items() if weight > 0}

    @property
    def judges(self) -> list[Judge]:
        """Lists the judges whose ratings are part of the reward."""
        named = [j for j in (self.judge, self.second_judge) if j.model]
        return named if "trust" in self.weights else []

    def check_used(self) -> None:
        """Raises ConfigError if the rewards cannot be computed as configured."""
        require(
            bool(self.weights),
            "reward: no component has a weight: set reward.trust, similarity, labels, "
            "reward_model or function",
        )
        trusts = "trust" in self.weights
        require(not trusts or bool(self.judge.model), "reward.judge.model: expected a name, got ''")
        if "similarity" in self.weights:
            check_url("reward.similarity_url", self.similarity_url)
