"""Tests judges of replies: blind and in random order, swapped pairs, length control, families."""

import asyncio
import json

import numpy as np
import pytest

from mm_jax.config.reward import Judge, Limits
from mm_jax.data.records import Sample
from mm_jax.evaluation import judges
from mm_jax.rewards.calls import Cache, CallError
from mm_jax.rewards.judge import DIMENSIONS, TrustJudge
from mm_jax.rewards.stub import StubJudge

SAMPLES = [
    Sample(id=str(i), dialogue_id="d", client_text=f"I lost my {x}.")
    for i, x in enumerate(("cat", "job", "way", "keys"))
]
KIND = "I am sorry that you lost it, you must miss it."
CURT = "No."


def judge_at(url, limits=Limits()):
    return TrustJudge(Judge(model="stub-rules", base_url=url, unit="response"), limits)


class Recorder(StubJudge):
    """Records the requests it gets."""

    def __init__(self):
        super().__init__()
        self.messages = []

    def answer(self, messages):
        self.messages.append(messages)
        return super().answer(messages)


def test_ratings_are_blind_in_random_order_and_repeated():
    systems = {"secret-name-a": [KIND] * 4, "secret-name-b": [CURT] * 3 + [""]}
    with Recorder() as stub:
        judge = judge_at(stub.url, Limits(concurrency=1))  # asked in the order of the work
        got, notes = asyncio.run(judges.rate_all({"stub": judge}, SAMPLES, systems, repeats=3))
        asked = [m[-1]["content"] for m in stub.messages]
    assert not any("secret-name" in text for text in asked)
    assert len(asked) == 3 * 7  # every repeat is a call; an empty reply is not asked
    kind = [KIND in text for text in asked]
    assert kind not in (sorted(kind), sorted(kind, reverse=True))  # not one system after the other
    table = got["secret-name-a"]["stub"]
    assert table.shape == (4, 3, 7)
    assert (got["secret-name-b"]["stub"][3] == 1).all()
    assert notes == {"secret-name-a": {"stub": {}}, "secret-name-b": {"stub": {"empty": 3}}}
    summary = judges.rating_summary(table)
    assert summary["Empathy"]["mean"] == table[0, 0, list(DIMENSIONS).index("Empathy")]
    assert summary["overall"]["repeat_sd"] == 0
    assert summary["overall"]["mean"] == pytest.approx(table.mean())


def test_rating_summary_by_hand():
    ratings = np.full((2, 2, 7), 5.0)
    ratings[0, 1] = 7
    ratings[1] = np.nan  # a failed reply is left out, not 0
    got = judges.rating_summary(ratings)["Safety"]
    assert (got["n"], got["mean"]) == (1, 6)
    assert got["repeat_sd"] == pytest.approx(np.sqrt(2))
    none = judges.rating_summary(np.full((2, 2, 7), np.nan))["Safety"]
    assert (none["n"], none["mean"]) == (0, None)


class Grumbles(StubJudge):
    """Refuses with a message that repeats the key, then answers without counting tokens."""

    def respond(self, handler, body):
        if self.asked == 1:
            said = {"error": {"message": "no credit for sk-secret-123, ask sales"}}
            self.write(handler, 429, json.dumps(said).encode())
        else:
            super().respond(handler, body)

    def write(self, handler, status, body):
        answer = json.loads(body)
        answer.pop("usage", None)
        super().write(handler, status, json.dumps(answer).encode())


def test_complaints_are_kept_without_keys_and_uncounted_answers_cost_an_estimate():
    limits = Limits(attempts=2, backoff=0.01, price_in=1.0)
    with Grumbles() as stub:
        judge = judge_at(stub.url, limits)
        asyncio.run(judges.rate_all({"x": judge}, SAMPLES[:1], {"a": [KIND]}, 1))
    assert "no credit for ..." in judge.chat.complaints["HTTP 429"]
    assert "secret" not in str(judge.chat.complaints)
    assert judge.chat.calls.tokens_in > 100
    assert judge.chat.calls.spend > 0


def test_the_cache_knows_the_real_endpoint(monkeypatch):
    """Checks the cache key where the client takes its base URL from the environment."""
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    cache = Cache(None)
    for _ in range(2):  # two servers, one cache
        with StubJudge() as stub:
            monkeypatch.setenv("OPENAI_BASE_URL", stub.url)
            judge = TrustJudge(Judge(model="stub-rules"), Limits(), cache)
            asyncio.run(judges.rate_all({"x": judge}, SAMPLES[:1], {"a": [CURT]}, 1))
            asyncio.run(judges.compare_pair(judge, SAMPLES[0], KIND, CURT))
            assert stub.asked == 2


class AlwaysFirst(StubJudge):
    def answer(self, messages):
        return json.dumps({"better": "first"})


def test_a_judge_of_the_first_place_is_torn():
    systems = {"a": [KIND] * 4, "b": [CURT] * 4}
    with AlwaysFirst() as stub:
        (pair,) = asyncio.run(judges.compare_all({"x": judge_at(stub.url)}, SAMPLES, systems))
    assert (pair["torn"], pair["ties"], pair["win_rate"]) == (4, 4, 50)
    with StubJudge() as stub:
        (pair,) = asyncio.run(judges.compare_all({"x": judge_at(stub.url)}, SAMPLES, systems))
    assert (pair["wins"], pair["losses"], pair["n"]) == (4, 0, 4)
    assert pair["interval"][0] == pytest.approx(51.0, abs=0.1)  # Wilson, 4 of 4


class Fails(StubJudge):
    def respond(self, handler, body):
        self.write(handler, 400, b"{}")


def test_failures_are_counted_not_ties():
    systems = {"a": [KIND] * 4, "b": [CURT] * 4}
    with Fails() as stub:
        judge = judge_at(stub.url, Limits(attempts=1, breaker_failures=100))
        (pair,) = asyncio.run(judges.compare_all({"x": judge}, SAMPLES, systems))
        ratings, notes = asyncio.run(judges.rate_all({"x": judge}, SAMPLES, systems, 1))
    assert (pair["n"], pair["failed"], pair["ties"], pair["win_rate"]) == (0, 4, 0, None)
    assert np.isnan(ratings["a"]["x"]).all()
    assert notes["a"]["x"] == {"HTTP 400": 4}
    assert judge.chat.calls.lost == {"HTTP 400": 8 + 8}
    # Another judge's ratings still have a median of their own.
    good = np.full((4, 1, 7), 6.0)
    assert judges.rating_summary(judges.median_of([ratings["a"]["x"], good]))["Safety"]["mean"] == 6
    summary = judges.rating_summary(judges.median_of([ratings["a"]["x"]]))
    assert json.loads(json.dumps(summary, allow_nan=False))["overall"]["mean"] is None


def test_length_control_takes_away_what_length_explains():
    rng = np.random.default_rng(0)
    longer = rng.normal(5, 10, 4000)
    assert judges.length_controlled((longer > 3).astype(float), np.abs(longer) + 1) is None
    won = (rng.random(4000) < 1 / (1 + np.exp(-longer / 5))).astype(float)  # length alone decides
    assert won.mean() > 0.6
    assert judges.length_controlled(won, longer) == pytest.approx(50, abs=3)
    better = (rng.random(4000) < 0.7).astype(float)  # length does not matter
    assert judges.length_controlled(better, longer) == pytest.approx(70, abs=3)
    assert judges.length_controlled(np.ones(5), np.arange(5.0)) is None
    assert judges.length_controlled(np.full(6, 0.5), np.arange(6.0)) == pytest.approx(50)


@pytest.mark.parametrize(
    "text", ["", "first", '{"better": "third"}', '{"better": "first", "x": 1}', '{"a": 1} {"b": 2}']
)
def test_verdicts_are_not_guessed(text):
    with pytest.raises(CallError):
        judges.parse_verdict(text)


def test_families_are_named_and_equal_ones_warned_of():
    assert judges.family("gpt-4o-2024-08-06") == judges.family("o3-mini") == "OpenAI"
    assert judges.family("meta-llama/Llama-3-70B") == "Meta"
    assert judges.family("ft:gpt-4o:mine") == "OpenAI"
    assert judges.family("grok-3") == judges.family("grok-2") == "grok"
    (warning,) = judges.family_warnings(["gpt-5", "claude-9"], ["gpt-4o"])
    assert "gpt-5 is of the family of the reward's judge" in warning
    assert judges.family_warnings(["claude-9"], ["gpt-4o"]) == []
    assert "is a stub" in judges.family_warnings(["stub-rules"], [])[0]
