"""Chooses the few padded shapes of a stage's batches: each is a program to compile.

Rows are padded to one of a few joint shapes. They are chosen from the lengths at hand so that the
padding costs least, weighed by a cost such as FLOPs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from mm_jax.data.batch import Shape

# Every length is rounded up to a multiple of these: what tensor cores and patches take.
STEPS = Shape(tokens=8, frames=1, fbank=16, history=8, memory=1)
MOST_CANDIDATES = 256

Cost = Callable[[np.ndarray], np.ndarray]
"""Returns what a row of each shape int[N, 5] costs, [N]."""


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Holds joint shapes, the cheapest first; the last one holds all rows."""

    sizes: tuple[Shape, ...]

    def holding(self, lengths: Shape) -> Shape:
        """Returns the cheapest shape with room for rows of these lengths. Raises ValueError."""
        for size in self.sizes:
            if holds(size, lengths):
                return size
        raise ValueError(f"shapes: {lengths} does not fit into {self.sizes[-1]}")

    def extended(self, lengths: Sequence[Shape]) -> Shapes:
        """Returns these shapes, with one more where they do not hold rows of these lengths."""
        if self.fit(lengths):
            return self
        return Shapes((*self.sizes, rounded(joined([*lengths, self.sizes[-1]]))))

    def fit(self, lengths: Sequence[Shape]) -> bool:
        return holds(self.sizes[-1], joined(lengths))


def holds(size: Sequence[int], lengths: Sequence[int]) -> bool:
    return all(a >= b for a, b in zip(size, lengths, strict=True))


def joined(lengths: Sequence[Shape]) -> Shape:
    """Returns the smallest shape that holds all of these."""
    return Shape(*map(max, zip(*lengths, strict=True)))


def rounded(lengths: Shape) -> Shape:
    return Shape(*(-(-n // step) * step for n, step in zip(lengths, STEPS, strict=True)))


def geometric(length: int, size: int) -> int:
    """Rounds a length up to size * 2**k, for what comes one at a time; 0 stays."""
    if length == 0:
        return 0
    while size < length:
        size *= 2
    return size


def choose(lengths: Sequence[Shape], count: int, cost: Cost) -> Shapes:
    """Chooses at most `count` shapes for rows of these lengths, so that rows padded to the cheapest
    one that holds them cost least together.

    One shape holds everything, so that any rows can share a batch. The others come from the rows'
    own lengths and from joining those in pairs; they are taken one by one, each the best next to
    the others, and then exchanged while that helps.
    """
    unique, numbers = candidates(np.array(lengths))
    top = unique.max(axis=0)
    able = np.unique(np.concatenate([unique, joins(unique, numbers, cost)]), axis=0)
    inside = (able[None] >= unique[:, None]).all(axis=2)
    costs = numbers[:, None] * np.where(inside, cost(able), np.inf)  # [rows, shapes]
    best = exchanged(costs, int((able == top).all(axis=1).argmax()), count)
    found = able[best]
    order = np.argsort(cost(found), kind="stable")
    sizes = [Shape(*map(int, found[i])) for i in order if not np.array_equal(found[i], top)]
    return Shapes((*sizes, Shape(*map(int, top))))


def candidates(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rounds lengths up until few are different; returns those and how many rows each stands
    for."""
    steps = np.array(STEPS)
    for _ in range(20):
        unique, numbers = np.unique(-(-lengths // steps) * steps, axis=0, return_counts=True)
        if len(unique) <= MOST_CANDIDATES:
            return unique, numbers
        steps = steps * np.array([2, 1, 2, 2, 2])
    raise ValueError("shapes: expected clips of one number of frames")


def joins(shapes: np.ndarray, numbers: np.ndarray, cost: Cost) -> np.ndarray:
    """Joins the two shapes where that adds least to the cost of their rows, until one is left;
    returns all that came to be."""
    shapes, numbers = shapes.copy(), numbers.astype(np.float64)
    own, alive, found = cost(shapes), np.ones(len(shapes), bool), [shapes.max(axis=0)]

    def added(i: int) -> np.ndarray:
        both = cost(np.maximum(shapes, shapes[i]))
        out = numbers * (both - own) + numbers[i] * (both - own[i])
        out[i] = np.inf
        return np.where(alive, out, np.inf)

    more = np.stack([added(i) for i in range(len(shapes))])
    for _ in range(len(shapes) - 1):
        i, j = np.unravel_index(np.argmin(more), more.shape)
        alive[j] = False
        more[j], more[:, j] = np.inf, np.inf
        shapes[i] = np.maximum(shapes[i], shapes[j])
        numbers[i] += numbers[j]
        own[i] = cost(shapes[i][None])[0]
        more[i] = more[:, i] = added(i)
        found.append(shapes[i].copy())
    return np.stack(found)


def exchanged(costs: np.ndarray, top: int, count: int) -> list[int]:
    """Chooses `count` columns, `top` among them, so that the sum of each row's least is small."""
    chosen = [top]

    def best(kept: list[int]) -> tuple[float, int]:
        totals = np.minimum(costs, costs[:, kept].min(axis=1)[:, None]).sum(axis=0)
        return totals.min(), int(totals.argmin())

    for _ in range(min(count, costs.shape[1]) - 1):
        chosen.append(best(chosen)[1])
    total, improved = costs[:, chosen].min(axis=1).sum(), True
    while improved:
        improved = False
        for place in range(1, len(chosen)):
            kept = chosen[:place] + chosen[place + 1 :]
            new, column = best(kept)
            if new < total * (1 - 1e-9):
                total, chosen[place], improved = new, column, True
    return sorted(set(chosen))
