"""Model states as checkpoint tensors, and checkpoint tensors as safetensors files."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import struct
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, wait

import jax
import numpy as np
from flax import nnx

from mm_jax.weights import keymap
from mm_jax.weights.load import TILE, WORKERS, bits, box_of, overlap, param_shapes
from mm_jax.weights.tensors import NAMES, Tensor, WeightsError

SHARD_BYTES = 5_000_000_000


def tensors_of(state: nnx.State, table: dict[str, str], dtype=None) -> dict[str, Tensor]:
    """A state's parameters as the checkpoint's tensors, in their own dtypes or in `dtype`; read
    from the devices of this process block by block, never copied whole."""
    flat = nnx.to_flat_state(state)
    out: dict[str, Tensor] = {}
    for e, (_, variable) in zip(keymap.entries(param_shapes(state), table), flat, strict=True):
        value = variable.get_value()
        kind = np.dtype(value.dtype if dtype is None else dtype)
        for i, key in enumerate(e.keys):
            read = functools.partial(read_rows, key, e, value, i if e.stacked else None, kind)
            out[key] = Tensor(e.torch_shape(value.shape), kind, read)
    return out


def read_rows(
    key: str,
    e: keymap.Entry,
    value: jax.Array,
    layer: int | None,
    dtype: np.dtype,
    start: int,
    stop: int,
) -> np.ndarray:
    """Rows of one layer's tensor in the checkpoint's layout, from the shards of `value`. Raises
    WeightsError where float16 cannot hold a value."""
    shape = e.torch_shape(value.shape)
    out = np.empty((stop - start, *shape[1:]) if shape else (), dtype)
    ours = e.from_torch(out)  # a view: what is written there is in the checkpoint's layout
    axis = ours.ndim - 1 if e.kernel else 0
    for shard in value.addressable_shards:
        if shard.replica_id:
            continue
        box = box_of(shard.index, value.shape)
        for at in range(0, stop - start, TILE):
            tile = ours[..., at : at + TILE] if axis else ours[at : at + TILE] if shape else ours
            found = overlap(box, layer, axis, start + at, tile)
            if found is not None:
                source, target = found
                with np.errstate(over="ignore"):
                    whole = take(shard.data, source)
                    part = whole.astype(dtype, copy=False)
                if dtype == np.float16 and np.isinf(part).any() and np.isfinite(whole).all():
                    raise WeightsError(f"weights: {key} has values that float16 cannot hold")
                bits(target)[...] = bits(part)
    return out


def take(data: jax.Array, index: tuple) -> np.ndarray:
    """Part of a device's array; elsewhere than on CPU only that part is copied to the host."""
    if data.device.platform == "cpu":
        return np.asarray(data)[index]
    begin = tuple(i if isinstance(i, int) else i.start for i in index)
    sizes = tuple(1 if isinstance(i, int) else i.stop - i.start for i in index)
    part = np.asarray(_slice(data, begin, sizes))
    return part.reshape([n for n, i in zip(sizes, index, strict=True) if not isinstance(i, int)])


@functools.partial(jax.jit, static_argnums=2)
def _slice(data: jax.Array, begin: tuple[int, ...], sizes: tuple[int, ...]) -> jax.Array:
    return jax.lax.dynamic_slice(data, begin, sizes)


def to_checkpoint(state: nnx.State, table: dict[str, str]) -> dict[str, np.ndarray]:
    """Checkpoint key -> array, for every parameter of a state (small models)."""
    return {key: tensor.array() for key, tensor in tensors_of(state, table).items()}


def write_safetensors(
    folder: pathlib.Path, tensors: Mapping[str, Tensor], stem: str = "model"
) -> None:
    """`stem`.safetensors, or numbered parts of up to 5 GB with an index, in an existing folder."""
    parts: list[dict[str, Tensor]] = [{}]
    size = 0
    for key, tensor in tensors.items():
        if parts[-1] and size + tensor.nbytes > SHARD_BYTES:
            parts.append({})
            size = 0
        parts[-1][key] = tensor
        size += tensor.nbytes
    names = [f"{stem}.safetensors"]
    if len(parts) > 1:
        names = [f"{stem}-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))]
        index = {
            "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
            "weight_map": {k: n for n, part in zip(names, parts, strict=True) for k in part},
        }
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1))
    with ThreadPoolExecutor(WORKERS) as pool:
        for name, part in zip(names, parts, strict=True):
            _write_file(folder / name, part, pool)


def _write_file(path: pathlib.Path, tensors: Mapping[str, Tensor], pool) -> None:
    header: dict = {"__metadata__": {"format": "pt"}}
    at = 0
    for key, tensor in tensors.items():
        header[key] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.flush()
        file.truncate(8 + len(text) + at)

        def write(tensor: Tensor, offset: int, start: int, stop: int) -> None:
            rows = np.ascontiguousarray(tensor.rows(start, stop))
            row = tensor.nbytes // (tensor.shape[0] if tensor.shape else 1)
            data, done = memoryview(bits(rows).reshape(-1)).cast("B"), 0
            while done < len(data):
                begin = offset + start * row + done
                done += os.pwrite(file.fileno(), data[done : done + (1 << 30)], begin)

        jobs = []
        for key, tensor in tensors.items():
            offset = 8 + len(text) + header[key]["data_offsets"][0]
            spans = tensor.blocks() if tensor.shape else [(0, 1)]
            jobs += [pool.submit(write, tensor, offset, *span) for span in spans]
        try:
            for job in jobs:
                job.result()
        except BaseException:
            for job in jobs:
                job.cancel()
            wait(jobs)  # before the file is closed under them
            raise
        os.fsync(file.fileno())
