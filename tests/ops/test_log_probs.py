"""Tests the language model's head on a mesh against the same functions without one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mm_jax.models.sharding import batch_sharding, make_mesh
from mm_jax.ops.log_probs import token_log_probs


@pytest.mark.parametrize(
    ("width", "vocabulary"), [(8, 48), (7, 48), (8, 49)], ids=["split", "odd width", "odd words"]
)
def test_a_mesh_changes_nothing(width, vocabulary):
    """Values and gradients, also of ties over the shards of the vocabulary, with padded columns, on
    a 2 x 2 x 2 mesh; the counted positions of a row end in different chunks."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(8, 11, width)), jnp.float32)
    kernel = rng.normal(size=(width, vocabulary))
    kernel[:, 3] *= 3
    kernel[:, 40] = kernel[:, 3]  # ties between the vocabulary's halves
    kernel = jnp.asarray(kernel, jnp.float32)
    targets = jnp.asarray(rng.integers(0, vocabulary - 5, (8, 11)))
    weights = jnp.asarray(rng.normal(size=(8, 11)), jnp.float32)
    counted = jnp.asarray(rng.random((8, 11)) < 0.5)

    def run(hidden, kernel, targets, weights, counted):
        def loss(hidden, kernel):
            found = token_log_probs(hidden, kernel, targets, 0.7, 2, 5, counted)
            return jnp.sum(weights * jnp.where(counted, found.logps, 0)), found

        (_, found), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, kernel)
        frozen, _ = jax.grad(loss, has_aux=True)(hidden, kernel)
        return found, gradients, frozen

    plain = jax.jit(run)(hidden, kernel, targets, weights, counted)
    assert 3 in np.asarray(plain[0].best)[np.asarray(counted)]
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, jax.devices()[:8])
    rows = batch_sharding(mesh)
    split = P(None if width % 2 else "fsdp", None if vocabulary % 2 else "tensor")
    where = (rows, NamedSharding(mesh, split), rows, rows, rows)
    with jax.set_mesh(mesh):
        arrays = jax.device_put((hidden, kernel, targets, weights, counted), where)
        spread = jax.jit(run, in_shardings=where)(*arrays)
    np.testing.assert_array_equal(spread[0].best, plain[0].best)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), spread, plain)


@pytest.mark.parametrize("sizes", [None, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_a_target_that_is_no_token_has_no_finite_loss(sizes):
    hidden, kernel = jnp.ones((4, 3, 8)), jnp.ones((8, 16))
    targets = jnp.array([[0, 11, 1], [12, 2, 2], [16, 2, 2], [-1, 2, 2]])  # 12 to 15 are padding
    head = jax.jit(lambda h, k, t: token_log_probs(h, k, t, vocab_padding=4).logps)
    if sizes is None:
        found = head(hidden, kernel, targets)
    else:
        with jax.set_mesh(make_mesh(sizes, jax.devices()[:8])):
            found = head(hidden, kernel, targets)
    finite = np.ones((4, 3), bool)
    finite[1:, 0] = False
    np.testing.assert_array_equal(np.isfinite(found), finite)
    np.testing.assert_allclose(np.asarray(found)[finite], -np.log(12), rtol=1e-6)
