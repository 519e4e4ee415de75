"""Tests the reward model: pairs, training, resume, and GRPO with it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mm_jax.__main__ import main as command_line
from mm_jax.config.errors import ConfigError
from mm_jax.config.load import resolve
from mm_jax.data.answers import parse_answer
from mm_jax.data.batch import Responses
from mm_jax.models.abstract import adapt_params, init_params
from mm_jax.rewards.similarity import rouge_l
from mm_jax.rl import reward_model
from mm_jax.rl.policy import add_critic
from mm_jax.training.checkpoint import Checkpoints
from tests.support.runs import open_run, records, samples, train, two_batches


@pytest.fixture
def learned(config):
    """Returns a config of a preference stage on random weights, and GRPO with its reward model."""
    config.stages = ("judge", "policy")
    config.model.parts = ("compressor",)
    with config.unlocked():
        for name, objective in (("judge", "preference"), ("policy", "grpo")):
            stage = config.stage.sft.copy_and_resolve_references()
            stage.update(
                objective=objective, select_by="loss", text_only_prob=1.0, label_weight=1.0
            )
            stage.update(batch_size=8, steps=4, learning_rate=3e-3, eval_examples=16)
            stage.rl.update(group=4, max_new_tokens=12, truncated="keep", chunks=1)
            stage.rl.length_window = (0, 0)
            config.stage[name] = stage
    config.reward.update(trust=0.0, similarity=0.0, reward_model=1.0)
    return config


def test_pairs_are_learnt_and_reward_the_policy(learned, tmp_path, caplog):
    learned.stage.judge.steps = 12
    with caplog.at_level("INFO"):
        train(learned, tmp_path)
    lines = (tmp_path / "preferences_judge.jsonl").read_text().splitlines()
    pairs = [json.loads(line) for line in lines]
    assert {p["split"] for p in pairs} == {"train", "val"}
    count = sum(p["split"] == "train" for p in pairs)
    told = [m for m in caplog.messages if m.startswith("judge: ") and " examples, " in m]
    assert told == [f"judge: {count} examples, 12 steps of 8"]
    rows = records(tmp_path, "val_pair_accuracy")
    assert rows[-1]["stage"] == "judge"
    # Easy: reference answers against a random model's noise.
    assert rows[-1]["val_pair_accuracy"] > 0.9
    assert rows[-1]["val_loss"] < 0.5 < np.log(2)
    policy = [r for r in records(tmp_path) if r["stage"] == "policy"]
    assert len(policy) == 4
    for row in samples(tmp_path):
        score = row["rewards"]["reward_model"]
        assert score["value"] == pytest.approx(1 / (1 + np.exp(-score["raw"])), abs=1e-5)
        assert row["reward"] == pytest.approx(score["value"], abs=1e-6)
    assert command_line(["predict", f"--checkpoint={tmp_path}", "--stage=judge"]) == 2


def test_the_worst_of_the_samples_is_rejected(learned, tmp_path, monkeypatch):
    seen = []
    original = reward_model.rouge_l

    def watch(gold, reply):
        seen.append((gold, original(gold, reply)))
        return seen[-1][1]

    monkeypatch.setattr(reward_model, "rouge_l", watch)
    # Every sampled answer is a whole one whose reply is its own text.
    monkeypatch.setattr(
        reward_model,
        "parse_answer",
        lambda text, space: parse_answer(f"Therapist's response: {text} it is", space),
    )
    learned.stages = ("judge",)
    learned.stage.judge.steps = 1
    train(learned, tmp_path)
    by_reference = {}
    for gold, score in seen:
        by_reference.setdefault(gold, []).append(score)
    rows = [json.loads(x) for x in (tmp_path / "preferences_judge.jsonl").read_text().splitlines()]
    assert len(rows) == len(seen) / 4
    for row in rows:
        # The ROUGE-L of the reply that was kept is the lowest of some group of four.
        groups = [s[i : i + 4] for s in by_reference.values() for i in range(0, len(s), 4)]
        assert any(abs(100 * min(g) - row["rouge_l"]) < 0.01 for g in groups)
    assert rouge_l("the same", "the same") == 1.0


def test_a_preference_stage_resumes_bitwise(learned, tmp_path, monkeypatch):
    learned.stages = ("judge",)
    learned.stage.judge.checkpoint_every = 2
    train(learned, tmp_path / "whole")
    original = Checkpoints.save

    def stop(self, state, *args, **kwargs):
        original(self, state, *args, **kwargs)
        self.wait()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            train(learned, tmp_path / "parts")
    monkeypatch.setattr(reward_model, "sample_pairs", None)  # sampled once, then read
    train(learned, tmp_path / "parts", resume=True)
    losses = [[r["loss"] for r in records(tmp_path / n, "loss")] for n in ("whole", "parts")]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4


def test_values_are_read_at_the_last_token(learned, tmp_path):
    """Checks that padding and the other response do not matter, and that the last token does."""
    session = open_run(learned, tmp_path)
    abstract = reward_model.with_head(session.abstract)
    plain = init_params(session.create, session.abstract, 0)
    params = adapt_params(session.abstract, abstract, add_critic, plain, 0, False)
    model = nnx.merge(abstract.graph, params)
    width = model.language_model.config.hidden_size
    model.value_head.kernel.set_value(jax.random.normal(jax.random.key(1), (width, 1)))

    batch = two_batches(learned, session)[1]["text"]
    tokens = jax.random.randint(jax.random.key(0), (8, 2, 16), 5, 300)
    lengths = jnp.array([[7, 12]] * 8)
    mask = jnp.arange(16) < lengths[..., None]
    of = lambda t, m: np.asarray(reward_model.reward_values(model, Responses(batch, None, t, m)))  # noqa: E731
    first = of(tokens, mask)
    np.testing.assert_allclose(of(tokens[:, :1], mask[:, :1]), first[:, :1], atol=1e-5)
    np.testing.assert_allclose(of(tokens.at[:, 0, 7:].set(3), mask), first, atol=1e-5)
    changed = of(tokens.at[:, 0, 6].set(3), mask)
    assert np.abs(changed - first)[:, 0].min() > 1e-4
    np.testing.assert_allclose(changed[:, 1], first[:, 1], atol=1e-5)


def test_bad_configs_are_refused(learned):
    learned.stages = ("policy",)
    with pytest.raises(ConfigError, match="needs a stage with objective=preference before"):
        resolve(learned)
    learned.stages = ("judge", "policy")
    learned.stage.policy.init_from = "judge"
    with pytest.raises(ConfigError, match="init_from"):
        resolve(learned)
    learned.stage.policy.init_from = ""
    assert resolve(learned).stage_before("policy") == ""
    learned.stage.judge.rl.group = 1
    with pytest.raises(ConfigError, match="expected at least 2"):
        resolve(learned)
