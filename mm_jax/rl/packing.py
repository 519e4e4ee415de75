"""Packs short responses to a prompt into common rows, so that updates compute less padding."""

from __future__ import annotations

import numpy as np

from mm_jax.data.batch import Packing


def pack(lengths: np.ndarray, width: int) -> Packing | None:
    """Puts G responses of `lengths` int[B, G] into P rows of `width` tokens per prompt.

    P is G halved as often as the responses of every prompt fit (longest first, each into the first
    row with room), so that few shapes occur; None where they need more than half of the rows.
    """
    count, group = lengths.shape
    layouts = [first_fit(own, width) for own in lengths]
    need = max(int(rows.max()) + 1 for rows, _ in layouts)
    packed = group
    while packed > 1 and need <= -(-packed // 2):
        packed = -(-packed // 2)
    if packed == group:
        return None
    source = np.full((count, packed * width), -1, np.int32)
    target = np.zeros((count, group, width), np.int32)
    for b, (rows, starts) in enumerate(layouts):
        for g, length in enumerate(lengths[b]):
            at = rows[g] * width + starts[g] + np.arange(length)
            source[b, at] = g * width + np.arange(length)
            target[b, g, :length] = at
    return Packing(source.reshape(count, packed, width), target)


def first_fit(lengths: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the row and the first place of every response, int[G]."""
    used: list[int] = []
    rows, starts = np.zeros(len(lengths), int), np.zeros(len(lengths), int)
    for g in np.argsort(-lengths, kind="stable"):
        row = next((r for r, n in enumerate(used) if n + lengths[g] <= width), len(used))
        if row == len(used):
            used.append(0)
        rows[g], starts[g] = row, used[row]
        used[row] += int(lengths[g])
    return rows, starts
