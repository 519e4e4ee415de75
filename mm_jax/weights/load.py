"""Reads checkpoint tensors straight into sharded model states, guided by the key table."""

from __future__ import annotations

import difflib
import functools
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from mm_jax.weights import keymap
from mm_jax.weights.tensors import BLOCK, Tensor, WeightsError, aligned_empty

FLOATS = tuple(np.dtype(t) for t in (np.float32, ml_dtypes.bfloat16, np.float16))
SHOWN = 20  # problems of one kind that an error names
# Rows converted and transposed at a time. A transposing copy touches one cache line per row and
# column; with larger tiles, lines would leave the cache before they are used up.
TILE = 256
WORKERS = min(16, 3 * (os.cpu_count() or 1))  # threads; most of the time they wait for the disk
# Bytes. XLA's CPU backend adopts host arrays aligned like this as buffers; others it copies.
ALIGN = 64

Box = tuple[tuple[int, int], ...]  # (first, end) along every axis of a parameter


def param_shapes(state: nnx.State) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Maps the path of every parameter of a (possibly abstract) state to its shape."""
    return {tuple(map(str, path)): v.shape for path, v in nnx.to_flat_state(state)}


def check_tensors(
    name: str,
    entries: Iterable[keymap.Entry],
    shapes: Mapping[tuple[str, ...], tuple[int, ...]],
    tensors: Mapping[str, Tensor],
    ignore: Iterable[str] = (),
) -> None:
    """Compares a checkpoint's tensors with what the entries need.

    Raises WeightsError once, naming every missing, unexpected and misshapen tensor, and for a
    missing one the nearest unexpected name. Keys that start with one of `ignore` may be left over.
    """
    missing, misshapen, wanted = [], [], set()
    for e in entries:
        wanted.update(e.keys)
        found = [key for key in e.keys if key in tensors]
        if not (e.shared and found):
            missing += [key for key in e.keys[: 1 if e.shared else None] if key not in tensors]
        expected = e.torch_shape(shapes[e.path])
        for key in found:
            if tensors[key].shape != expected:
                misshapen.append(f"{key}: expected {expected}, got {tensors[key].shape}")
            elif tensors[key].dtype not in FLOATS:
                allowed = ", ".join(map(str, FLOATS))
                misshapen.append(f"{key}: expected one of {allowed}, got {tensors[key].dtype}")
        if e.shared and len({tensors[key].array().tobytes() for key in found}) > 1:
            misshapen.append(f"{found[0]}: expected the same values for every layer")
    left = set(tensors) - wanted
    unexpected = sorted(key for key in left if not key.startswith(tuple(ignore)))
    nearest = {}
    for key in missing[:SHOWN]:
        close = difflib.get_close_matches(key, unexpected, n=1, cutoff=0.8)
        nearest[key] = f"{key} (nearest: {close[0]})" if close else key
    kinds = {"missing": missing, "unexpected": unexpected, "of a wrong shape or type": misshapen}
    problems = []
    for what, keys in kinds.items():
        shown = [nearest.get(key, key) for key in keys[:SHOWN]] + ["..."] * (len(keys) > SHOWN)
        problems += [f"{len(keys)} {what}: {', '.join(shown)}"] if keys else []
    if problems:
        raise WeightsError(f"weights: {name}: {'; '.join(problems)}")


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
    """Returns the state with every parameter read from a checkpoint.

    `state` may be abstract (`nnx.eval_shape`). `dtype(path, stored)` chooses a parameter's dtype,
    where `stored` is the tensor's (the widest where layers differ); the default is the state's.
    Several threads read the tensors in blocks, straight into the shards of this process, so that
    the host never holds a second whole copy. Raises WeightsError before any data are read (see
    `check_tensors`).
    """
    shapes = param_shapes(state)
    entries = keymap.entries(shapes, table)
    check_tensors(name, entries, shapes, tensors, ignore)
    where = dict(nnx.to_flat_state(shardings)) if shardings is not None else {}
    one_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    parts = []

    def jobs() -> Iterator[tuple]:
        for e, (path, variable) in zip(entries, nnx.to_flat_state(state), strict=True):
            chosen = variable.dtype
            if dtype is not None:
                stored = [tensors[key].dtype for key in e.keys if key in tensors]
                chosen = dtype(path, functools.reduce(jnp.promote_types, stored))
            sharding = where[path].get_value() if path in where else one_device
            places = sharding.addressable_devices_indices_map(variable.shape)
            shards = [
                make_shard(device, box_of(index, variable.shape), np.dtype(chosen))
                for device, index in places.items()
            ]
            parts.append((path, variable, sharding, shards))
            present = [(layer, key) for layer, key in enumerate(e.keys) if key in tensors]
            for layer, key in present if e.stacked else present[:1]:
                if any(not e.stacked or s.box[0][0] <= layer < s.box[0][1] for s in shards):
                    for span in tensors[key].blocks():
                        yield fill, e, tensors[key], layer, shards, *span

    run_in_threads(jobs())
    new = []
    for path, variable, sharding, shards in parts:
        arrays = [shard.finish() for shard in shards]
        value = jax.make_array_from_single_device_arrays(variable.shape, sharding, arrays)
        new.append((path, variable.replace(value)))
    return nnx.from_flat_state(new)


def run_in_threads(jobs: Iterable[tuple]) -> None:
    """Calls every (function, *arguments) in threads.

    After an error it starts no further job, waits for those under way, and raises the error.
    """
    pool = ThreadPoolExecutor(WORKERS)
    try:
        for future in [pool.submit(*job) for job in jobs]:
            future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def fill(e: keymap.Entry, tensor: Tensor, layer: int, shards: list, start: int, stop: int) -> None:
    """Reads rows of a tensor and puts them where they belong in every shard."""
    rows, dtype = tensor.rows(start, stop), shards[0].array.dtype
    for i, target, part in meetings(e, layer, start, rows, [s.box for s in shards], dtype):
        shards[i].write(target, bits(part))
        del part  # so that the next converted tile reuses its memory, which the cache holds
    for shard in shards:
        shard.flush(e.row_axis)


def meetings(
    e: keymap.Entry, layer: int, start: int, rows: np.ndarray, boxes: list[Box], dtype: np.dtype
) -> Iterator[tuple[int, tuple[slice, ...], np.ndarray]]:
    """Yields (i, index, part) where one layer's rows, from `start` on, overlap boxes[i].

    `index` is the place in that box; `part` is in the parameter's layout and in `dtype`, a view if
    the rows have that dtype. At most TILE rows are converted at a time.
    """
    for at in range(0, len(rows), TILE) if rows.ndim else (0,):
        tile = rows[at : at + TILE] if rows.ndim else rows
        tile = e.from_torch(tile.astype(dtype, copy=False))
        tile = tile[None] if e.stacked else tile
        begin = [0] * tile.ndim
        if rows.ndim:
            begin[e.row_axis] = start + at
        if e.stacked:
            begin[0] = layer
        place = tuple((a, a + n) for a, n in zip(begin, tile.shape, strict=True))
        for i, box in enumerate(boxes):
            met = overlap(box, place)
            if met is not None:
                yield i, met[0], tile[(..., *met[1])]  # with ..., a scalar stays a view


def overlap(box: Box, other: Box) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """Returns the slices of both boxes where they overlap, or None if they do not."""
    met = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, other, strict=True)]
    if any(low >= high for low, high in met):
        return None

    def within(outer: Box) -> tuple[slice, ...]:
        return tuple(slice(b - a, c - a) for (b, c), (a, _) in zip(met, outer, strict=True))

    return within(box), within(other)


def box_of(index: tuple[slice, ...], shape: tuple[int, ...]) -> Box:
    """Returns the box of a shard from its jax index."""
    return tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))


def bits(array: np.ndarray) -> np.ndarray:
    """Views bfloat16 as uint16, which numpy copies several times faster.

    (It copies its own types in vectorised loops, but custom ones such as ml_dtypes' one element at
    a time.)
    """
    return array.view(np.uint16) if array.dtype == ml_dtypes.bfloat16 else array


class HostShard:
    """Collects one device's part of a parameter in host memory, to be transferred whole."""

    def __init__(self, device: jax.Device, box: Box, dtype: np.dtype):
        self.device, self.box = device, box
        shape = tuple(b - a for a, b in box)
        raw = aligned_empty(math.prod(shape) * dtype.itemsize, ALIGN)
        self.array = raw.view(dtype).reshape(shape)

    def write(self, target: tuple[slice, ...], part: np.ndarray) -> None:
        bits(self.array)[target] = part

    def flush(self, axis: int) -> None:
        """Does nothing: tiles are in place already."""

    def finish(self) -> jax.Array:
        return jax.device_put(self.array, self.device)


class DeviceShard:
    """Collects one device's part of a parameter on the device, in place and block by block.

    Used for parts that are too large for a copy on the host.
    """

    def __init__(self, device: jax.Device, box: Box, dtype: np.dtype):
        self.device, self.box, self.lock = device, box, threading.Lock()
        shape = tuple(b - a for a, b in box)
        where = jax.sharding.SingleDeviceSharding(device)
        self.array = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=where)()
        self.pending = threading.local()  # each thread collects the tiles of its own block

    def write(self, target: tuple[slice, ...], part: np.ndarray) -> None:
        if not hasattr(self.pending, "tiles"):
            self.pending.tiles, self.pending.begin = [], tuple(s.start for s in target)
        self.pending.tiles.append(np.ascontiguousarray(part))

    def flush(self, axis: int) -> None:
        """Sends what this thread has written since the last flush, as one block along `axis`."""
        if not hasattr(self.pending, "tiles"):
            return
        block = np.concatenate(self.pending.tiles, axis=axis)
        block = jax.device_put(block.view(self.array.dtype), self.device)
        with self.lock:
            self.array = put_block(self.array, block, self.pending.begin)
            self.array.block_until_ready()  # else blocks queue up faster than the device takes them
        del self.pending.tiles

    def finish(self) -> jax.Array:
        return self.array


# Donated, so that XLA updates the array in place instead of allocating a second one.
put_block = jax.jit(jax.lax.dynamic_update_slice, donate_argnums=0)


def make_shard(device: jax.Device, box: Box, dtype: np.dtype) -> HostShard | DeviceShard:
    """Chooses where to collect a part: small ones and all of a CPU device on the host.

    On CPU the host's array becomes the device's buffer itself.
    """
    size = math.prod(b - a for a, b in box) * dtype.itemsize
    on_host = device.platform == "cpu" or size <= BLOCK
    return (HostShard if on_host else DeviceShard)(device, box, dtype)
