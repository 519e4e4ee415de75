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

    F is 0 if no example of the batch has video; likewise A without audio, and H and U without
    history.
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


class Responses(NamedTuple):
    """Prompts with G responses of R tokens each (or pairs to compare: chosen and rejected)."""

    batch: Batch
    features: Any
    """`models.multimood.Features` of the batch; None: the towers run with the model."""
    tokens: np.ndarray
    """int32[B, G, R]."""
    mask: np.ndarray
    """bool[B, G, R]; True at real tokens. Padding on the right."""


class Buckets(NamedTuple):
    """The sizes that lengths are rounded up to: `size * 2**k` if `geometric`, else multiples."""

    tokens: int = 128
    fbank: int = 256
    history: int = 128
    memory: int = 16
    geometric: bool = True

    def padded(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """Rounds up the lengths of (tokens, fbank frames, history tokens, memories)."""
        return tuple(map(self.round_up, lengths, self[:4]))

    def round_up(self, length: int, multiple: int) -> int:
        if length == 0:
            return 0
        if not self.geometric:
            return -(-length // multiple) * multiple
        size = multiple
        while size < length:
            size *= 2
        return size


def pad_to(array: np.ndarray, length: int, value: float = 0) -> np.ndarray:
    """Pads axis 0 to `length`. Raises ValueError for a longer array: nothing is ever cut."""
    missing = length - len(array)
    if missing < 0:
        raise ValueError(f"pad_to: array of length {len(array)} does not fit into {length}")
    widths = [(0, missing)] + [(0, 0)] * (array.ndim - 1)
    return np.pad(array, widths, constant_values=value)


def collate(
    examples: Sequence[Example],
    pad_id: int,
    buckets: Buckets,
    minimum: tuple[int, int, int, int] = (0, 0, 0, 0),
) -> Batch:
    """Stacks examples into a `Batch`, padded on the right, with every length rounded up.

    `minimum` gives lengths of (tokens, fbank, history tokens, memories) to make room for, so that
    all hosts of a global batch choose the same buckets.
    """

    names = ("tokens", "fbank", "history_tokens", "memory_index")
    longest = [max(len(getattr(e, name)) for e in examples) for name in names]
    t, a, h, u = buckets.padded([max(pair) for pair in zip(longest, minimum, strict=True)])
    with_video = [e.frames for e in examples if len(e.frames)]
    counts = {len(f) for f in with_video}
    if len(counts) > 1:
        raise ValueError(f"collate: examples with different frame counts {sorted(counts)}")
    shape = with_video[0].shape if with_video else (0, *examples[0].frames.shape[1:])
    blank = np.zeros(shape, np.uint8)

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
