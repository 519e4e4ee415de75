"""Keeps the rows of activations spread over the data and fsdp axes of the mesh."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec

BATCH_AXES = ("data", "fsdp")


def batch_ways() -> int:
    """Counts the devices over which the current mesh spreads the rows of a batch."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def rows_apart(x: jax.Array) -> jax.Array:
    """Constrains axis 0 of x to the mesh's batch axes, if a mesh is set and they divide it.

    Otherwise XLA may gather the rows and split the products over fsdp instead, which costs the
    memory and the traffic of all activations.
    """
    if jax.sharding.get_abstract_mesh().empty or x.shape[0] % batch_ways():
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES))


def on_own_rows(run: Callable, x: jax.Array, *shared: jax.Array) -> jax.Array:
    """Computes run(x, *shared) with every device on its own rows of x, `shared` whole on each.

    For what XLA does not split by rows, such as a grouped convolution: it would gather all rows on
    every device. `run` must treat every row alone.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or x.shape[0] % batch_ways():
        return run(x, *shared)
    rows = PartitionSpec(BATCH_AXES)
    specs = (rows, *(PartitionSpec() for _ in shared))
    return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=rows)(x, *shared)
