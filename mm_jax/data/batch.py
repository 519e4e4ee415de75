"""The batch type and how examples are padded into it.

Shapes are fixed, masks are data, and absent modalities have size 0 or mask False. A batch is a
NamedTuple, so that it is a pytree for jax although this package does not import jax.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mm_jax.data.prompts import Example


class Batch(NamedTuple):
    """A batch: B rows, T tokens, F frames, S pixels, A fbank frames, H history tokens, U memories.

    F is 0 if no row of the batch's shape can have video; likewise A without audio, and H and U
    without history.
    """

    tokens: np.ndarray
    """int32[B, T]; media placeholders repeated to their exact counts."""
    mask: np.ndarray
    """bool[B, T]; True at real tokens. Padding on the right in training."""
    loss_weights: np.ndarray
    """float32[B, T]; weight of predicting tokens[b, t], 0 outside the target."""
    frames: np.ndarray
    """uint8[B, F, S, S, 3]; zeros in rows without video (no placeholder reads them)."""
    fbank: np.ndarray
    """float32[B, A, 128]; raw log-mel energies, zeros beyond a row's length."""
    fbank_frames: np.ndarray
    """int32[B]; real fbank frames of a row, 0 without audio."""
    history_tokens: np.ndarray
    """int32[B, H]; compressor input, padded on the right."""
    memory_index: np.ndarray
    """int32[B, U]; positions of <MEM> in history_tokens, 0 beyond a row's count."""


class Packing(NamedTuple):
    """Says how the G responses to a prompt, of R tokens each, share P < G rows of R places."""

    source: np.ndarray
    """int32[B, P, R]: which of the prompt's G R tokens stands at a place; -1: none."""
    target: np.ndarray
    """int32[B, G, R]: at which of the P R places a token stands; 0 for padding."""


class Responses(NamedTuple):
    """Prompts with G responses of R tokens each (or pairs to compare: chosen and rejected)."""

    batch: Batch
    features: Any
    """`models.multimood.Features` of the batch; None: the towers run with the model."""
    tokens: np.ndarray
    """int32[B, G, R]."""
    mask: np.ndarray
    """bool[B, G, R]; True at real tokens. Padding on the right."""
    packing: Packing | None = None
    """How they are computed; None: each in a row of its own."""


class Shape(NamedTuple):
    """The lengths of a row, or what a batch's rows are padded to."""

    tokens: int
    frames: int
    fbank: int
    history: int
    memory: int


def pad_to(array: np.ndarray, length: int, value: float = 0) -> np.ndarray:
    """Pads axis 0 to `length`. Raises ValueError for a longer array: nothing is ever cut."""
    missing = length - len(array)
    if missing < 0:
        raise ValueError(f"pad_to: array of length {len(array)} does not fit into {length}")
    widths = [(0, missing)] + [(0, 0)] * (array.ndim - 1)
    return np.pad(array, widths, constant_values=value)


def lengths_of(example: Example) -> Shape:
    arrays = (example.tokens, example.frames, example.fbank)
    return Shape(*map(len, (*arrays, example.history_tokens, example.memory_index)))


def collate(examples: Sequence[Example], pad_id: int, shape: Shape | None = None) -> Batch:
    """Stacks examples into a `Batch`, padded on the right to `shape`, or to the longest row."""
    t, f, a, h, u = shape or Shape(*map(max, zip(*map(lengths_of, examples), strict=True)))
    with_video = [e.frames for e in examples if len(e.frames)]
    counts = {len(frames) for frames in with_video}
    if len(counts | {f} if counts else counts) > 1:
        raise ValueError(f"collate: examples with {sorted(counts)} frames, expected {f}")
    # Samples without frames know the side, too.
    blank = np.zeros((f, *(with_video or [examples[0].frames])[0].shape[1:]), np.uint8)

    def stack(name: str, size: int, value: float = 0) -> np.ndarray:
        return np.stack([pad_to(getattr(e, name), size, value) for e in examples])

    return Batch(
        tokens=stack("tokens", t, pad_id),
        mask=np.arange(t) < np.array([len(e.tokens) for e in examples])[:, None],
        loss_weights=stack("loss_weights", t),
        frames=np.stack([e.frames if len(e.frames) else blank for e in examples]),
        fbank=stack("fbank", a),
        fbank_frames=np.array([len(e.fbank) for e in examples], np.int32),
        history_tokens=stack("history_tokens", h, pad_id),
        memory_index=stack("memory_index", u),
    )
