"""Checkpoint tensors into model states and back, by the key table."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Iterable

import jax
import numpy as np
from flax import nnx
from safetensors import safe_open

from mm_jax.weights import keymap


class WeightsError(ValueError):
    """Missing, unexpected or misshapen tensors; the message lists all of them."""


class SafetensorsFolder:
    """Lazy reader of one .safetensors file, or of all those in a folder."""

    def __init__(self, path: str | pathlib.Path):
        path = pathlib.Path(path)
        index = path / "model.safetensors.index.json"
        if path.is_file():
            files = [path]
        elif index.is_file():
            names = set(json.loads(index.read_text())["weight_map"].values())
            files = [path / name for name in sorted(names)]
        else:
            files = sorted(path.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"weights: no .safetensors file at {path}")
        self.files = [safe_open(file, framework="numpy") for file in files]
        self.where = {key: file for file in self.files for key in file.keys()}  # noqa: SIM118

    def __call__(self, key: str) -> np.ndarray:
        return self.where[key].get_tensor(key)

    def keys(self) -> Iterable[str]:
        return self.where.keys()


def param_shapes(state: nnx.State) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Path -> shape of every parameter of a (possibly abstract) state."""
    return {tuple(map(str, path)): v.shape for path, v in nnx.to_flat_state(state)}


def load_state(
    state: nnx.State,
    table: dict[str, str],
    read: Callable[[str], np.ndarray],
    available: Iterable[str],
    ignore: Iterable[str] = (),
) -> nnx.State:
    """The state with every parameter read from a checkpoint, in the state's own dtypes.

    `state` may be abstract (`nnx.eval_shape`). Raises WeightsError once, naming every missing,
    unexpected (`ignore`: key prefixes that may be left over) and misshapen tensor.
    """
    available = set(available)
    all_entries = keymap.entries(param_shapes(state), table)
    wanted = {key for e in all_entries for key in e.keys}
    missing = sorted(wanted - available)
    unexpected = sorted(k for k in available - wanted if not k.startswith(tuple(ignore) or "\0"))
    if missing or unexpected:
        raise WeightsError(f"weights: missing keys {missing}; unexpected keys {unexpected}")
    new, problems = [], []
    for e, (path, variable) in zip(all_entries, nnx.to_flat_state(state), strict=True):
        try:
            array = e.join(read)
        except ValueError as error:
            problems.append(f"{e.keys[0]}: {error}")
            continue
        if array.shape != variable.shape:
            expected = e.torch_shape(variable.shape)
            problems.append(f"{e.keys[0]}: expected {expected}, got {read(e.keys[0]).shape}")
            continue
        new.append((path, variable.replace(jax.numpy.asarray(array, variable.dtype))))
    if problems:
        raise WeightsError("weights: wrong shapes: " + "; ".join(problems))
    return nnx.from_flat_state(new)


def to_checkpoint(state: nnx.State, table: dict[str, str]) -> dict[str, np.ndarray]:
    """Checkpoint key -> array in torch layout, for every parameter of a state."""
    flat = nnx.to_flat_state(state)
    out: dict[str, np.ndarray] = {}
    for e, (_, variable) in zip(keymap.entries(param_shapes(state), table), flat, strict=True):
        array = np.asarray(jax.device_get(variable.get_value()))
        out.update((key, np.ascontiguousarray(t)) for key, t in e.split(array))
    return out
