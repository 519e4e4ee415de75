"""Advantages: relative to the group (GRPO) and by generalised advantage estimation (PPO).

Standard deviations are named by their `ddof`: 1 (divided by n - 1) unless said otherwise.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def masked_mean(x: jax.Array, mask: jax.Array, axis=None, keepdims: bool = False) -> jax.Array:
    """Mean of x where mask; 0 where nothing is."""
    total = jnp.sum(jnp.where(mask, x, 0.0), axis=axis, keepdims=keepdims)
    return total / jnp.maximum(jnp.sum(mask, axis=axis, keepdims=keepdims), 1)


def masked_std(
    x: jax.Array, mask: jax.Array, axis=None, keepdims: bool = False, ddof: int = 1
) -> jax.Array:
    """Standard deviation of x where mask; 0 where there are not more than `ddof` values."""
    mean = masked_mean(x, mask, axis, keepdims=True)
    count = jnp.sum(mask, axis=axis, keepdims=keepdims)
    squares = jnp.sum(jnp.where(mask, (x - mean) ** 2, 0.0), axis=axis, keepdims=keepdims)
    return jnp.sqrt(squares / jnp.maximum(count - ddof, 1)) * (count > ddof)


def from_highest(x: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(x less the highest of its group where mask, 0 elsewhere; the highest [..., 1]): equal values
    have no deviation then, however large they are."""
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
    """GRPO advantages: reward less the group's mean, over a standard deviation plus `eps`.

    rewards float32[P, G] of G responses a prompt, valid bool[P, G]; an invalid response counts in
    no mean and no deviation. scale: "group" (the group's deviation), "batch" (that of all valid
    rewards), "none". Returns advantages float32[P, G] (0 where not used), used bool[P, G], and
    metrics. Not used are invalid responses and groups without variance: they teach nothing, and
    under a KL term would only pull to the reference.
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
    """x / std over the masked places (ddof 1), with mean 0 unless the mean is to be kept."""
    mean = masked_mean(x, mask)
    variance = masked_std(x, mask) ** 2
    y = (x - mean) * jax.lax.rsqrt(variance + 1e-8)
    return y if shift_mean else y + mean


def token_rewards(
    kl: jax.Array, scores: jax.Array, at: jax.Array, kl_coef: jax.Array | float
) -> jax.Array:
    """PPO's rewards of every token: -kl_coef * kl, and the response's score at index `at`.

    kl float32[B, T] (0 at padding), scores float32[B], at int32[B] -> float32[B, T].
    """
    last = jnp.arange(kl.shape[1]) == at[:, None]
    return -kl_coef * kl + jnp.where(last, scores[:, None], 0.0)


def gae(
    rewards: jax.Array, values: jax.Array, gamma: float, lam: float
) -> tuple[jax.Array, jax.Array]:
    """Generalised advantage estimation (Schulman et al. 2016), backwards over the tokens.

    rewards and values float32[B, T], 0 beyond the end. Returns advantages and returns
    (advantages + values), float32[B, T].
    """
    following = jnp.concatenate([values[:, 1:], jnp.zeros_like(values[:, :1])], axis=1)
    deltas = rewards + gamma * following - values

    def back(carry, delta):
        carry = delta + gamma * lam * carry
        return carry, carry

    _, advantages = jax.lax.scan(back, jnp.zeros_like(deltas[:, 0]), deltas.T, reverse=True)
    return advantages.T, advantages.T + values
