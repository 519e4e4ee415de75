"""Decoding with a cache: prefill, label scoring, and generation, each a pure jittable function.

Prompts are padded on the right: masked slots of the cache are never seen and positions count
visible slots only, so ragged rows need no alignment.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mm_jax.models.multimood import MultiMood
from mm_jax.models.qwen2 import Cache, Qwen2


class Decoding(NamedTuple):
    """Where a batch of rows is: the cache, the next free slot, logits float32[B, V] of the next
    token."""

    cache: Cache
    slot: jax.Array
    logits: jax.Array


def prefill(model: MultiMood, batch, extra_slots: int) -> Decoding:
    """Reads the prompts of a batch into a cache with room for `extra_slots` more tokens."""
    lm = model.language_model
    rows, length = batch.tokens.shape
    cache = lm.empty_cache(rows, length + extra_slots)
    return _extend(lm, model.embed(batch), batch.mask, cache, jnp.int32(0))


def force(lm: Qwen2, at: Decoding, tokens: jax.Array, mask: jax.Array) -> Decoding:
    """Appends given tokens int32[B, N] (mask bool[B, N], padding on the right) to every row."""
    return _extend(lm, lm.embed(tokens), mask, at.cache, at.slot, at.logits)


def _extend(lm, embeds, mask, cache, slot, logits=None) -> Decoding:
    hidden, cache = lm.extend(embeds, mask, cache, slot)
    count = jnp.sum(mask, axis=1)
    last = jnp.take_along_axis(hidden, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]
    new = lm.logits(last)
    if logits is not None:
        new = jnp.where((count > 0)[:, None], new, logits)
    return Decoding(cache, slot + embeds.shape[1], new)


def score_labels(lm: Qwen2, at: Decoding, labels: jax.Array, lengths: jax.Array) -> jax.Array:
    """log p(label | what the rows have read) for every candidate label.

    labels int32[C, N] (padded on the right), lengths int32[C] >= 1; returns float32[B, C], the sum
    of token log-probabilities. The cache stays as it was.
    """
    first = jax.nn.log_softmax(at.logits)  # [B, V]
    rows, width = at.logits.shape[0], labels.shape[1]

    def one(candidate):
        tokens, length = candidate
        total = first[:, tokens[0]]
        if width == 1:
            return total
        inner = jnp.broadcast_to(tokens[:-1], (rows, width - 1))
        real = jnp.arange(1, width) < length
        hidden, _ = lm.extend(
            lm.embed(inner), jnp.broadcast_to(real, inner.shape), at.cache, at.slot
        )
        logps = jax.nn.log_softmax(lm.logits(hidden))
        picked = jnp.take_along_axis(
            logps, jnp.broadcast_to(tokens[1:], inner.shape)[..., None], axis=-1
        )[..., 0]
        return total + jnp.sum(jnp.where(real, picked, 0.0), axis=1)

    return jax.lax.map(one, (labels, lengths)).T


def sample_token(
    key: jax.Array, logits: jax.Array, temperature: jax.Array, top_k: int, top_p: jax.Array
) -> jax.Array:
    """Next tokens int32[B] from float32[B, V]; temperature 0 is greedy.

    Only the `top_k` likeliest tokens are considered, and of those the smallest set whose
    probability reaches `top_p`.
    """
    values, index = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))
    scaled = values / jnp.maximum(temperature, 1e-6)
    p = jax.nn.softmax(scaled)
    kept = jnp.cumsum(p, axis=-1) - p < top_p
    choice = jax.random.categorical(key, jnp.where(kept, scaled, -jnp.inf))
    choice = jnp.where(temperature == 0, 0, choice)
    return jnp.take_along_axis(index, choice[:, None], axis=1)[:, 0]


def generate(
    lm: Qwen2,
    at: Decoding,
    key: jax.Array,
    *,
    end_id: int,
    pad_id: int,
    max_new_tokens: int,
    temperature: jax.Array | float = 0.0,
    top_k: int = 64,
    top_p: jax.Array | float = 1.0,
) -> tuple[jax.Array, jax.Array, Decoding]:
    """Continues every row until its end token: tokens int32[B, N] (pad after the end), whether the
    row ended, and where decoding is then (a caller that donates `at` decodes in place). Stops early
    when all rows have ended. `top_k`, `max_new_tokens` are static.

    The cache must have `max_new_tokens` free slots.
    """
    temperature = jnp.float32(temperature)
    rows = at.logits.shape[0]

    def cond(carry):
        t, _, done, _ = carry
        return (t < max_new_tokens) & ~jnp.all(done)

    def body(carry):
        t, at, done, out = carry
        token = sample_token(jax.random.fold_in(key, t), at.logits, temperature, top_k, top_p)
        token = jnp.where(done, pad_id, token).astype(jnp.int32)
        out = out.at[:, t].set(token)
        done = done | (token == end_id)
        at = force(lm, at, token[:, None], jnp.ones((rows, 1), bool))
        return t + 1, at, done, out

    out = jnp.full((rows, max_new_tokens), pad_id, jnp.int32)
    start = (jnp.int32(0), at, jnp.zeros((rows,), bool), out)
    _, at, done, out = jax.lax.while_loop(cond, body, start)
    return out, done, at
