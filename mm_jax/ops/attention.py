"""Scaled dot-product attention with grouped key/value heads."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def cudnn_usable(q: jax.Array) -> bool:
    """Whether cuDNN flash attention can run: an NVIDIA GPU, half precision, head size % 8 == 0."""
    return (
        jax.default_backend() == "gpu"
        and q.dtype in (jnp.bfloat16, jnp.float16)
        and q.shape[-1] % 8 == 0
    )


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


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array) -> jax.Array:
    """Causal attention over right-padded rows: q, k, v [B, T, ., H], lengths int32[B].

    cuDNN flash attention with sequence lengths where it can run, XLA otherwise; outputs at padded
    positions are arbitrary but finite.
    """
    if cudnn_usable(q):
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            is_causal=True,
            query_seq_lengths=lengths,
            key_value_seq_lengths=lengths,
            implementation="cudnn",
        )
    t = jnp.arange(q.shape[1])
    allowed = (t[None, :] <= t[:, None])[None, None] & (t < lengths[:, None])[:, None, None, :]
    return attention(q, k, v, mask=allowed)


def full_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Unmasked attention (SigLIP): q, k, v [B, T, N, H]."""
    implementation = "cudnn" if cudnn_usable(q) else "xla"
    return jax.nn.dot_product_attention(q, k, v, implementation=implementation)
