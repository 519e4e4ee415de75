"""Turns model states into checkpoint tensors, and writes tensors as safetensors files."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pathlib
import struct
from collections.abc import Iterator, Mapping
from typing import BinaryIO

import jax
import numpy as np
from flax import nnx
from huggingface_hub import split_state_dict_into_shards_factory

from mm_jax.weights import keymap
from mm_jax.weights.load import bits, box_of, meetings, param_shapes, run_in_threads
from mm_jax.weights.tensors import NAMES, Tensor, WeightsError

SHARD_BYTES = 5_000_000_000  # per file at most


def tensors_of(state: nnx.State, table: dict[str, str], dtype=None) -> dict[str, Tensor]:
    """Returns a state's parameters as checkpoint tensors, in their own dtypes or in `dtype`.

    They are read from this process's devices block by block and never copied whole.
    """
    flat = nnx.to_flat_state(state)
    out: dict[str, Tensor] = {}
    for e, (_, variable) in zip(keymap.entries(param_shapes(state), table), flat, strict=True):
        value = variable.get_value()
        chosen = np.dtype(value.dtype if dtype is None else dtype)
        for layer, key in enumerate(e.keys):
            read = functools.partial(read_rows, key, e, value, layer, chosen)
            out[key] = Tensor(e.torch_shape(value.shape), chosen, read)
    return out


def read_rows(
    key: str,
    e: keymap.Entry,
    value: jax.Array,
    layer: int,
    dtype: np.dtype,
    start: int,
    stop: int,
) -> np.ndarray:
    """Reads rows of one layer's tensor, in the checkpoint's layout, from the shards of `value`.
    Raises WeightsError if float16 cannot hold a value."""
    shape = e.torch_shape(value.shape)
    out = np.empty((stop - start, *shape[1:]) if shape else (), dtype)
    shards = [s for s in value.addressable_shards if s.replica_id == 0]
    boxes = [box_of(s.index, value.shape) for s in shards]
    # `part` is a transposed view of `out`: writing in our layout fills the checkpoint's.
    for i, index, part in meetings(e, layer, start, out, boxes, dtype):
        found = take(shards[i].data, index)
        with np.errstate(over="ignore"):
            converted = found.astype(dtype, copy=False)
        if dtype == np.float16 and np.isinf(converted).any() and np.isfinite(found).all():
            raise WeightsError(f"weights: {key} has values that float16 cannot hold")
        bits(part)[...] = bits(converted)
    return out


def take(data: jax.Array, index: tuple[slice, ...]) -> np.ndarray:
    """Returns part of a device's array; only that part is copied from an accelerator."""
    if data.device.platform == "cpu":
        return np.asarray(data)[(..., *index)]
    sizes = tuple(s.stop - s.start for s in index)
    return np.asarray(slice_of(data, tuple(s.start for s in index), sizes))


# The start is traced, so that all blocks of one shape share a compilation.
slice_of = jax.jit(jax.lax.dynamic_slice, static_argnums=2)


def to_checkpoint(state: nnx.State, table: dict[str, str]) -> dict[str, np.ndarray]:
    """Returns checkpoint key -> array for every parameter of a (small) state."""
    return {key: tensor.array() for key, tensor in tensors_of(state, table).items()}


def write_safetensors(
    folder: pathlib.Path, tensors: Mapping[str, Tensor], stem: str = "model"
) -> None:
    """Writes `stem`.safetensors, or numbered parts of up to 5 GB with an index, into a folder."""
    split = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern=f"{stem}{{suffix}}.safetensors",
        max_shard_size=SHARD_BYTES,
    )
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1))
    with contextlib.ExitStack() as stack:
        jobs, files = [], []
        for name, keys in split.filename_to_tensors.items():
            files.append(stack.enter_context(open(folder / name, "wb")))
            jobs += _file_jobs(files[-1], {key: tensors[key] for key in keys})
        run_in_threads(jobs)
        for file in files:
            os.fsync(file.fileno())


def _file_jobs(file: BinaryIO, tensors: Mapping[str, Tensor]) -> Iterator[tuple]:
    """Writes a file's header, and yields (function, *arguments) that write its data block by block,
    in any order. (The safetensors library needs all tensors of a file in memory.)"""
    header: dict = {"__metadata__": {"format": "pt"}}  # the framework that transformers checks
    end = 0
    for key, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[key] = {
            "dtype": NAMES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data start at a multiple of 8 bytes, as readers expect
    first = 8 + len(text)
    file.write(struct.pack("<Q", len(text)) + text)
    file.flush()
    file.truncate(first + end)
    for key, tensor in tensors.items():
        begin = first + header[key]["data_offsets"][0]
        for start, stop in tensor.blocks():
            yield _write_rows, file, tensor, begin + start * tensor.row_bytes, start, stop


def _write_rows(file: BinaryIO, tensor: Tensor, at: int, start: int, stop: int) -> None:
    block = np.ascontiguousarray(tensor.rows(start, stop))
    data, done = memoryview(bits(block).reshape(-1)).cast("B"), 0  # `bits`: it knows no bfloat16
    while done < len(data):  # one call writes 2 GiB at most
        done += os.pwrite(file.fileno(), data[done : done + (1 << 30)], at + done)
