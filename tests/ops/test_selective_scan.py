import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from jax.test_util import check_grads

from mm_jax.models.sharding import make_mesh
from mm_jax.ops import selective_scan_kernel
from mm_jax.ops.selective_scan import causal_conv, selective_scan, selective_step


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


def step_by_step(x, dt, a, b, c, d, h, resets=None):
    """Loops over `selective_step`."""
    ys = []
    for t in range(x.shape[1]):
        if resets is not None:
            h = jnp.where(resets[:, t, None, None], 0, h)
        h, y = selective_step(h, x[:, t], dt[:, t], a, b[:, t], c[:, t])
        ys.append(y)
    return jnp.stack(ys, axis=1) + x * d, h


def value_and_grads(scan):
    def f(*args):
        y, h = scan(*args)
        return jnp.sum(jnp.sin(y)) + jnp.sum(h**2)

    return jax.jit(jax.value_and_grad(f, argnums=range(7)))


def assert_equal(got, want):
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    for g, w in zip(got[1], want[1], strict=True):
        np.testing.assert_allclose(g, w, atol=1e-5 * float(jnp.abs(w).max()), rtol=1e-4)


def some_resets(length):
    resets = np.zeros((2, length), bool)
    resets[0, [length // 3, length // 2]] = True
    resets[1, [0, length - 1]] = True
    return jnp.asarray(resets)


@pytest.mark.parametrize("implementation", ["sequential", "chunked", "pallas"])
@pytest.mark.parametrize("with_resets", [False, True])
@pytest.mark.parametrize("length", [1, 7, 16, 21])
def test_values_and_gradients_equal_the_recurrence(implementation, with_resets, length):
    args = inputs(length)
    resets = some_resets(length) if with_resets else None

    def scan(*a):
        return selective_scan(*a, resets, implementation=implementation, chunk=8)

    want = value_and_grads(lambda *a: step_by_step(*a, resets))(*args)
    assert_equal(value_and_grads(scan)(*args), want)


@pytest.mark.parametrize("implementation", ["chunked", "pallas"])
def test_gradients_equal_finite_differences(implementation):
    args = inputs(5, width=3, states=2)
    scan = lambda *a: selective_scan(*a, implementation=implementation, chunk=2)  # noqa: E731
    check_grads(scan, args, order=1, modes=["rev"], atol=2e-2, rtol=2e-2, eps=1e-3)


def test_the_kernel_takes_several_blocks_of_channels_and_segments(monkeypatch):
    monkeypatch.setattr(selective_scan_kernel, "BLOCK", 4)
    monkeypatch.setattr(selective_scan_kernel, "SHORTEST", 4)
    args, resets = inputs(37, width=11, states=5), some_resets(37)
    assert selective_scan_kernel.segments(2, 37, 11) == 8
    scan = lambda how: lambda *a: selective_scan(*a, resets, implementation=how, chunk=6)  # noqa: E731
    want = value_and_grads(scan("sequential"))(*args)
    assert_equal(value_and_grads(scan("pallas"))(*args), want)
    y, h = scan("pallas")(*args)  # without gradients no states are kept
    np.testing.assert_allclose(y, scan("sequential")(*args)[0], atol=1e-5)
    np.testing.assert_allclose(h, scan("sequential")(*args)[1], atol=1e-5)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_kernel_lowers_for_a_gpu(direction):
    """Lowers it at mamba-370m's shapes without running it, as there may be no GPU."""
    batch, length, width, states, chunk = 2, 1024, 2048, 16, 16
    f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    channels, of_state, h = (
        f32(batch, length, width),
        f32(batch, length, states),
        f32(batch, width, states),
    )
    common = (
        channels,
        channels,
        f32(width, states),
        of_state,
        of_state,
        f32(width),
        f32(batch, length),
    )
    more = {
        "forward": (h,),
        "backward": (f32(batch, length // chunk, width, states), channels, h),
    }[direction]
    run = getattr(selective_scan_kernel, direction)
    with abstract_gpu():
        traced = jax.jit(lambda *a: run(*a, chunk, False)).trace(*common, *more)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 2  # the segments' first walk, and the whole


def abstract_gpu():
    """Names a GPU to lower for, where jax (from 0.11 on) wants one and there may be none."""
    if jax.__version_info__ < (0, 11):
        return contextlib.nullcontext()
    device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")
    mesh = jax.sharding.AbstractMesh((), (), (), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 2, 4)])
def test_the_kernel_on_a_mesh_equals_one_device(sizes):
    mesh = make_mesh(dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)))
    args = inputs(9, batch=4, width=8)
    want = value_and_grads(lambda *a: selective_scan(*a, implementation="chunked"))(*args)
    kernel = value_and_grads(lambda *a: selective_scan(*a, implementation="pallas", chunk=4))
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    with jax.set_mesh(mesh):
        got = kernel(*(jax.device_put(a, rows) if a.shape[0] == 4 else a for a in args))
    assert_equal(got, want)


def test_a_sequence_can_be_cut_anywhere():
    x, dt, a, b, c, d, h = inputs(20)
    y, last = selective_scan(x, dt, a, b, c, d, h, chunk=8)
    y1, middle = selective_scan(x[:, :11], dt[:, :11], a, b[:, :11], c[:, :11], d, h, chunk=8)
    y2, end = selective_scan(x[:, 11:], dt[:, 11:], a, b[:, 11:], c[:, 11:], d, middle, chunk=8)
    np.testing.assert_allclose(jnp.concatenate([y1, y2], axis=1), y, atol=1e-5)
    np.testing.assert_allclose(end, last, atol=1e-5)


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match=r"expected one of .*got 'cuda'"):
        selective_scan(*inputs(2), implementation="cuda")


def plain_conv(x, weights, bias, state, resets):
    """Computes the convolution of one row token by token; `state`: earlier inputs, oldest first."""
    seen, out = list(state), []
    for t, token in enumerate(x):
        seen = [np.zeros_like(token)] * len(weights) if resets[t] else seen
        seen = [*seen[1:], token]
        out.append(sum(w * s for w, s in zip(weights, seen, strict=True)) + bias)
    return np.array(out), np.array(seen)


def test_causal_conv_with_state_lengths_and_resets():
    rng = np.random.default_rng(0)
    x, state = rng.normal(size=(2, 9, 3)), rng.normal(size=(2, 4, 3))
    weights, bias = rng.normal(size=(4, 3)), rng.normal(size=3)
    resets = np.zeros((2, 9), bool)
    resets[0, [2, 3]], resets[1, 6] = True, True
    for lengths in ((9, 9), (5, 7), (1, 2)):
        arrays = [np.asarray(t, np.float32) for t in (x, weights, bias, state)]
        y, new = causal_conv(*arrays, jnp.asarray(lengths), jnp.asarray(resets))
        for row, n in enumerate(lengths):
            want, after = plain_conv(x[row, :n], weights, bias, state[row], resets[row])
            np.testing.assert_allclose(y[row, :n], want, atol=1e-5)
            np.testing.assert_allclose(new[row], after, atol=1e-6)
