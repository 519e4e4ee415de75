"""Tests losses and advantages against TRL's values (tests/golden/losses) and short numpy code."""

import json
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mm_jax.config.stage import Reduction
from mm_jax.rewards.combine import normalised_components
from mm_jax.rl import advantages as adv
from mm_jax.rl import losses
from tests.conftest import GOLDEN

DATA = dict(np.load(GOLDEN / "losses" / "io.npz"))
CONFIG = json.loads((GOLDEN / "losses" / "config.json").read_text())
CLOSE = dict(rtol=1e-5, atol=1e-6)


def of(group):
    prefix = group + "/"
    return {k.removeprefix(prefix): jnp.asarray(v) for k, v in DATA.items() if k.startswith(prefix)}


GRPO_CASES = sorted(
    k.removeprefix("grpo/").removesuffix("_loss")
    for k in DATA
    if k.startswith("grpo/") and k.endswith("_loss") and k != "grpo/per_token_loss"
)


@pytest.mark.parametrize("case", GRPO_CASES)
def test_policy_loss_and_gradient_are_trl_s(case):
    d, c = of("grpo"), CONFIG["grpo"]
    reduction = next(r for r in sorted(get_args(Reduction), key=len)[::-1] if case.startswith(r))
    mask = d["mask"].astype(bool)
    # TRL divides the mean of a micro-batch by the accumulation steps; dapo's window is the batch.
    steps = 4 if "accum4" in case and reduction != "dapo" else 1
    weights = losses.token_weights(mask, reduction, c["max_completion_length"]) / steps

    def loss(logps):
        old = jax.lax.stop_gradient(logps) if "onpolicy" in case else d["old_logps"]
        return losses.policy_loss(
            logps,
            old,
            d["advantages"],
            mask,
            weights,
            clip_low=c["epsilon"],
            clip_high=c["epsilon_high"],
            clip_max=1.2 if "delta1.2" in case else None,
            ref_logps=None if "beta0" in case else d["ref_logps"],
            beta=c["beta"],
            level="sequence" if "sequence" in case else "token",
        )

    (value, metrics), grad = jax.value_and_grad(loss, has_aux=True)(d["logps"])
    np.testing.assert_allclose(value, d[f"{case}_loss"], **CLOSE)
    if f"{case}_grad" in d:
        np.testing.assert_allclose(grad, d[f"{case}_grad"], **CLOSE)
    if case == "grpo_beta_old":
        np.testing.assert_allclose(metrics["kl"], d["metric_kl"], **CLOSE)
        np.testing.assert_allclose(metrics["clip_low"], d["metric_clip_ratio_low_mean"], **CLOSE)
        np.testing.assert_allclose(metrics["clip_high"], d["metric_clip_ratio_high_mean"], **CLOSE)


@pytest.mark.parametrize("reduction", get_args(Reduction))
def test_reductions_against_numpy_and_over_micro_batches(reduction):
    rng = np.random.default_rng(0)
    lengths = [3, 0, 5, 2, 1, 4]
    mask = np.arange(5) < np.array(lengths)[:, None]
    x = rng.normal(size=mask.shape).astype(np.float32)
    tokens = [x[i, :n] for i, n in enumerate(lengths) if n]
    micro = [np.concatenate([x[i, : lengths[i]] for i in range(m, 6, 2)]) for m in (0, 1)]
    expected = {
        "grpo": np.mean([t.mean() for t in tokens]),
        "dr_grpo": sum(t.sum() for t in tokens) / (5 * 7),
        "dapo": np.concatenate(tokens).mean(),
        "bnpo": np.mean([m.mean() for m in micro]),
    }[reduction]
    weights = losses.token_weights(jnp.asarray(mask), reduction, 7, micro_batches=2)
    np.testing.assert_allclose(np.sum(weights * x), expected, rtol=1e-5)


def test_padding_never_reaches_loss_or_gradient():
    mask = jnp.array([[True, True, False]])
    weights = losses.token_weights(mask, "grpo", 3)
    logps = jnp.array([[-1.0, -2.0, -jnp.inf]])

    def loss(x):
        ones = jnp.ones((1,))
        return losses.policy_loss(x, x * 0 - 1, ones, mask, weights, ref_logps=x * 0 - 1, beta=1.0)[
            0
        ]

    value, grad = jax.value_and_grad(loss)(jnp.where(mask, logps, 1e4))
    assert np.isfinite(value)
    assert grad[0, 2] == 0


def test_group_advantages_are_trl_s():
    d = of("advantages")
    size = CONFIG["grpo"]["num_generations"]
    rewards = d["rewards"].reshape(-1, size)
    valid = jnp.ones(rewards.shape, bool)
    for scale in ("group", "batch", "none"):
        got, used, _ = adv.group_advantages(rewards, valid, scale=scale)
        assert used.any(axis=1).tolist() == (np.ptp(rewards, axis=1) > 0).tolist()
        np.testing.assert_allclose(got.reshape(-1), d[scale], rtol=1e-4, atol=1e-5)
    parts = d["rewards_per_func"].T.reshape(2, -1, size)
    summed = normalised_components(parts, d["weights"], valid)
    # TRL then standardises the sums over the batch.
    got = (summed - summed.mean()) / (summed.std(ddof=1) + 1e-4)
    np.testing.assert_allclose(got.reshape(-1), d["normalize_then_sum"], rtol=1e-4, atol=1e-5)


def test_invalid_rewards_and_equal_groups_teach_nothing():
    nan = float("nan")
    rewards = jnp.array([[1.0, nan, 3.0, 2.0], [5.0, 5.0, 5.0, 5.0], [nan, nan, nan, 4.0]])
    got, used, metrics = adv.group_advantages(rewards, ~jnp.isnan(rewards), eps=0.0)
    row = np.array([1.0, 3.0, 2.0])
    np.testing.assert_allclose(got[0][np.array([0, 2, 3])], (row - 2.0) / row.std(ddof=1))
    assert used.tolist() == [[True, False, True, True], [False] * 4, [False] * 4]
    np.testing.assert_array_equal(got[1:], 0.0)
    assert got[0, 1] == 0
    np.testing.assert_allclose(metrics["zero_variance_groups"], 2 / 3, rtol=1e-6)
    np.testing.assert_allclose(metrics["invalid_share"], 4 / 12)
    np.testing.assert_allclose(metrics["reward"], (6 + 20 + 4) / 8)
    # Where nothing has a reward there is no mean; equal large rewards have no variance.
    assert jnp.isnan(adv.group_advantages(rewards * nan, rewards < 0)[2]["reward"])
    for value in (10.1, 100.1, 1000.1):
        large = jnp.full((2, 8), value)
        got, used, metrics = adv.group_advantages(large, large > 0)
        assert not used.any()
        assert metrics["zero_variance_groups"] == 1
        np.testing.assert_allclose(metrics["reward"], value, rtol=1e-6)
        got = normalised_components(np.asarray(large)[None], np.ones(1), np.asarray(large > 0))
        np.testing.assert_array_equal(got, 0.0)
    with pytest.raises(ValueError, match="scale: expected group, batch or none"):
        adv.group_advantages(rewards, ~jnp.isnan(rewards), scale="std")


@pytest.mark.parametrize("kl", ["k1", "k3"])
@pytest.mark.parametrize("whiten", [False, True])
def test_ppo_rewards_advantages_and_returns_are_trl_s(kl, whiten):
    d, c = of("ppo"), CONFIG["ppo"]
    real, real_p1 = ~d["padding_mask"], ~d["padding_mask_p1"]
    logps, ref = (jnp.where(real, d[n], c["invalid_logprob"]) for n in ("logps", "ref_logps"))
    values = jnp.where(real_p1, d["values"], 0.0)
    divergence = getattr(losses, kl)(logps, ref)
    last = d["last_token_index"]
    at = jnp.where(last + 1 < logps.shape[1], last + 1, last)  # TRL: one after the last token
    rewards = adv.token_rewards(divergence, d["scores"], at, c["kl_coef"])
    name = kl
    if whiten:
        name += "_whiten"
        rewards = jnp.where(real_p1, adv.whiten(rewards, real_p1, shift_mean=False), 0.0)
    np.testing.assert_allclose(rewards, d[f"{name}_rewards"], **CLOSE)
    advantages, returns = adv.gae(rewards, values, c["gamma"], c["lam"])
    np.testing.assert_allclose(returns, d[f"{name}_returns"], **CLOSE)
    whitened = jnp.where(real, adv.whiten(advantages, real), 0.0)
    np.testing.assert_allclose(whitened, d[f"{name}_advantages"], rtol=1e-5, atol=1e-5)


def test_ppo_losses_and_gradients_are_trl_s():
    d, c = of("ppo"), CONFIG["ppo"]
    real, real_p1 = ~d["padding_mask"], ~d["padding_mask_p1"]
    old = jnp.where(real, d["logps"], c["invalid_logprob"])
    old_values = jnp.where(real_p1, d["values"], 0.0)

    def loss(new_logps, new_values):
        logps = jnp.where(real, new_logps, c["invalid_logprob"])
        values = jnp.where(real_p1, new_values, 0.0)
        policy, _ = losses.policy_loss(
            logps,
            old,
            d["k1_advantages"],
            real,
            losses.token_weights(real, "dapo", 9),
            clip_low=c["cliprange"],
            clip_high=c["cliprange"],
        )
        value, metrics = losses.value_loss(
            values,
            old_values,
            d["k1_returns"],
            real_p1,
            losses.token_weights(real_p1, "dapo", 9),
            c["cliprange_value"],
        )
        return policy + c["vf_coef"] * value, (policy, value, metrics)

    (total, (policy, value, metrics)), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(
        d["new_logps"], d["new_values"]
    )
    np.testing.assert_allclose(policy, d["loss_pg_loss"], **CLOSE)
    np.testing.assert_allclose(value, d["loss_vf_loss"], **CLOSE)
    np.testing.assert_allclose(total, d["loss_loss"], **CLOSE)
    np.testing.assert_allclose(metrics["value_clip"], d["loss_vf_clipfrac"], **CLOSE)
    np.testing.assert_allclose(grads[0], d["loss_grad_new_logps"], **CLOSE)
    np.testing.assert_allclose(grads[1], d["loss_grad_new_values"], **CLOSE)


def test_preference_loss_is_trl_s():
    d = of("reward_model")
    loss, metrics = losses.preference_loss(d["chosen"], d["rejected"])
    np.testing.assert_allclose(loss, d["loss"], **CLOSE)
    np.testing.assert_allclose(metrics["pair_accuracy"], (d["chosen"] > d["rejected"]).mean())
