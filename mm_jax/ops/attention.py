"""Scaled dot-product attention with grouped key/value heads."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

F32 = dict(preferred_element_type=jnp.float32)
# The score of a masked key. Finite: with -inf, a row without any key would give inf - inf = NaN.
NEVER = -1e30
# Least queries per block of XLA's causal attention, and most blocks: each is compiled separately.
QUERY_BLOCK, QUERY_BLOCKS = 128, 8


def use_cudnn(choice: str, q: jax.Array) -> bool:
    """Decides whether cuDNN flash attention runs, by a choice of auto, xla or cudnn.

    "auto" uses it where it can run: on an NVIDIA GPU, in half precision, with head size % 8 == 0.
    "cudnn" raises ValueError where it cannot.
    """
    half = q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] % 8 == 0
    can = jax.default_backend() == "gpu" and half
    if choice == "cudnn" and not can:
        raise ValueError(
            "attention=cudnn: expected a GPU, bfloat16 or float16 and a head size that is a "
            f"multiple of 8; got {jax.default_backend()}, {q.dtype}, head size {q.shape[-1]}"
        )
    return can and choice != "xla"


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
) -> jax.Array:
    """Computes softmax(q k / sqrt(H) + bias) v over the allowed keys.

    q [B, T, N, H], k and v [B, S, K, H] with N a multiple of K; mask bool, broadcastable to
    [B, N, T, S], True = may attend; bias broadcastable to [B, N, T, S]. Softmax in float32. A query
    without allowed keys gives the mean of v.
    """
    return jax.nn.dot_product_attention(q, k, v, bias=bias, mask=mask, implementation="xla")


def causal_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array, choice: str = "auto"
) -> jax.Array:
    """Computes causal attention over right-padded rows: q, k, v [B, T, ., H], lengths int32[B].

    Uses cuDNN flash attention or XLA, by `choice` (see `use_cudnn`); outputs at padded positions
    are arbitrary but finite.
    """
    if use_cudnn(choice, q):
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            is_causal=True,
            query_seq_lengths=lengths,
            key_value_seq_lengths=lengths,
            implementation="cudnn",
        )
    batch, length, heads, width = q.shape
    kv_heads = k.shape[2]
    q = (q / math.sqrt(width)).reshape(batch, length, kv_heads, heads // kv_heads, width)
    q = jnp.moveaxis(q, 2, 1).reshape(batch, kv_heads, -1, width)
    out = _causal(q, heads_first(k), heads_first(v), lengths)
    out = jnp.moveaxis(out.reshape(batch, kv_heads, length, -1, width), 1, 2)
    return out.reshape(batch, length, heads, width)


@jax.custom_vjp
def _causal(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array) -> jax.Array:
    """Attends with scaled queries [B, K, T * M, H], M heads per key head, to k and v [B, K, T, H].

    It takes one block of queries at a time, so that it computes little above the diagonal and
    never holds all T x T scores. The backward pass has the scores transposed, [keys, queries]: four
    of its five products then read their operands in the order in which they are stored.
    """
    return _causal_forward(q, k, v, lengths)[0]


def _causal_forward(q, k, v, lengths):
    outs, totals = [], []
    for rows, end, allowed in _query_blocks(q, k, lengths):
        scores = jnp.einsum("bkqh,bksh->bkqs", q[:, :, rows], k[:, :, :end], **F32)
        scores = jnp.where(allowed.swapaxes(-1, -2), scores, NEVER)
        # Without the largest score subtracted, exp could overflow.
        top = jnp.max(scores, axis=-1, keepdims=True)
        shares = jnp.exp(scores - top)
        total = jnp.sum(shares, axis=-1, keepdims=True)
        out = jnp.einsum("bkqs,bksh->bkqh", shares.astype(v.dtype), v[:, :, :end], **F32)
        # Divided after the product: there are H values per query to divide instead of T.
        outs.append((out / total).astype(q.dtype))
        # The logsumexp is all the backward pass needs to compute the probabilities again.
        totals.append((top + jnp.log(total))[..., 0])
    out = jnp.concatenate(outs, axis=2)
    return out, (q, k, v, lengths, out, jnp.concatenate(totals, axis=2))


def _causal_backward(saved, d_out):
    q, k, v, lengths, out, totals = saved
    # The softmax's gradient is p (dp - sum(p dp)), and sum(p dp) over keys equals d_out . out
    # (FlashAttention, Dao et al. 2022), which needs no scores.
    mean = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    # In float32, because every block of queries adds to them.
    d_q, d_k, d_v = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for rows, end, allowed in _query_blocks(q, k, lengths):
        own, d_own = q[:, :, rows], d_out[:, :, rows]
        scores = jnp.einsum("bksh,bkqh->bksq", k[:, :, :end], own, **F32)
        # Masked scores may overflow in exp; the `where` drops them, and nothing differentiates it.
        shares = jnp.where(allowed, jnp.exp(scores - totals[:, :, None, rows]), 0)
        d_shares = jnp.einsum("bksh,bkqh->bksq", v[:, :, :end], d_own, **F32)
        d_scores = (shares * (d_shares - mean[:, :, None, rows])).astype(q.dtype)
        d_q.append(jnp.einsum("bksq,bksh->bkqh", d_scores, k[:, :, :end], **F32).astype(q.dtype))
        d_k = d_k.at[:, :, :end].add(jnp.einsum("bksq,bkqh->bksh", d_scores, own, **F32))
        shares = shares.astype(d_out.dtype)
        d_v = d_v.at[:, :, :end].add(jnp.einsum("bksq,bkqh->bksh", shares, d_own, **F32))
    return jnp.concatenate(d_q, axis=2), d_k.astype(k.dtype), d_v.astype(v.dtype), None


_causal.defvjp(_causal_forward, _causal_backward)


def _query_blocks(q: jax.Array, k: jax.Array, lengths: jax.Array):
    """Yields each block's rows of q, the end of its keys, and the mask bool[B, 1, keys, rows]."""
    length, per_key = k.shape[2], q.shape[2] // k.shape[2]
    block = max(QUERY_BLOCK, -(-length // QUERY_BLOCKS))
    for first in range(0, length, block):
        end = min(first + block, length)
        rows = slice(first * per_key, end * per_key)
        keys = jnp.arange(end)[:, None]
        causal = keys <= jnp.arange(rows.start, rows.stop) // per_key
        yield rows, end, (causal & (keys < lengths[:, None, None]))[:, None]


def heads_first(x: jax.Array) -> jax.Array:
    """Moves [B, ..., S, K, H] to [B, K, ..., S, H], the order in which matrix products read it."""
    return jnp.moveaxis(x, -2, 1)


def prefix_attention(
    q: jax.Array,
    prefix_k: jax.Array,
    prefix_v: jax.Array,
    prefix_mask: jax.Array,
    k: jax.Array,
    v: jax.Array,
    allowed: jax.Array,
) -> jax.Array:
    """Computes attention of G continuations to the prefix they share and to themselves.

    q [B, G, Q, N, H]; prefix_k, prefix_v [B, K, S, H] with prefix_mask bool[B, S]; own k, v
    [B, K, G, R, H] with allowed bool, broadcastable to [B, G, Q, R] (see `heads_first`). The prefix
    is read once for all G and never copied. The softmax, in float32, runs over both; returns
    [B, G, Q, N, H].
    """
    batch, group, queries, heads, width = q.shape
    kv_heads = k.shape[1]
    q = (q / math.sqrt(width)).reshape(batch, group, queries, kv_heads, heads // kv_heads, width)
    q = jnp.transpose(q, (0, 3, 1, 4, 2, 5))  # b k g m q h
    shared = jnp.einsum("bkgmqh,bksh->bkgmqs", q, prefix_k, **F32)
    shared = jnp.where(prefix_mask[:, None, None, None, None, :], shared, NEVER)
    own = jnp.einsum("bkgmqh,bkgrh->bkgmqr", q, k, **F32)
    own = jnp.where(
        jnp.broadcast_to(allowed, own.shape[:1] + (group, *own.shape[-2:]))[:, None, :, None],
        own,
        NEVER,
    )
    # One maximum and one sum over both parts make one softmax, without joining the keys. The shift
    # cancels out, so it needs no gradient.
    top = jnp.maximum(jnp.max(shared, axis=-1), jnp.max(own, axis=-1))[..., None]
    top = jax.lax.stop_gradient(top)
    shared, own = jnp.exp(shared - top), jnp.exp(own - top)
    total = jnp.sum(shared, axis=-1) + jnp.sum(own, axis=-1)
    out = jnp.einsum("bkgmqs,bksh->bkgmqh", shared.astype(v.dtype), prefix_v, **F32)
    out = out + jnp.einsum("bkgmqr,bkgrh->bkgmqh", own.astype(v.dtype), v, **F32)
    out = (out / total[..., None]).astype(q.dtype)
    return jnp.transpose(out, (0, 2, 4, 1, 3, 5)).reshape(batch, group, queries, heads, width)


class OwnCache(NamedTuple):
    """Keys [B, K, G, H, R] and values [B, K, G, R, H] of G continuations, as products read them."""

    k: jax.Array
    v: jax.Array


def decode_attention(
    q: jax.Array,
    prefix_k: jax.Array,
    prefix_v: jax.Array,
    prefix_mask: jax.Array,
    own: OwnCache,
    k: jax.Array,
    v: jax.Array,
    step: jax.Array,
) -> tuple[jax.Array, OwnCache]:
    """Computes `prefix_attention` of one new token per continuation and caches its key and value.

    q [B, G, N, H]; prefix_k [B, K, H, S], prefix_v [B, K, S, H], prefix_mask bool[B, S]; `own`
    filled up to `step`, int32[], or int32[B] where rows are not equally far; k, v [B, G, K, H] of
    the new token. Returns [B, G, N, H] and the cache with the token at `step`, written in place.
    """
    batch, group, heads, width = q.shape
    kv_heads = k.shape[2]
    q = (q / math.sqrt(width)).reshape(batch, group, kv_heads, heads // kv_heads, width)
    q, k, v = (jnp.moveaxis(x, 2, 1) for x in (q, k, v))  # b k g ...
    shared = jnp.einsum("bkgmh,bkhs->bkgms", q, prefix_k, **F32)
    shared = jnp.where(prefix_mask[:, None, None, None], shared, NEVER)
    past = jnp.einsum("bkgmh,bkghr->bkgmr", q, own.k, **F32)
    filled = jnp.arange(own.k.shape[-1]) < step.reshape(-1, 1, 1, 1, 1)
    past = jnp.where(filled, past, NEVER)
    # The new token takes part directly, so that the cache can be written after it is read.
    new = jnp.einsum("bkgmh,bkgh->bkgm", q, k, **F32)
    top = jnp.maximum(jnp.maximum(jnp.max(shared, axis=-1), jnp.max(past, axis=-1)), new)
    shared, past = jnp.exp(shared - top[..., None]), jnp.exp(past - top[..., None])
    new = jnp.exp(new - top)
    total = jnp.sum(shared, axis=-1) + jnp.sum(past, axis=-1) + new
    out = jnp.einsum("bkgms,bksh->bkgmh", shared.astype(v.dtype), prefix_v, **F32)
    out = out + jnp.einsum("bkgmr,bkgrh->bkgmh", past.astype(v.dtype), own.v, **F32)
    out = (out + new[..., None] * v[:, :, :, None]) / total[..., None]
    # Makes the write depend on the read: XLA could otherwise write first, and would copy the cache
    # to be safe. (It keeps float * 0, which can be NaN.) Row by row, so that no device waits for
    # another.
    wait = out[:, :, :, 0] * 0
    k, v = (k + wait).astype(own.k.dtype), (v + wait).astype(own.v.dtype)
    if step.ndim:
        one = jax.vmap(lambda cache, x, i: cache.at[:, :, i].set(x))
        keys = jax.vmap(lambda cache, x, i: cache.at[..., i].set(x))
        own = OwnCache(keys(own.k, k, step), one(own.v, v, step))
    else:
        put = jax.lax.dynamic_update_slice
        own = OwnCache(
            put(own.k, k[..., None], (0, 0, 0, 0, step)),
            put(own.v, v[..., None, :], (0, 0, 0, step, 0)),
        )
    out = jnp.moveaxis(out, 1, 2).reshape(batch, group, heads, width)
    return out.astype(q.dtype), own


def full_attention(q: jax.Array, k: jax.Array, v: jax.Array, choice: str = "auto") -> jax.Array:
    """Computes attention without a mask (SigLIP): q, k, v [B, T, N, H]; `choice` as above."""
    implementation = "cudnn" if use_cudnn(choice, q) else "xla"
    return jax.nn.dot_product_attention(q, k, v, implementation=implementation)
