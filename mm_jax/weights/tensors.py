"""Opens checkpoint tensors that are read piece by piece: safetensors, torch files, views of them.

A checkpoint is a `dict[str, Tensor]`, so that dict operations rename, choose and join tensors.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import pathlib
import re
import threading
import weakref
import zipfile
from collections.abc import Callable, Iterator, Mapping

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from mm_jax.config.errors import UserError

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Bytes read at a time. The allocator returns larger blocks to the system when they are freed, and
# the next one then costs a page fault per page.
BLOCK = 16 << 20
PAGE = 4096  # bytes; reads past the page cache (O_DIRECT) start, end and land at multiples of it


class WeightsError(UserError, ValueError):
    """Reports a damaged file, or lists all missing, unexpected and misshapen tensors."""


def summary(error: Exception) -> str:
    """Returns an error's type and first line; other libraries' messages fill a page."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Stands for a tensor in the checkpoint's layout; `rows(start, stop)` reads part of its first
    axis (a scalar: all of it), from any thread."""

    shape: tuple[int, ...]
    dtype: np.dtype
    rows: Callable[[int, int], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes of one row; a scalar is one row."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def array(self) -> np.ndarray:
        return self.rows(0, self.shape[0] if self.shape else 1)

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Yields (start, stop) of consecutive rows that take about BLOCK bytes."""
        count = self.shape[0] if self.shape else 1
        step = max(1, BLOCK // max(1, self.row_bytes))
        for start in range(0, count, step):
            yield start, min(start + step, count)


def from_array(array: np.ndarray) -> Tensor:
    array = np.asarray(array)
    rows = (lambda a, b: array[a:b]) if array.ndim else (lambda a, b: array)
    return Tensor(array.shape, array.dtype, rows)


def from_arrays(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    return {key: from_array(array) for key, array in arrays.items()}


LFS_POINTER = b"version https://git-lfs"


def check_not_pointer(path: pathlib.Path) -> None:
    """Raises WeightsError for a Git LFS pointer, which stands for weights that were not fetched."""
    with open(path, "rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise WeightsError(
                f"weights: {path} is a Git LFS pointer, not the weights themselves; fetch them "
                "with `git lfs pull` or `hf download`"
            )


def check_types(path: pathlib.Path, types: Mapping[str, str]) -> None:
    """Raises WeightsError where tensors have a type that cannot be read. types: key -> name."""
    unknown = {key: name for key, name in types.items() if name not in DTYPES}
    if unknown:
        names = sorted(set(unknown.values()))
        packed = any(re.match("F(8|6|4)|float(8|4)", name) for name in names)
        raise WeightsError(
            f"weights: {path}: {len(unknown)} tensors, such as {next(iter(unknown))}, have type "
            f"{', '.join(names)}; expected one of {', '.join(DTYPES)}"
            + (": a quantised (FP8) release; use the bfloat16 or float16 one" if packed else "")
        )


def read_safetensors(path: pathlib.Path) -> dict[str, Tensor]:
    """Opens the tensors of one file. Raises WeightsError if the file is truncated or damaged.

    The safetensors library reads and checks the header. The data are read here, past the page cache
    if the file system allows it: mapped or cached pages compete with the weights for memory, and
    truncating a mapped file kills the process instead of raising an error.
    """
    size = path.stat().st_size
    check_not_pointer(path)
    try:
        with safe_open(path, framework="np") as file:
            slices = {key: file.get_slice(key) for key in file.offset_keys()}
            header = {key: (s.get_dtype(), tuple(s.get_shape())) for key, s in slices.items()}
    except SafetensorError as error:
        raise WeightsError(
            f"weights: {path} ({size} bytes) is truncated, damaged or not safetensors: {error}"
        ) from error
    check_types(path, {key: name for key, (name, _) in header.items()})
    # A checked file holds its tensors one after the other in the order of `offset_keys`, without
    # gaps, up to its end.
    first = size - sum(math.prod(shape) * DTYPES[name].itemsize for name, shape in header.values())
    reader, tensors = _Reader(path), {}
    for key, (name, shape) in header.items():
        rows = functools.partial(reader.rows, key, DTYPES[name], shape, first)
        tensors[key] = Tensor(shape, DTYPES[name], rows)
        first += tensors[key].nbytes
    return tensors


class _Reader:
    """Reads rows of a file's tensors, from any thread."""

    def __init__(self, path: pathlib.Path):
        self.path, self.handle, self.page = path, os.open(path, os.O_RDONLY), 1
        # Tensors hold the reader, so the file stays open for as long as one of them is in use.
        weakref.finalize(self, os.close, self.handle)
        try:
            direct = os.open(path, os.O_RDONLY | os.O_DIRECT)
            weakref.finalize(self, os.close, direct)
            os.preadv(direct, [aligned_empty(PAGE, PAGE)], 0)
        except OSError:  # not every file system can; some say so only at the first read
            return
        self.handle, self.page = direct, PAGE

    def rows(
        self, key: str, dtype: np.dtype, shape: tuple[int, ...], first: int, start: int, stop: int
    ) -> np.ndarray:
        """Returns rows of the tensor that begins at byte `first`, a view of the whole pages that
        were read. Raises WeightsError."""
        row = math.prod(shape[1:]) * dtype.itemsize
        begin, end = first + start * row, first + stop * row
        # O_DIRECT needs offset, size and buffer aligned, so whole pages are read.
        page = begin // self.page * self.page
        got, at = aligned_empty(-(-end // self.page) * self.page - page, PAGE), 0
        while page + at < end:
            # preadv names its offset, so threads share the handle; one call reads 2 GiB at most.
            n = os.preadv(self.handle, [got[at : at + (1 << 30)]], page + at)
            if n == 0:
                raise WeightsError(f"weights: {self.path} was truncated while being read, at {key}")
            at += n
        got = got[begin - page : end - page].view(dtype)
        return got.reshape((stop - start, *shape[1:]) if shape else ())


def aligned_empty(count: int, alignment: int) -> np.ndarray:
    """Allocates uint8[count] at an address that is a multiple of `alignment`."""
    raw = np.empty(count + alignment, np.uint8)
    begin = -raw.ctypes.data % alignment
    return raw[begin : begin + count]


def read_torch(path: pathlib.Path) -> tuple[dict[str, Tensor], dict]:
    """Opens a torch file, mapped and with weights_only=True: (tensors, everything else).

    Nested dicts of tensors get dotted keys. Raises WeightsError if the file is damaged.
    """
    import torch  # heavy, and only such files need it

    check_not_pointer(path)
    try:
        # Files of torch before 1.6 are no zip archives and cannot be mapped.
        mapped = zipfile.is_zipfile(path)
        loaded = torch.load(path, mmap=mapped, map_location="cpu", weights_only=True)
    except Exception as error:
        raise WeightsError(
            f"weights: {path} is damaged or not a torch file of tensors (torch.load with "
            f"weights_only=True: {summary(error)})"
        ) from error
    if not isinstance(loaded, dict):
        raise WeightsError(f"weights: {path}: expected a dict of tensors, got {type(loaded)}")
    tensors: dict[str, Tensor] = {}
    rest: dict = {}

    def make(value: torch.Tensor) -> Tensor:
        if value.dtype.is_floating_point and value.dtype.itemsize < 2:
            check_types(path, {"a tensor": str(value.dtype).removeprefix("torch.")})
        bfloat16 = value.dtype == torch.bfloat16  # numpy() refuses it
        raw = value.view(torch.int16) if bfloat16 else value
        dtype = np.dtype(ml_dtypes.bfloat16) if bfloat16 else raw.reshape(-1)[:0].numpy().dtype

        def rows(start: int, stop: int) -> np.ndarray:
            return (raw[start:stop] if raw.ndim else raw).contiguous().numpy().view(dtype)

        return Tensor(tuple(value.shape), dtype, rows)

    def walk(prefix: str, node: dict) -> None:
        for key, value in node.items():
            if torch.is_tensor(value):
                tensors[f"{prefix}{key}"] = make(value.detach())
            elif isinstance(value, dict) and any(torch.is_tensor(v) for v in value.values()):
                walk(f"{prefix}{key}.", value)
            else:
                rest[f"{prefix}{key}"] = value

    walk("", loaded)
    return tensors, rest


def read_json(path: pathlib.Path) -> dict:
    """Reads a JSON object. Raises WeightsError."""
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise WeightsError(f"weights: {path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise WeightsError(f"weights: {path}: expected an object, got a {type(values).__name__}")
    return values


def read_folder(
    folder: pathlib.Path, stem: str = "model", torch_stem: str = "pytorch_model"
) -> dict[str, Tensor]:
    """Opens all tensors of a Hugging Face folder, from the files that transformers would use.

    These are one safetensors file, or those of an index, or else torch files in the same way.
    Raises FileNotFoundError or WeightsError.
    """
    kinds = {
        f"{stem}.safetensors": read_safetensors,
        f"{torch_stem}.bin": lambda path: read_torch(path)[0],
    }
    for name, read in kinds.items():
        if (folder / name).is_file():
            return read(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _read_indexed(index, read)
    raise FileNotFoundError(
        f"weights: no {' or '.join(kinds)}, nor an index of several, in {folder}"
    )


def _read_indexed(index: pathlib.Path, read: Callable) -> dict[str, Tensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise WeightsError(f"weights: {index}: expected a weight_map")
    names = sorted(set(weight_map.values()))
    lacking = [n for n in names if not (index.parent / n).is_file()]
    if lacking:
        raise WeightsError(f"weights: {index.parent} lacks {lacking}, which its index names")
    files = {name: read(index.parent / name) for name in names}
    lost = sorted(key for key, name in weight_map.items() if key not in files[name])
    if lost:
        raise WeightsError(
            f"weights: {len(lost)} tensors are not in the files that {index} names, such as "
            f"{lost[:3]}"
        )
    return {key: tensor for file in files.values() for key, tensor in file.items()}


def grown(tensor: Tensor, rows: int, noise: float = 0.0, seed: int = 0) -> Tensor:
    """Grows a table [R, D] to `rows` rows: each new one is the mean of the old ones plus normal
    noise of `noise` times their standard deviation (per column)."""
    old = tensor.shape[0]
    lock, found = threading.Lock(), []

    def fresh() -> np.ndarray:
        with lock:  # the first thread reads the whole table, the others wait for its result
            if not found:
                # float64: a vocabulary has some 1e5 rows, and the variance is a difference of sums.
                total = np.zeros(tensor.shape[1:], np.float64)
                squares = np.zeros_like(total)
                for start, stop in tensor.blocks():
                    block = tensor.rows(start, stop).astype(np.float32)
                    total += block.sum(axis=0, dtype=np.float64)
                    squares += np.square(block, dtype=np.float64).sum(axis=0)
                mean = total / old
                deviation = np.sqrt(np.maximum(squares / old - mean**2, 0))  # rounding may go below
                # All at once, so that the rows do not depend on how they are read.
                draws = np.random.default_rng(seed).standard_normal((rows - old, *mean.shape))
                found.append((mean + noise * deviation * draws).astype(tensor.dtype))
        return found[0]

    def read(start: int, stop: int) -> np.ndarray:
        if stop <= old:
            return tensor.rows(start, stop)
        new = fresh()[max(start - old, 0) : stop - old]
        return np.concatenate([tensor.rows(start, old), new]) if start < old else new

    return Tensor((rows, *tensor.shape[1:]), tensor.dtype, read)


def merged(tensor: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Adds a LoRA update to a dense layer's weight [O, I], in float32: W + scale B A (A [r, I],
    B [O, r])."""

    # Rows of B alone give rows of the update, so the merged weight is never held whole.
    def rows(start: int, stop: int) -> np.ndarray:
        update = b.rows(start, stop).astype(np.float32) @ a.array().astype(np.float32)
        whole = tensor.rows(start, stop).astype(np.float32) + np.float32(scale) * update
        return whole.astype(tensor.dtype)

    return Tensor(tensor.shape, tensor.dtype, rows)
