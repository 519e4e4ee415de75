import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mm_jax.ops.selective_scan import selective_scan, selective_step


def inputs(length, batch=2, width=6, states=3, seed=0):
    k = jax.random.split(jax.random.key(seed), 7)
    return (
        jax.random.normal(k[0], (batch, length, width)),
        jax.nn.softplus(jax.random.normal(k[1], (batch, length, width)) - 1),
        -jnp.exp(jax.random.normal(k[2], (width, states))),
        jax.random.normal(k[3], (batch, length, states)),
        jax.random.normal(k[4], (batch, length, states)),
        jax.random.normal(k[5], (width,)),
        jax.random.normal(k[6], (batch, width, states)),
    )


def sequential(x, dt, a, b, c, d, h):
    ys = []
    for t in range(x.shape[1]):
        h, y = selective_step(h, x[:, t], dt[:, t], a, b[:, t], c[:, t])
        ys.append(y)
    return jnp.stack(ys, axis=1) + x * d, h


@pytest.mark.parametrize("length", [1, 7, 16, 21])
def test_values_and_gradients_equal_the_recurrence(length):
    args = inputs(length)

    def objective(scan):
        def f(*args):
            y, h = scan(*args)
            return jnp.sum(jnp.sin(y)) + jnp.sum(h**2)

        return jax.jit(jax.value_and_grad(f, argnums=range(7)))

    got = objective(lambda *a: selective_scan(*a, chunk=8))(*args)
    want = objective(sequential)(*args)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    for g, w in zip(got[1], want[1], strict=True):
        np.testing.assert_allclose(g, w, atol=1e-5 * float(jnp.abs(w).max()), rtol=1e-4)


def test_a_sequence_can_be_cut_anywhere():
    x, dt, a, b, c, d, h = inputs(20)
    y, last = selective_scan(x, dt, a, b, c, d, h, chunk=8)
    y1, middle = selective_scan(x[:, :11], dt[:, :11], a, b[:, :11], c[:, :11], d, h, chunk=8)
    y2, end = selective_scan(x[:, 11:], dt[:, 11:], a, b[:, 11:], c[:, 11:], d, middle, chunk=8)
    np.testing.assert_allclose(jnp.concatenate([y1, y2], axis=1), y, atol=1e-5)
    np.testing.assert_allclose(end, last, atol=1e-5)
