"""Keeps the rows of activations spread over the data and fsdp axes of the mesh."""

from __future__ import annotations

import math

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
