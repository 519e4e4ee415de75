"""Computes advantages relative to the group (GRPO) and by generalised advantage estimation (PPO).

Standard deviations are named by their `ddof`: 1 (divided by n - 1) unless said otherwise.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def masked_mean(x: jax.Array, mask: jax.Array, axis=None, keepdims: bool = False) -> jax.Array:
    """Averages x where mask is True; 0 where it is nowhere True."""
    total = jnp.sum(jnp.where(mask, x, 0.0), axis=axis, keepdims=keepdims)
    return total / jnp.maximum(jnp.sum(mask, axis=axis, keepdims=keepdims), 1)


def masked_std(
    x: jax.Array, mask: jax.Array, axis=None, keepdims: bool = False, ddof: int = 1
) -> jax.Array:
    """Computes the standard deviation of x where mask is True; 0 for `ddof` values or fewer."""
    # Two passes: the mean of squares less the squared mean would cancel in float32.
    mean = masked_mean(x, mask, axis, keepdims=True)
    count = jnp.sum(mask, axis=axis, keepdims=keepdims)
    squares = jnp.sum(jnp.where(mask, (x - mean) ** 2, 0.0), axis=axis, keepdims=keepdims)
    return jnp.sqrt(squares / jnp.maximum(count - ddof, 1)) * (count > ddof)


def from_highest(x: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Subtracts the highest masked value of each group: returns (x - highest, 0 outside the mask;
    highest [..., 1])."""
    # Equal values become exactly 0. The mean of large equal values is rounded, so subtracting
    # it would leave a remainder that looks like variance.
    highest = jnp.max(x, axis=-1, keepdims=True, where=mask, initial=-jnp.inf)
    highest = jnp.where(jnp.isfinite(highest), highest, 0.0)
    return jnp.where(mask, x - highest, 0.0), highest


def group_advantages(
    rewards: jax.Array,
    valid: jax.Array,
    *,
    scale: str = "group",
    ddof: int = 1,
    eps: float = 1e-4,
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """Computes GRPO advantages: (reward - group mean) / (standard deviation + `eps`).

    rewards float32[P, G] of G responses per prompt, valid bool[P, G]; an invalid response counts in
    no mean or deviation. scale: "group" (the group's deviation), "batch" (that of all valid
    rewards), "none". Returns advantages float32[P, G] (0 where not used), used bool[P, G], and
    metrics. Invalid responses and groups without variance are not used: they teach nothing, and
    with a KL term they would only pull the policy to the reference.
    """
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"scale: expected group, batch or none, got {scale!r}")
    rewards, highest = from_highest(rewards.astype(jnp.float32), valid)
    mean = masked_mean(rewards, valid, axis=1, keepdims=True)
    std = masked_std(rewards, valid, axis=1, keepdims=True, ddof=ddof)
    varied = std > 1e-6
    used = valid & varied
    advantages = rewards - mean
    if scale == "group":
        advantages = advantages / (std + eps)
    elif scale == "batch":
        advantages = advantages / (masked_std(rewards + highest, valid, ddof=ddof) + eps)
    groups = jnp.any(valid, axis=1) & (rewards.shape[1] > 1)
    # NaN where no response has a reward: the metric is then left out, not logged as 0.
    known = lambda x, mask: jnp.where(jnp.any(mask), masked_mean(x, mask), jnp.nan)  # noqa: E731
    return (
        jnp.where(used, advantages, 0.0),
        used,
        {
            "reward": known(rewards + highest, valid),
            "reward_group_std": known(std[:, 0], groups),
            "zero_variance_groups": known(~varied[:, 0], groups),
            "invalid_share": 1.0 - jnp.mean(valid),
        },
    )


def whiten(x: jax.Array, mask: jax.Array, shift_mean: bool = True) -> jax.Array:
    """Divides x by its standard deviation over the mask (ddof 1); the mean becomes 0, or stays as
    it is without `shift_mean`."""
    mean = masked_mean(x, mask)
    variance = masked_std(x, mask) ** 2
    y = (x - mean) * jax.lax.rsqrt(variance + 1e-8)
    return y if shift_mean else y + mean


def token_rewards(
    kl: jax.Array, scores: jax.Array, at: jax.Array, kl_coef: jax.Array | float
) -> jax.Array:
    """Computes PPO's reward of every token: -kl_coef * kl, plus the response's score at index `at`.

    kl float32[B, T] (0 at padding), scores float32[B], at int32[B] -> float32[B, T].
    """
    last = jnp.arange(kl.shape[1]) == at[:, None]
    return -kl_coef * kl + jnp.where(last, scores[:, None], 0.0)


def gae(
    rewards: jax.Array, values: jax.Array, gamma: float, lam: float
) -> tuple[jax.Array, jax.Array]:
    """Computes generalised advantage estimates (Schulman et al. 2016).

    rewards and values float32[B, T], 0 beyond the end. Returns advantages and returns
    (advantages + values), float32[B, T].
    """
    # Their eq. 16 as a recursion: A_t = delta_t + gamma lam A_{t+1}, hence a scan backwards. The
    # end of a response is terminal: the value that follows its last token is 0.
    following = jnp.concatenate([values[:, 1:], jnp.zeros_like(values[:, :1])], axis=1)
    deltas = rewards + gamma * following - values

    def back(carry, delta):
        carry = delta + gamma * lam * carry
        return carry, carry

    _, advantages = jax.lax.scan(back, jnp.zeros_like(deltas[:, 0]), deltas.T, reverse=True)
    return advantages.T, advantages.T + values
