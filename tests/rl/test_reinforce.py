"""Tests GRPO and PPO stages on the tiny multimodal model, with simple and stub rewards."""

import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mm_jax.config.errors import ConfigError
from mm_jax.config.load import resolve
from mm_jax.config.stage import Reinforcement
from mm_jax.data.batch import Responses
from mm_jax.data.pipeline import BatchSchedule
from mm_jax.evaluation.report.figures import reward_curves
from mm_jax.generation.engine import Request, Result
from mm_jax.models.abstract import init_params
from mm_jax.models.decoder import Decoder
from mm_jax.models.decoder_config import DecoderConfig
from mm_jax.models.multimood import MultiMood
from mm_jax.models.sharding import put_batch
from mm_jax.rewards.base import Score
from mm_jax.rewards.pool import RewardFailureError
from mm_jax.rl import policy, reinforce, rollout
from mm_jax.rl.policy import Policy
from mm_jax.rl.reinforce import adapted_kl, mean_metrics
from mm_jax.rl.validation import score_of
from mm_jax.training.checkpoint import Checkpoints
from mm_jax.training.runner import NonFiniteError, Preempted
from tests.support.rewards import FaultyJudge
from tests.support.runs import letters, open_run, records, samples, train, two_batches


def fails(requests):
    return [None] * len(requests)


def some_fail(requests):
    return [None if i % 3 == 0 else v for i, v in enumerate(letters(requests))]


LETTERS = letters  # tests replace the name


def equal(requests):
    return [0.5] * len(requests)


def until_equal(requests):
    """Rewards like `letters`, which a test replaces."""
    return letters(requests)


@pytest.fixture
def rl(config):
    """Returns a config of one GRPO stage of a random language model alone."""
    config.stages = ("policy",)
    config.model.parts = ()
    with config.unlocked():
        config.stage.policy = config.stage.sft.copy_and_resolve_references()
    config.stage.policy.update(objective="grpo", steps=4, checkpoint_every=0, select_by="loss")
    config.stage.policy.update(batch_size=8, eval_examples=8, learning_rate=3e-3, label_weight=1.0)
    config.stage.policy.trainable = (
        "language_model",
        "mm_projector",
        "mm_projector_a",
        "mamba_compressor",
    )
    config.stage.policy.rl.update(group=4, max_new_tokens=12, truncated="keep", chunks=1)
    config.stage.policy.rl.length_window = (0, 0)
    config.reward.update(trust=0.0, similarity=0.0, function=f"{__name__}:letters")
    return config


def comparable(rows):
    return [
        {k: v for k, v in r.items() if not k.startswith("seconds/") and not k.endswith("_seconds")}
        for r in rows
    ]


def test_on_policy_ratio_is_one_and_everything_is_recorded(rl, tmp_path):
    rl.model.parts = ("vision", "audio", "compressor")
    rl.stage.policy.update(steps=2, batch_size=16)
    rl.stage.policy.rl.chunks = 2
    rl.profile_steps = (1, 2)
    train(rl, tmp_path)
    assert list((tmp_path / "profile" / "policy").rglob("*.xplane.pb"))
    for row in records(tmp_path):
        assert row["ratio"] == pytest.approx(1.0, abs=1e-6)
        assert row["sampler_gap_max"] < 1e-4  # sampler and trainer compute the same
        assert row["kl"] < 1e-2
        assert 0 <= row["zero_variance_groups"] <= 1
        for part in ("language_model", "mm_projector", "mm_projector_a", "mamba_compressor"):
            assert row[f"grad_norm/{part}"] > 0
        assert {f"seconds/{k}" for k in ("rollout", "reshard", "score", "update")} <= set(row)
    rows = samples(tmp_path)
    assert len(rows) == 2 * 16 * 4
    by_group = {}
    for row in rows:
        by_group.setdefault((row["step"], row["id"]), []).append(row)
    for group in by_group.values():
        rewards = np.array([r["reward"] for r in group])
        std = rewards.std(ddof=1)
        expected = (rewards - rewards.mean()) / (std + 1e-4) if std > 1e-6 else 0 * rewards
        np.testing.assert_allclose([r["advantage"] for r in group], expected, atol=1e-4)
    assert [r["step"] for r in records(tmp_path, "val_reward")] == [0, 2]


def test_normalised_rewards_are_judged_by_their_plain_means(rl, tmp_path):
    """Checks it because normalised rewards average 0 in a group, whatever the policy does."""
    rl.reward.combination = "normalise_then_sum"
    rl.stage.policy.steps = 1
    train(rl, tmp_path)
    rows = samples(tmp_path)
    assert abs(np.mean([r["reward"] for r in rows])) < 1e-6
    (name,) = rows[0]["rewards"]
    plain = np.mean([r["rewards"][name]["value"] for r in rows])
    (row,) = records(tmp_path)
    assert row["reward"] == pytest.approx(plain, abs=1e-5) != 0
    for row in records(tmp_path, "val_reward"):
        assert row["val_reward"] == pytest.approx(row[f"val_reward/{name}"], abs=1e-5) != 0


def test_metrics_of_a_step_are_those_of_its_tokens():
    each = [
        {"ratio": 1.5, "ratio_max": 2.0, "loss": 1.0, "grad_norm/a": 4.0, "used_tokens": 6},
        {"ratio": 0.5, "ratio_max": 3.0, "loss": 2.0, "grad_norm/a": 2.0, "used_tokens": 2},
    ]
    assert mean_metrics(each) == pytest.approx(
        {
            "updates": 2,
            "ratio": 1.25,
            "ratio_max": 3.0,
            "loss": 1.5,
            "grad_norm/a": 3.0,
            "used_tokens": 4,
        }
    )
    assert mean_metrics([]) == {"updates": 0}


def test_a_step_without_a_token_moves_nothing(rl, tmp_path, monkeypatch):
    """Makes all rewards of a group equal after step 2; momentum and decay must move nothing."""
    rollout_params, write, seen = Policy.rollout_params, reinforce.SampleRecord.write, []

    def look(self, state):
        seen.append(jax.device_get((state.trainable, state.opt_state)))
        return rollout_params(self, state)

    def end_lessons(self, step, *args):
        write(self, step, *args)
        if step == 1:
            monkeypatch.setattr(f"{__name__}.letters", equal)

    monkeypatch.setattr(Policy, "rollout_params", look)
    monkeypatch.setattr(reinforce.SampleRecord, "write", end_lessons)
    rl.reward.function = f"{__name__}:until_equal"
    rl.stage.policy.update(steps=4, weight_decay=0.1)
    train(rl, tmp_path)
    rows = records(tmp_path)
    assert [r["updates"] for r in rows] == [1, 1, 0, 0]
    assert rows[1]["update_norm"] > 0
    assert rows[2]["learning_rate"] == rows[3]["learning_rate"] != rows[1]["learning_rate"]
    _, *before, taught, third, fourth = seen
    assert len(before) == 2
    jax.tree.map(np.testing.assert_array_equal, taught, third)
    jax.tree.map(np.testing.assert_array_equal, taught, fourth)


def test_logged_metrics_are_those_of_all_steps(rl, tmp_path):
    rl.stage.policy.steps = 3
    train(rl, tmp_path / "each")
    rl.log_every = 3
    train(rl, tmp_path / "window")
    each, (window,) = records(tmp_path / "each"), records(tmp_path / "window")
    assert len(each) == 3
    for name in ("reward", "kl", "entropy", "response_words", "grad_norm"):
        assert window[name] == pytest.approx(np.mean([r[name] for r in each]), rel=1e-5)
    assert window["ratio_max"] == max(r["ratio_max"] for r in each)
    assert window["learning_rate"] == each[-1]["learning_rate"]


def test_an_own_critic_is_trained_in_float32():
    """Checks it next to a frozen bfloat16 policy; bfloat16 cannot hold the critic's small steps."""
    config = DecoderConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=1)  # fmt: skip
    lm = Decoder(config, rngs=nnx.Rngs(0))
    state = nnx.state(lm)
    nnx.update(lm, jax.tree.map(lambda a: a.astype(jnp.bfloat16), state))
    model = nnx.Module()
    model.language_model = lm
    policy.add_critic(model, nnx.Rngs(1), "own")
    for path, variable in nnx.to_flat_state(nnx.state(model.value_model)):
        assert variable.dtype == jnp.float32, path
    kernel = lambda m: m.layers.mlp.down_proj.kernel.get_value()  # noqa: E731
    np.testing.assert_array_equal(kernel(model.value_model), kernel(lm).astype(jnp.float32))


def test_failed_prompts_make_no_evaluation_better():
    first = [0.9, 0.1, None]
    assert score_of(first, None) == pytest.approx(0.5)
    assert score_of([0.9, None, 1.0], first) == pytest.approx(0.5)  # the hard one failed
    assert score_of([0.9, 0.3, None], first) == pytest.approx(0.6)
    assert score_of([None, 0.4], [None, None]) == pytest.approx(0.4)


def test_the_adaptive_kl_stays_positive():
    rl = Reinforcement(kl_target=0.1, kl_horizon=5.0)
    assert adapted_kl(0.05, 0.0, rl, 32) == pytest.approx(0.04)
    assert adapted_kl(0.05, 9.0, rl, 32) == pytest.approx(0.06)
    rl = Reinforcement(kl_target=0.1, kl_horizon=320.0)
    assert adapted_kl(0.05, 9.0, rl, 32) == pytest.approx(0.05 * 1.02)


@pytest.mark.parametrize("objective", ["grpo", "ppo"])
def test_training_resumes_bitwise(rl, tmp_path, monkeypatch, objective):
    rl.stage.policy.objective = objective
    rl.stage.policy.rl.update(inner_epochs=2, critic="own")
    rl.stage.policy.rl.kl_target = 0.01 if objective == "ppo" else 0.0
    train(rl, tmp_path / "whole")
    original = reinforce.SampleRecord.write

    def write(self, step, *args):
        original(self, step, *args)
        if step == 1:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(reinforce.SampleRecord, "write", write)
        with pytest.raises(Preempted):
            train(rl, tmp_path / "parts")
    train(rl, tmp_path / "parts", resume=True)
    whole, parts = (records(tmp_path / n) for n in ("whole", "parts"))
    assert comparable(parts) == comparable(whole)
    assert len(whole) == 4
    assert whole[-1]["ratio"] != 1.0  # the second epoch is off policy
    assert (whole[-1]["kl_coef"] != whole[0]["kl_coef"]) == (objective == "ppo")
    drop = lambda rows: [{k: v for k, v in r.items() if k != "rewards"} for r in rows]  # noqa: E731
    assert drop(samples(tmp_path / "parts")) == drop(samples(tmp_path / "whole"))


@pytest.mark.parametrize("at", [3, 4])
def test_an_outage_loses_no_step(rl, tmp_path, monkeypatch, at):
    """Fails in step 3 (from 0) or in the last evaluation: trained steps are saved, and a resumed
    run ends like one without the outage."""
    rl.stage.policy.rl.inner_epochs = 2
    train(rl, tmp_path / "whole")
    write = reinforce.SampleRecord.write

    def outage(self, step, *args):
        write(self, step, *args)
        if step + 1 == at:
            monkeypatch.setattr(f"{__name__}.letters", fails)

    rl.reward.update(function=f"{__name__}:until_equal", failure_limit=0.3)
    with monkeypatch.context() as patch:
        patch.setattr(reinforce.SampleRecord, "write", outage)
        with pytest.raises(RewardFailureError, match=r"failed.*no value 3.*--resume|no value"):
            train(rl, tmp_path / "parts")
    assert Checkpoints(tmp_path / "parts" / "checkpoints" / "policy").steps() == [at]
    monkeypatch.setattr(f"{__name__}.letters", LETTERS)
    rl.reward.function_timeout = 900.0  # may change
    train(rl, tmp_path / "parts", resume=True)
    checkpoints = Checkpoints(tmp_path / "parts" / "checkpoints" / "policy")
    assert checkpoints.best_step() == 4
    assert (at == 4) == (checkpoints.late.keys() == {"4"})
    rename = lambda row: {  # noqa: E731
        k.replace("until_equal", "letters"): v for k, v in row.items() if k != "rewards"
    }
    whole, parts = ([rename(r) for r in samples(tmp_path / n)] for n in ("whole", "parts"))
    assert parts == whole
    last = [comparable(records(tmp_path / n, "val_reward"))[-1] for n in ("whole", "parts")]
    assert rename(last[1]) == rename(last[0])


@pytest.mark.parametrize(
    "settings",
    [
        dict(objective="grpo"),
        dict(objective="ppo", critic="shared"),
        dict(objective="ppo", critic="own", kl_in="loss", minibatches=1, inner_epochs=2),
    ],
    ids=["grpo", "ppo shared", "ppo own"],
)
def test_the_reward_rises(rl, tmp_path, settings):
    settings = dict(settings)
    rl.stage.policy.objective = settings.pop("objective")
    steps = 12 if rl.stage.policy.objective == "grpo" else 24
    rl.stage.policy.update(steps=steps, learning_rate=1e-2, text_only_prob=1.0, warmup=0.1)
    rl.stage.policy.rl.update(beta=0.01, **settings)
    train(rl, tmp_path)
    before, after = records(tmp_path, "val_reward")
    assert after["val_reward_low"] > before["val_reward_high"]
    gain = after["val_reward"] - before["val_reward"]
    assert after["val_gain"] == pytest.approx(gain)
    assert gain > after["val_gain_low"] > 0


def test_failed_rewards_are_masked_and_too_many_stop_the_run(rl, tmp_path):
    rl.stage.policy.update(steps=1)
    rl.reward.function = f"{__name__}:some_fail"
    train(rl, tmp_path / "some")
    rows = samples(tmp_path / "some")
    failed = [r for r in rows if not r["valid"]]
    assert failed
    assert len(failed) < len(rows)
    for row in failed:
        assert row["reward"] is None
        assert row["advantage"] == 0
        assert row["rewards"][rl.reward.function]["reason"] == "no value"
    assert records(tmp_path / "some")[0]["invalid_share"] == len(failed) / len(rows)
    rl.reward.function = f"{__name__}:fails"
    with pytest.raises((RewardFailureError, NonFiniteError), match=r"failed|valid reward"):
        train(rl, tmp_path / "all")


def test_training_ends_with_a_judge_that_often_fails(rl, tmp_path, monkeypatch):
    """Trains with 429, 500, garbage, partial JSON and closed connections: failures are masked."""
    parse = rollout.parse_answer  # all of what the random model says is its reply
    monkeypatch.setattr(rollout, "parse_answer", lambda text, space: parse(
        f"Therapist's response: I hear you, {text}", space))  # fmt: skip
    rl.stage.policy.update(steps=3)
    rl.reward.update(trust=1.0, function="")
    rl.reward.limits.update(attempts=2, timeout=1.0, backoff=0.01, backoff_max=0.05)
    rl.reward.limits.breaker_failures = 10_000
    with FaultyJudge(0.5) as judge:
        rl.reward.judge.update(model="stub-rules", base_url=judge.url)
        train(rl, tmp_path)
        injected = sum(judge.injected.values())
    rows = samples(tmp_path)
    failed = [r for r in rows if not r["valid"]]
    assert injected > len(failed) > 0
    assert {r["rewards"]["trust"]["reason"] for r in failed} <= set(judge.injected)
    for row in rows:
        assert (row["reward"] is None) == (not row["rewards"]["trust"]["valid"])
        assert row["reward"] is None or row["reward"] > 0
    shares = [r["invalid_share"] for r in records(tmp_path)]
    assert np.mean(shares) == pytest.approx(len(failed) / len(rows))


def test_the_prompt_is_computed_once_a_group(rl, tmp_path, monkeypatch):
    """Checks that the towers and the prompt's embeddings see no more rows than prompts."""
    seen = {"frames": [], "embed": []}
    frames, embed = MultiMood.frame_features, MultiMood.embed

    def count_frames(self, x):
        seen["frames"].append(x.shape[0])
        return frames(self, x)

    def count_embed(self, batch, features=None, memory=None):
        seen["embed"].append((batch.tokens.shape[0], features is not None))
        return embed(self, batch, features, memory)

    monkeypatch.setattr(MultiMood, "frame_features", count_frames)
    monkeypatch.setattr(MultiMood, "embed", count_embed)
    rl.model.parts = ("vision", "audio", "compressor")
    rl.stage.policy.update(steps=1)
    train(rl, tmp_path)
    assert set(seen["frames"]) == {8}
    assert {rows for rows, _ in seen["embed"]} == {8}
    assert all(given for _, given in seen["embed"])  # the towers' outputs are reused


def test_dropping_a_modality_changes_rollout_and_update(rl, tmp_path):
    """Checks that sampling and scoring both depend on the sound and the face."""
    rl.model.parts = ("vision", "audio", "compressor")
    session = open_run(rl, tmp_path)
    params = init_params(session.create, session.abstract, 0)
    samples_, batches = two_batches(rl, session)
    stage = session.config.stage["policy"]
    sample = policy.Policy(session.abstract, stage, session.tokenizer, jnp.float32, 0, 1)
    weights = sample.to_rollout(params)
    scorer = policy.jit_scorer(session.abstract, stage, 1)
    seeds = rollout.seeds_of(samples_, stage.rl.group)
    nothing = nnx.State({})
    found = {}
    for name, batch in batches.items():
        features, at = sample.read(weights, put_batch(batch, session.abstract.mesh))
        blocks = [(at, [Request(i, own) for i, own in enumerate(seeds)])]
        told = sample.engine.finished(weights, blocks)
        results = sorted((p.name, p.result) for p in told)
        out = Result(*map(np.stack, zip(*(result for _, result in results), strict=True)))
        if name == "av":
            tokens, mask = out.tokens, np.arange(out.tokens.shape[2]) < out.lengths[..., None]
        with jax.set_mesh(session.abstract.mesh):
            scored = scorer(params, nothing, Responses(batch, features, tokens, mask))
        found[name] = (out.logps[..., 0], np.asarray(scored.logps)[..., 0])
    for name in ("a", "v", "text"):
        assert np.abs(found[name][1] - found["av"][1]).max() > 1e-4
        assert np.abs(found[name][0] - found["av"][0]).max() > 1e-6


def test_bad_policy_configs_are_refused(rl, tmp_path):
    for change, message in (
        (dict(group=1), "expected at least 2"),
        (dict(reduction="mean"), r"reduction: expected one of"),
        (dict(temperature=1e-3), r"temperature: expected at least 0\.01"),
        (dict(kl_target=0.1), "needs objective=ppo"),
        (dict(length_window=(5, 2)), "length_window: expected"),
        (dict(kl_target=0.1, kl_in="loss"), "kl_in=reward"),
        (dict(kl_horizon=0.0), r"kl_horizon: expected above 0"),
        (dict(std_ddof=8), "std_ddof: expected less than group"),
        (dict(clip_max=0.5), "clip_max: expected 0 or more than"),
        (dict(gamma=-1.0), r"gamma: expected 0 to 1"),
        (dict(value_clip=-0.2), "value_clip: expected at least 0"),
        (dict(beta=float("inf")), "rl.beta: expected finite numbers, got inf"),
    ):
        c = rl.copy_and_resolve_references()
        c.stage.policy.rl.update(change)
        with pytest.raises(ConfigError, match=message):
            resolve(c)
    for change, message in (
        (dict(trust=-1.0), "reward.trust: expected at least 0"),
        (dict(similarity=1.0, similarity_kind="bge", similarity_url="localhost:1"), "http://"),
        (dict(function_timeout=0.0), r"function_timeout: expected above 0"),
        (dict(judge=dict(base_url="http://127.0.0.1:port/v1")), r"judge\.base_url: expected http"),
        (dict(trust=1.0, judge=dict(model="")), r"judge\.model: expected a name"),
    ):
        c = rl.copy_and_resolve_references()
        c.reward.update(change)
        with pytest.raises(ConfigError, match=message):
            resolve(c)
    for change, message in (
        (dict(label_weight=4.0), r"label_weight: expected 1\.0 for grpo, got 4\.0"),
        (dict(with_response=False), "with_response: expected True for grpo"),
        (dict(balanced_tasks=("client_emotion",)), "balanced_tasks: expected"),
        (dict(clip_norm=0.0), r"clip_norm: expected above 0"),
    ):
        c = rl.copy_and_resolve_references()
        c.stage.policy.update(change)
        with pytest.raises(ConfigError, match=message):
            resolve(c)
    c = rl.copy_and_resolve_references()
    c.stages, c.stage.policy.rl.chunks = ("sft", "policy"), 3
    with pytest.raises(ConfigError, match=r"rl\.chunks 3"):  # before sft is trained
        train(c, tmp_path)
    c = rl.copy_and_resolve_references()
    c.stage.policy.objective, c.stage.policy.rl.group = "ppo", 1
    resolve(c)
    c.reward.combination = "normalise_then_sum"
    with pytest.raises(ConfigError, match=r"group above 1, got 1"):
        resolve(c)
    c = rl.copy_and_resolve_references()
    c.stage.policy.lora.update(rank=4, dropout=0.1)
    with pytest.raises(ConfigError, match=r"lora\.dropout: expected 0 for grpo, got 0\.1"):
        resolve(c)
    rl.reward.function = ""
    with pytest.raises(ConfigError, match="no component has a weight"):
        resolve(rl)
    rl.reward.function = "math:pi"
    with pytest.raises(ConfigError, match="'math:pi': expected a function, got float"):
        train(rl, tmp_path)
    rl.reward.function = "nowhere:f"
    with pytest.raises(ConfigError, match="expected module:function"):
        train(rl, tmp_path)
    assert not any(tmp_path.iterdir())  # before anything was trained or written


def test_scores_keep_the_contract():
    with pytest.raises(ValueError, match="valid is True"):
        Score(float("nan"))
    with pytest.raises(ValueError, match="needs a reason"):
        Score(float("nan"), valid=False)


@pytest.mark.parametrize("base", ["none", "nf4"])
def test_the_reference_stays_and_the_policy_moves(rl, tmp_path, base):
    rl.stage.policy.update(steps=3)
    rl.stage.policy.lora.update(rank=4, alpha=8.0, base=base)
    rl.model.llm.update(hidden_size=64, intermediate_size=64)  # nf4 has blocks of 64 inputs
    train(rl, tmp_path)
    rows = records(tmp_path)
    assert rows[0]["kl"] < 1e-6  # adapters start at zero: the base is the reference
    assert rows[-1]["kl"] > 1e-6
    assert Checkpoints(tmp_path / "checkpoints" / "policy").best_step() in (3,)


def test_a_step_of_known_shapes_compiles_nothing(rl, tmp_path, monkeypatch):
    """Runs batches of the same shapes: whatever a step compiles, it compiles once."""
    compiled, at_step = [], []

    def listen(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    original = reinforce.SampleRecord.write

    def write(self, *args):
        original(self, *args)
        at_step.append(len(compiled))

    monkeypatch.setattr(reinforce.SampleRecord, "write", write)
    batch_of = BatchSchedule.__getitem__
    monkeypatch.setattr(BatchSchedule, "__getitem__", lambda plan, step: batch_of(plan, 0))
    rl.stage.policy.rl.inner_epochs = 2
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        train(rl, tmp_path)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert at_step[0] > 0
    assert at_step[3] == at_step[2] == at_step[1]


def test_reward_curves_take_steps_without_a_token():
    whole = {"stage": "grpo", "reward": 0.5, "entropy": 1.0, "ratio": 1.0, "clip_low": 0.0}
    empty = {"stage": "grpo", "invalid_share": 1.0, "reward/f_failed": 1.0}
    whole.update(dict.fromkeys(empty.keys() - {"stage"}, 0.0))
    for steps in ([empty, whole], [whole, empty], [empty, empty]):
        (html,) = reward_curves([{**row, "step": n} for n, row in enumerate(steps)])
        assert "<img alt=" in html
