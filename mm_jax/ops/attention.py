"""Scaled dot-product attention with grouped key/value heads."""

from __future__ import annotations

import jax
import jax.numpy as jnp

ATTENTION = ("auto", "xla", "cudnn")
QUERY_BLOCK = 512  # queries that XLA's causal attention takes at a time


def use_cudnn(choice: str, q: jax.Array) -> bool:
    """Whether cuDNN flash attention runs, by a choice of ATTENTION.

    "auto" takes it where it can run: an NVIDIA GPU, half precision, head size % 8 == 0; "cudnn"
    raises ValueError where it cannot.
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
    """softmax(q k / sqrt(H) + bias) v over allowed keys.

    q [B, T, N, H], k and v [B, S, K, H] with N a multiple of K; mask bool, broadcastable to
    [B, N, T, S], True = may attend; bias broadcastable to [B, N, T, S]. Softmax in float32. A query
    that may attend to nothing gives the mean of v.
    """
    return jax.nn.dot_product_attention(q, k, v, bias=bias, mask=mask, implementation="xla")


def causal_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array, choice: str = "auto"
) -> jax.Array:
    """Causal attention over right-padded rows: q, k, v [B, T, ., H], lengths int32[B].

    cuDNN flash attention with sequence lengths, or XLA, by `choice` (see `use_cudnn`); outputs at
    padded positions are arbitrary but finite.
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
    length = q.shape[1]
    keys = jnp.arange(length)

    def rows(q, first):
        queries = first + jnp.arange(q.shape[1])
        allowed = (keys[None, :] <= queries[:, None])[None, None]
        return attention(q, k, v, mask=allowed & (keys < lengths[:, None])[:, None, None, :])

    if length <= QUERY_BLOCK or length % QUERY_BLOCK:
        return rows(q, 0)
    # Block after block of queries, so that the square of scores is never held whole.
    blocks = jnp.moveaxis(q.reshape(q.shape[0], -1, QUERY_BLOCK, *q.shape[2:]), 1, 0)
    firsts = jnp.arange(0, length, QUERY_BLOCK)
    out = jax.lax.map(jax.checkpoint(lambda xs: rows(*xs)), (blocks, firsts))
    return jnp.moveaxis(out, 0, 1).reshape(q.shape)


def full_attention(q: jax.Array, k: jax.Array, v: jax.Array, choice: str = "auto") -> jax.Array:
    """Unmasked attention (SigLIP): q, k, v [B, T, N, H]; `choice` as in `use_cudnn`."""
    implementation = "cudnn" if use_cudnn(choice, q) else "xla"
    return jax.nn.dot_product_attention(q, k, v, implementation=implementation)
