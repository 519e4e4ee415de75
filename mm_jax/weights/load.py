"""Checkpoint tensors straight into sharded model states, by the key table."""

from __future__ import annotations

import difflib
import functools
import math
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from mm_jax.weights import keymap
from mm_jax.weights.tensors import BLOCK, Tensor, WeightsError, aligned_empty

FLOATS = tuple(np.dtype(t) for t in (np.float32, ml_dtypes.bfloat16, np.float16))
SHOWN = 20  # problems of a kind that an error names
TILE = 256  # rows transposed at a time: what they touch stays in the cache
WORKERS = min(16, 3 * (os.cpu_count() or 1))  # threads; most of the time they wait for the disk
ALIGN = 64  # bytes; XLA's CPU backend takes host arrays aligned so as they are


def param_shapes(state: nnx.State) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Path -> shape of every parameter of a (possibly abstract) state."""
    return {tuple(map(str, path)): v.shape for path, v in nnx.to_flat_state(state)}


def check_tensors(
    name: str,
    entries: Iterable[keymap.Entry],
    shapes: Mapping[tuple[str, ...], tuple[int, ...]],
    tensors: Mapping[str, Tensor],
    ignore: Iterable[str] = (),
) -> None:
    """Raises WeightsError once, naming every missing, unexpected (`ignore`: key prefixes that may
    be left over) and misshapen tensor; a missing one with its nearest unexpected name."""
    missing, misshapen, wanted = [], [], set()
    for e in entries:
        wanted.update(e.keys)
        found = [key for key in e.keys if key in tensors]
        if e.shared:
            missing += [] if found else e.keys[:1]
        else:
            missing += [key for key in e.keys if key not in tensors]
        expected = e.torch_shape(shapes[e.path])
        for key in found:
            if tensors[key].shape != expected:
                misshapen.append(f"{key}: expected {expected}, got {tensors[key].shape}")
            elif tensors[key].dtype not in FLOATS:
                kinds = ", ".join(map(str, FLOATS))
                misshapen.append(f"{key}: expected one of {kinds}, got {tensors[key].dtype}")
        if e.shared and len({tensors[key].array().tobytes() for key in found}) > 1:
            misshapen.append(f"{found[0]}: expected the same values for every layer")
    ignore = tuple(ignore)
    unexpected = sorted(k for k in tensors if k not in wanted and not k.startswith(ignore or "\0"))
    if not (missing or misshapen or unexpected):
        return
    nearest = {}
    for key in missing[:SHOWN]:
        close = difflib.get_close_matches(key, unexpected, n=1, cutoff=0.8)
        nearest[key] = f"{key} (nearest: {close[0]})" if close else key

    def listed(what: str, keys: list[str]) -> str:
        shown = ", ".join(nearest.get(k, k) for k in keys[:SHOWN])
        return f"{len(keys)} {what}: {shown}" + (", ..." if len(keys) > SHOWN else "")

    kinds = (
        ("missing", missing),
        ("unexpected", unexpected),
        ("of a wrong shape or kind", misshapen),
    )
    raise WeightsError(f"weights: {name}: " + "; ".join(listed(w, k) for w, k in kinds if k))


def load_state(
    state: nnx.State,
    table: dict[str, str],
    tensors: Mapping[str, Tensor],
    *,
    name: str = "the checkpoint",
    ignore: Iterable[str] = (),
    shardings: nnx.State | None = None,
    dtype: Callable[[tuple, np.dtype], np.dtype] | None = None,
) -> nnx.State:
    """The state with every parameter read from a checkpoint.

    `state` may be abstract (`nnx.eval_shape`); `dtype(path, the tensor's)` is that of a parameter
    (default: the state's own; where layers differ, the widest is the tensor's). Tensors are read in
    blocks, by several threads, straight into the shards of this process: the host holds no whole
    copy beside them. Raises WeightsError before anything is read (see `check_tensors`).
    """
    shapes = param_shapes(state)
    entries = keymap.entries(shapes, table)
    check_tensors(name, entries, shapes, tensors, ignore)
    where = dict(nnx.to_flat_state(shardings)) if shardings is not None else {}
    one_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    parts, jobs = [], []
    pool = ThreadPoolExecutor(WORKERS)
    try:
        for e, (path, variable) in zip(entries, nnx.to_flat_state(state), strict=True):
            kind = variable.dtype
            if dtype is not None:
                found = [tensors[key].dtype for key in e.keys if key in tensors]
                kind = dtype(path, functools.reduce(jnp.promote_types, found))
            sharding = where[path].get_value() if path in where else one_device
            shards = [
                make_shard(device, box_of(index, variable.shape), np.dtype(kind))
                for device, index in sharding.addressable_devices_indices_map(
                    variable.shape
                ).items()
            ]
            parts.append((path, variable, sharding, shards))
            jobs += [pool.submit(*job) for job in fill_jobs(e, tensors, shards, np.dtype(kind))]
        for job in jobs:
            job.result()
    finally:
        pool.shutdown(cancel_futures=True)
    new = []
    for path, variable, sharding, shards in parts:
        arrays = [shard.finish() for shard in shards]
        value = jax.make_array_from_single_device_arrays(variable.shape, sharding, arrays)
        new.append((path, variable.replace(value)))
    return nnx.from_flat_state(new)


def fill_jobs(e: keymap.Entry, tensors: Mapping[str, Tensor], shards: list, dtype: np.dtype):
    """(function, arguments) of every block to be read into a parameter's shards."""
    for layer, key in enumerate(e.keys if e.stacked else (e.first(tensors),)):
        if e.stacked and not any(s.box[0][0] <= layer < s.box[0][1] for s in shards):
            continue
        tensor = tensors[key]
        for span in tensor.blocks() if tensor.shape else [(0, 1)]:
            yield fill, e, tensor, layer if e.stacked else None, shards, dtype, *span


def fill(
    e: keymap.Entry,
    tensor: Tensor,
    layer: int | None,
    shards: list,
    dtype: np.dtype,
    start: int,
    stop: int,
) -> None:
    """Reads rows of a tensor and puts them where they belong in every shard."""
    block = tensor.rows(start, stop)
    for at in range(0, len(block), TILE) if block.ndim else (0,):
        tile = block[at : at + TILE] if block.ndim else block
        tile = e.from_torch(tile.astype(dtype, copy=False))
        # The checkpoint's first axis is a kernel's last one here.
        axis = tile.ndim - 1 if e.kernel else 0
        for shard in shards:
            shard.write(layer, axis, start + at, tile)
    for shard in shards:
        shard.flush(layer)


def box_of(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """(first, end) of every axis of a shard."""
    return tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))


def bits(array: np.ndarray) -> np.ndarray:
    """bfloat16 as uint16, which numpy copies several times faster; others as they are."""
    return array.view(np.uint16) if array.dtype == ml_dtypes.bfloat16 else array


class HostShard:
    """A device's part of a parameter, put together in host memory and handed over whole."""

    def __init__(self, device: jax.Device, box: tuple[tuple[int, int], ...], dtype: np.dtype):
        self.device, self.box = device, box
        shape = tuple(b - a for a, b in box)
        raw = aligned_empty(math.prod(shape) * dtype.itemsize, ALIGN)
        self.array = raw.view(dtype).reshape(shape)

    def write(self, layer: int | None, axis: int, start: int, tile: np.ndarray) -> None:
        """Puts what falls in here of `tile` (one layer's, from `start` on along `axis`)."""
        found = overlap(self.box, layer, axis, start, tile)
        if found is not None:
            target, source = found
            bits(self.array)[target] = bits(source)

    def flush(self, layer: int | None) -> None:
        pass

    def finish(self) -> jax.Array:
        return jax.device_put(self.array, self.device)


class DeviceShard:
    """A device's part of a parameter too large for a copy on the host: written on the device, in
    place, block by block."""

    def __init__(self, device: jax.Device, box: tuple[tuple[int, int], ...], dtype: np.dtype):
        self.device, self.box, self.lock = device, box, threading.Lock()
        shape = tuple(b - a for a, b in box)
        where = jax.sharding.SingleDeviceSharding(device)
        self.array = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=where)()
        self.pending = threading.local()

    def write(self, layer: int | None, axis: int, start: int, tile: np.ndarray) -> None:
        found = overlap(self.box, layer, axis, start, tile)
        if found is not None:
            target, source = found
            if not hasattr(self.pending, "tiles"):
                self.pending.tiles, self.pending.axis = [], axis
                self.pending.begin = tuple(t if isinstance(t, int) else t.start for t in target)
            self.pending.tiles.append(np.ascontiguousarray(bits(source)))

    def flush(self, layer: int | None) -> None:
        """Sends what this thread has written since the last flush."""
        if not hasattr(self.pending, "tiles"):
            return
        block = np.concatenate(self.pending.tiles, axis=self.pending.axis)
        if layer is not None:
            block = block[None]
        block = jax.device_put(block.view(self.array.dtype), self.device)
        with self.lock:
            self.array = put_block(self.array, block, self.pending.begin)
            self.array.block_until_ready()  # or blocks queue up faster than the device takes them
        del self.pending.tiles

    def finish(self) -> jax.Array:
        return self.array


@functools.partial(jax.jit, donate_argnums=0)
def put_block(array: jax.Array, block: jax.Array, begin: tuple[int, ...]) -> jax.Array:
    return jax.lax.dynamic_update_slice(array, block, begin)


def make_shard(device: jax.Device, box: tuple[tuple[int, int], ...], dtype: np.dtype):
    """On a CPU device the host's array becomes the buffer itself; elsewhere large parts are written
    on the device."""
    size = math.prod(b - a for a, b in box) * dtype.itemsize
    on_host = device.platform == "cpu" or size <= BLOCK
    return (HostShard if on_host else DeviceShard)(device, box, dtype)


def overlap(box, layer: int | None, axis: int, start: int, tile: np.ndarray):
    """(index into the shard's array, part of the tile), or None where they do not meet."""
    target: list = []
    if layer is not None:
        (first, last), box = box[0], box[1:]
        if not first <= layer < last:
            return None
        target.append(layer - first)
    source = []
    for i, (a, b) in enumerate(box):
        offset = start if i == axis else 0
        low, high = max(a, offset), min(b, offset + tile.shape[i])
        if low >= high and tile.shape[i]:
            return None
        target.append(slice(low - a, high - a))
        source.append(slice(low - offset, high - offset))
    return tuple(target), tile[tuple(source)]
