"""The mesh, the rules that map logical axes to its axes, and moving batches to and from it."""

from __future__ import annotations

import math

import jax
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mm_jax.ops.partition import BATCH_AXES

AXES = ("data", "fsdp", "tensor")

# Logical axis of a parameter -> mesh axis. fsdp shards the width, and weights are gathered where
# they are used. tensor splits q, k, v, gate and up by outputs, o and down by inputs (Megatron-LM),
# so that attention and MLP end in one all-reduce each. Embedding tables are sharded only on the
# vocabulary; over tensor first, so that a tied head is gathered over fsdp alone.
RULES = {
    "vocab_in": ("tensor", "fsdp"),
    "embed_in": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "norm": None,
    "layers": None,
}

# For rollouts: weights are gathered over fsdp once per step, not once per decoded token.
ROLLOUT_RULES = {**RULES, "vocab_in": "tensor", "embed": None}


def make_mesh(sizes: dict[str, int], devices=None) -> Mesh:
    """Builds the mesh (data, fsdp, tensor); one size may be -1 and takes the remaining devices."""
    devices = jax.devices() if devices is None else devices
    shape = [sizes[axis] for axis in AXES]
    if shape.count(-1) > 1 or any(n < 1 and n != -1 for n in shape):
        raise ValueError(f"mesh: expected sizes >= 1, at most one -1; got {dict(sizes)}")
    known = math.prod(n for n in shape if n != -1)
    shape = [len(devices) // known if n == -1 else n for n in shape]
    if math.prod(shape) != len(devices):
        raise ValueError(
            f"mesh: {dict(zip(AXES, shape, strict=True))} has {math.prod(shape)} places for "
            f"{len(devices)} devices"
        )
    # Auto: XLA propagates shardings inside a step from its inputs, outputs and `rows_apart`.
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def param_spec(
    names: tuple | None, shape: tuple[int, ...], mesh: Mesh, rules: dict = RULES
) -> PartitionSpec:
    """Returns the partition of one parameter by `rules`.

    A dimension is replicated if its mesh axes do not divide it (jit refuses uneven shards), or if
    an earlier dimension uses one of them.
    """
    names = names or (None,) * len(shape)
    used: set[str] = set()
    spec = []
    for name, size in zip(names, shape, strict=True):
        axes = rules[name] if name is not None else None
        axes = (axes,) if isinstance(axes, str) else axes or ()
        if set(axes) & used or size % math.prod(mesh.shape[a] for a in axes):
            axes = ()
        used.update(axes)
        spec.append(axes if len(axes) > 1 else axes[0] if axes else None)
    return PartitionSpec(*spec)


def param_shardings(state: nnx.State, mesh: Mesh, rules: dict = RULES) -> nnx.State:
    """Returns the same tree with a NamedSharding in place of every parameter."""
    flat = []
    for path, variable in nnx.to_flat_state(state):
        names = variable.get_metadata().get("out_sharding")
        spec = param_spec(names, variable.shape, mesh, rules)
        flat.append((path, variable.replace(NamedSharding(mesh, spec))))
    return nnx.from_flat_state(flat)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: its rows over the data and fsdp axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_parallelism(mesh: Mesh) -> int:
    """Counts the ways a batch is split; its size must be a multiple of this."""
    return math.prod(mesh.shape[a] for a in BATCH_AXES)


def batch_share(mesh: Mesh) -> tuple[int, int]:
    """Returns (i, n): this process supplies the i-th of n equal shares of a batch's rows.

    n is the number of processes, unless the tensor axis spans several: these supply the same rows.
    """
    rows = batch_parallelism(mesh)
    places = batch_sharding(mesh).addressable_devices_indices_map((rows,)).values()
    own = sorted({(rows_of[0].start or 0) for rows_of in places})
    share = len(own)
    if own != list(range(own[0], own[0] + share)) or own[0] % share:
        raise ValueError(f"mesh: rows {own} of {rows} on one process are not an equal share")
    return own[0] // share, rows // share


def put_batch(batch, mesh: Mesh):
    """Makes global arrays from this process's rows; the other processes supply theirs."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda a: jax.make_array_from_process_local_data(sharding, a), batch)


def put_whole_batch(batch, mesh: Mesh):
    """Makes global arrays from a batch that every process holds whole."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(
        lambda a: jax.make_array_from_callback(a.shape, sharding, lambda index: a[index]), batch
    )


def fetch(tree):
    """Returns arrays as whole numpy arrays on every process."""

    def one(a):
        # What every process holds whole is not gathered; process-local arrays would be joined.
        if not isinstance(a, jax.Array) or a.is_fully_addressable or a.is_fully_replicated:
            return jax.device_get(a)
        return multihost_utils.process_allgather(a, tiled=True)

    return jax.tree.map(one, tree)


class OnMesh:
    """Calls and lowers a jitted function with a mesh set.

    `rows_apart` and the scan kernel ask for the mesh while the function is traced.
    """

    def __init__(self, jitted, mesh: Mesh):
        self.jitted, self.mesh = jitted, mesh

    def __call__(self, *args):
        with jax.set_mesh(self.mesh):
            return self.jitted(*args)

    def lower(self, *args):
        with jax.set_mesh(self.mesh):
            return self.jitted.lower(*args)


def abstract_rows(tree, mesh: Mesh, count: int | None = None):
    """Returns shapes whose first axis (of size `count`) is sharded like a batch's rows."""
    where = batch_sharding(mesh)

    def one(a):
        shape = a.shape if count is None else (count, *a.shape[1:])
        return jax.ShapeDtypeStruct(shape, a.dtype, sharding=where)

    return jax.tree.map(one, tree)
