"""Computes the policy and value losses of GRPO and PPO, and the Bradley-Terry loss, purely.

A policy loss is a weighted sum over tokens; `token_weights` holds the reduction, so that the sum
over micro-batches and devices is the loss of the whole batch.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mm_jax.rl.advantages import masked_mean


def token_weights(
    mask: jax.Array, reduction: str, max_length: int, micro_batches: int = 1
) -> jax.Array:
    """Computes the loss weight of every token, float32[B, T], of an optimiser step's B responses.

    mask bool[B, T]: tokens that count; a response without any counts in no mean.

    * grpo: mean over a response's tokens, then over responses (DeepSeekMath)
    * dr_grpo: over responses times `max_length`, a constant (Dr. GRPO)
    * dapo: mean over all tokens of the step (DAPO)
    * bnpo: mean over the tokens of each micro-batch (every `micro_batches`-th response, as
      `training.step.micro_batches` splits), then over these; equal to dapo for a single one
    """
    x = mask.astype(jnp.float32)
    lengths = jnp.sum(x, axis=1, keepdims=True)
    responses = jnp.maximum(jnp.sum(lengths > 0), 1)
    if reduction == "grpo":
        return x / jnp.maximum(lengths, 1) / responses
    if reduction == "dr_grpo":
        return x / (responses * max_length)
    if reduction == "dapo":
        return x / jnp.maximum(jnp.sum(x), 1)
    if reduction != "bnpo":
        raise ValueError(f"reduction: expected grpo, dr_grpo, dapo or bnpo, got {reduction!r}")
    split = x.reshape(-1, micro_batches, x.shape[1])
    tokens = jnp.sum(split, axis=(0, 2), keepdims=True)
    return (split / jnp.maximum(tokens, 1) / micro_batches).reshape(x.shape)


def k1(logps: jax.Array, ref_logps: jax.Array) -> jax.Array:
    """Estimates KL(policy, reference) of sampled tokens without bias: log(policy / reference)."""
    return logps - ref_logps


def k3(logps: jax.Array, ref_logps: jax.Array) -> jax.Array:
    """Estimates the KL by exp(-k1) + k1 - 1: unbiased like k1, never negative, with less variance
    (Schulman 2020)."""
    # expm1 keeps the digits that exp(x) - 1 loses near 0, where policy and reference almost agree.
    return jnp.expm1(ref_logps - logps) - (ref_logps - logps)


def policy_loss(
    logps: jax.Array,
    old_logps: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    weights: jax.Array,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    clip_max: float | None = None,
    ref_logps: jax.Array | None = None,
    beta: float = 0.0,
    level: str = "token",
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes the clipped surrogate loss with a KL term (k3) to the reference.

    logps, old_logps, ref_logps float32[B, T]; advantages float32[B] or [B, T]; mask bool[B, T];
    weights float32[B, T] of `token_weights`. Ratios are clipped to [1 - clip_low, 1 + clip_high];
    `clip_max` also bounds them for negative advantages (two-sided clipping). level: one ratio per
    "token", or the response's mean log-ratio for all its tokens ("sequence", GSPO).

    Returns the loss and metrics: masked means of ratio and KL, and the shares of tokens clipped
    below (negative advantage) and above (positive).
    """
    # Padding is set to 0 before anything is computed: an infinite ratio there would make the
    # gradient NaN through any later mask (0 * inf).
    logps, old_logps = (jnp.where(mask, x, 0.0) for x in (logps, old_logps))
    log_ratio = logps - old_logps
    if level == "sequence":
        log_ratio = masked_mean(log_ratio, mask, axis=1, keepdims=True)
    elif level != "token":
        raise ValueError(f"level: expected 'token' or 'sequence', got {level!r}")
    ratio = jnp.exp(log_ratio)
    if advantages.ndim == 1:
        advantages = advantages[:, None]
    # The minimum below leaves the ratio unbounded where the advantage is negative; without clip_max
    # one token that became far likelier can dominate the step.
    bounded = ratio if clip_max is None else jnp.minimum(ratio, clip_max)
    clipped = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    loss = -jnp.minimum(bounded * advantages, clipped * advantages)
    # Only these signs are clipped: on the other side the minimum takes the plain ratio.
    low = (ratio < 1 - clip_low) & (advantages < 0)
    high = (ratio > 1 + clip_high) & (advantages > 0)
    full = lambda x: jnp.broadcast_to(x, mask.shape)  # noqa: E731
    metrics = {
        "ratio": masked_mean(full(ratio), mask),
        "ratio_max": jnp.max(jnp.where(mask, full(ratio), 0.0)),
        "clip_low": masked_mean(full(low), mask),
        "clip_high": masked_mean(full(high), mask),
    }
    if ref_logps is not None:
        kl = k3(logps, jnp.where(mask, ref_logps, 0.0))
        loss = loss + beta * kl
        metrics["kl"] = masked_mean(kl, mask)
    return jnp.sum(loss * weights), metrics


def value_loss(
    values: jax.Array,
    old_values: jax.Array,
    returns: jax.Array,
    mask: jax.Array,
    weights: jax.Array,
    clip: float,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes PPO's clipped value loss, half the larger of two squared errors; values, returns and
    weights float32[B, T], mask bool[B, T]."""
    clipped = jnp.clip(values, old_values - clip, old_values + clip)
    plain, bounded = (values - returns) ** 2, (clipped - returns) ** 2
    loss = 0.5 * jnp.sum(jnp.where(mask, jnp.maximum(plain, bounded), 0.0) * weights)
    return loss, {"value_clip": masked_mean(bounded > plain, mask)}


def preference_loss(
    chosen: jax.Array, rejected: jax.Array, mask: jax.Array | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes the Bradley-Terry loss: mean of -log sigmoid(chosen - rejected) over the masked
    pairs, [B] each."""
    margin = chosen - rejected
    mask = jnp.ones(margin.shape, bool) if mask is None else mask
    # softplus(-x) is -log sigmoid(x), and stays finite where sigmoid(x) rounds to 0.
    return masked_mean(jax.nn.softplus(-margin), mask), {
        "pair_accuracy": masked_mean(margin > 0, mask),
        "margin": masked_mean(margin, mask),
    }
