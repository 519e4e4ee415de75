"""Tests the products of dense layers in bfloat16 on a CPU."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mm_jax.ops import products


def test_bfloat16_on_a_cpu_is_summed_in_float32_and_rounded_once():
    rng = np.random.default_rng(0)
    x, kernel, weights = (
        jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
        for shape in ((2, 5, 64), (64, 48), (2, 5, 48))
    )

    def loss(product, x, kernel):
        y = product(x, kernel)
        return jnp.sum(y.astype(jnp.float32) * weights.astype(jnp.float32)), y

    def run(product, x, kernel):
        return jax.value_and_grad(loss, (1, 2), has_aux=True)(product, x, kernel)

    (_, y), gradients = run(products.product, x, kernel)
    wide = run(jnp.matmul, x.astype(jnp.float32), kernel.astype(jnp.float32))
    (_, y_wide), gradients_wide = wide
    for got, want in zip((y, *gradients), (y_wide, *gradients_wide), strict=True):
        assert got.dtype == jnp.bfloat16
        np.testing.assert_allclose(
            got.astype(jnp.float32), want.astype(jnp.bfloat16).astype(jnp.float32), rtol=8e-3
        )
    # All three products keep their bfloat16 operands and are asked for float32; where the CPU
    # stands in for GPUs, none is.
    written = str(jax.make_jaxpr(lambda x, k: run(products.product, x, k))(x, kernel))
    assert written.count("preferred_element_type=float32") == written.count("dot_general") == 3
    with products.standing_for_gpu():
        written = str(jax.make_jaxpr(lambda x, k: run(products.product, x, k))(x, kernel))
    assert "preferred_element_type=float32" not in written


def has_amx() -> bool:
    described = pathlib.Path("/proc/cpuinfo")
    return described.exists() and "amx_bf16" in described.read_text()


@pytest.mark.skipif(not has_amx(), reason="this CPU has no bfloat16 units")
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 48), (48, 64)])
def test_bfloat16_units_compute_a_product_and_both_its_gradients(inputs, outputs):
    x, kernel, d_y = (
        jnp.ones(shape, jnp.bfloat16)
        for shape in ((2, 48, inputs), (inputs, outputs), (2, 48, outputs))
    )

    def run(x, kernel, d_y):
        y, backward = jax.vjp(products.product, x, kernel)
        return y, backward(d_y)

    compiled = jax.jit(run).lower(x, kernel, d_y).compile().as_text()
    with_dot = r"^%\S+ \(([^)]*)\) -> \S+ \{\n(?:  .*\n)*?.* dot\("
    found = re.findall(with_dot, compiled, re.M)
    assert len(found) == 3, compiled
    for operands in found:
        assert operands.count("bf16[") == 2, operands
