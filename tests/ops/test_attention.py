"""Tests blockwise causal attention, forward and backward, against the plain softmax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mm_jax.ops.attention import QUERY_BLOCK, attention, causal_attention


@pytest.mark.parametrize("length", [2 * QUERY_BLOCK + 44, 37])
def test_causal_attention_is_the_plain_one(length):
    """Compares outputs and gradients with grouped heads, ragged rows, and a last partial block."""
    rng = np.random.default_rng(0)
    draw = lambda heads: jnp.asarray(rng.normal(size=(3, length, heads, 16)), jnp.float32)  # noqa: E731
    q, k, v, cotangent = draw(6), draw(2), draw(2), draw(6)
    lengths = jnp.asarray([length, length // 2, 1])
    real = (jnp.arange(length) < lengths[:, None])[..., None, None]
    cotangent = cotangent * real

    def plain(q, k, v):
        t = jnp.arange(length)
        seen = (t <= t[:, None]) & (t < lengths[:, None, None])
        return attention(q, k, v, mask=seen[:, None])

    def both(f):
        return jax.jit(
            lambda *x: (
                f(*x) * real,
                jax.grad(lambda *x: jnp.sum(f(*x) * cotangent), (0, 1, 2))(*x),
            )
        )

    got = both(lambda q, k, v: causal_attention(q, k, v, lengths))(q, k, v)
    want = both(plain)(q, k, v)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, want)
    assert all(float(jnp.abs(x).max()) > 0.1 for x in jax.tree.leaves(want))
