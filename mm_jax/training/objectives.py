"""What supervised stages minimise: a summed loss, and sums that become metrics.

SFT and compressor pre-training differ in data only; both have the token loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mm_jax.models.multimood import MultiMood
from mm_jax.ops.log_probs import token_log_probs

# Modality sets a row may show, in the order of the metrics' `subset_loss`.
SUBSETS = ("text", "audio", "video", "audio_video")


def token_loss(
    model: MultiMood, batch, dropout_key: jax.Array | None = None, token_dropout: float = 0.0
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Summed weighted cross-entropy of the target tokens, and sums for the metrics.

    Reduction: the caller divides by `weight`, so that accumulation over micro-batches and devices
    gives the mean over all target tokens (weighted). float32 scalars, and float32[4] for the
    modality subsets of SUBSETS.
    """
    hidden = model(batch, dropout_key=dropout_key, token_dropout=token_dropout)
    lm = model.language_model
    # Position t predicts token t + 1.
    targets = jnp.roll(batch.tokens, -1, axis=1)
    weights = jnp.roll(batch.loss_weights, -1, axis=1).at[:, -1].set(0)
    logps, best, _ = token_log_probs(
        hidden, lm.head_kernel(), targets, vocab_padding=lm.config.vocab_padding
    )
    counted = weights > 0
    losses = -weights * logps
    shows = lambda token: jnp.any(batch.tokens == token, axis=1)  # noqa: E731
    subset = shows(model.config.audio_token_id) + 2 * shows(model.config.video_token_id)
    rows = jax.nn.one_hot(subset, len(SUBSETS), dtype=jnp.float32)
    return jnp.sum(losses), {
        "weight": jnp.sum(weights),
        "targets": jnp.sum(counted, dtype=jnp.float32),
        "correct": jnp.sum(counted & (best == targets), dtype=jnp.float32),
        "tokens": jnp.sum(batch.mask, dtype=jnp.float32),
        "subset_loss": jnp.sum(losses, axis=1) @ rows,
        "subset_weight": jnp.sum(weights, axis=1) @ rows,
    }


def token_metrics(sums: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {
        "token_accuracy": sums["correct"] / jnp.maximum(sums["targets"], 1),
        **{name: sums[name] for name in ("tokens", "subset_loss", "subset_weight")},
    }


class Objective(NamedTuple):
    """loss(model, batch, dropout_key, token_dropout) -> (summed loss, sums with its "weight");
    metrics(sums) -> metrics; parts: names of trained parts that it puts beside the model."""

    loss: Callable = token_loss
    metrics: Callable = token_metrics
    parts: tuple[str, ...] = ()


TOKENS = Objective()
