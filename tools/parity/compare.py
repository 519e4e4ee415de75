"""Reads golden folders and compares values within bounds."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from collections.abc import Callable, Iterator

import jax
import numpy as np
from flax import nnx

from mm_jax.weights.load import load_state
from mm_jax.weights.save import to_checkpoint
from mm_jax.weights.tensors import read_safetensors


@dataclasses.dataclass(frozen=True)
class Bound:
    """Holds |got - want| <= atol + rtol * |want|; `relative` scales atol by the largest |want|."""

    atol: float
    rtol: float = 0.0
    relative: bool = False

    def describe(self) -> str:
        scale = " * max" if self.relative else ""
        return f"atol {self.atol:g}{scale}, rtol {self.rtol:g}"


MODULE = Bound(5e-5, 1e-4)
LOGITS = Bound(3e-4, 1e-4)
LOSS = Bound(0.0, 2e-5)
GRADIENT = Bound(1e-4, 1e-3, relative=True)
EXACT = Bound(0.0)


@dataclasses.dataclass(frozen=True)
class Result:
    name: str
    error: float
    tolerance: str
    passed: bool


def compare(name: str, got, want, bound: Bound, where=None) -> Result:
    """Compares two arrays; `where` is a boolean mask of the positions that count."""
    got, want = np.asarray(got), np.asarray(want)
    if got.shape != want.shape:
        return Result(name, float("inf"), f"shape {want.shape}, got {got.shape}", False)
    got, want = got.astype(np.float64), want.astype(np.float64)
    if where is not None:
        got, want = got[where], want[where]
    if want.size == 0:
        return Result(name, 0.0, "empty", True)
    error = np.abs(got - want)
    atol = bound.atol * np.abs(want).max() if bound.relative else bound.atol
    passed = bool(np.all(error <= atol + bound.rtol * np.abs(want)))  # False for NaN
    return Result(name, float(error.max()), bound.describe(), passed)


class Component:
    """A golden folder: its config and tensors, and models with its weights."""

    def __init__(self, folder: pathlib.Path):
        self.config = json.loads((folder / "config.json").read_text())
        self.folder = folder
        with np.load(folder / "io.npz") as io:
            self.io = {name: io[name] for name in io.files}

    def __getitem__(self, name: str) -> np.ndarray:
        return self.io[name]

    def cases(self, pattern: str) -> Iterator[re.Match]:
        for name in self.io:
            if match := re.fullmatch(pattern, name):
                yield match

    def model(self, create: Callable, table: dict, weights: str = "weights", ignore=()):
        """Returns (graph, state) of the module `create(rngs)` with the folder's weights."""
        graph, state = nnx.split(nnx.eval_shape(lambda: create(nnx.Rngs(0))))
        tensors = read_safetensors(self.folder / f"{weights}.safetensors")
        return graph, load_state(state, table, tensors, ignore=ignore)


def run(model, fn, *args, **static):
    """Computes `fn(module, *args, **static)` under jit."""
    graph, state = model
    return jax.jit(lambda s, *a: fn(nnx.merge(graph, s), *a, **static))(state, *args)


def gradients(model, table, loss: Callable, *args) -> tuple[jax.Array, dict[str, np.ndarray]]:
    """Computes a loss and its gradients by checkpoint key.

    A parameter that the checkpoint stores once per layer gets the summed gradient.
    """
    graph, state = model
    value, grads = jax.jit(jax.value_and_grad(lambda s, *a: loss(nnx.merge(graph, s), *a)))(
        state, *args
    )
    return value, to_checkpoint(grads, table)


def gradient_results(prefix: str, c: Component, grads: dict) -> Iterator[Result]:
    for match in c.cases(re.escape(prefix) + r"grad/(.+)"):
        if match[1] in grads:
            yield compare(match[0], grads[match[1]], c[match[0]], GRADIENT)
