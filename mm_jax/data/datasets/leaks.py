"""Counts what the splits of a data set share: dialogues, texts, and equal or similar clips."""

from __future__ import annotations

import hashlib
import itertools
import unicodedata
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from PIL import Image

from mm_jax.data.records import Sample

MIN_WORDS, MIN_LETTERS = 5, 20  # people say shorter things again and again
FRAMES = 3  # of a clip are compared: first, middle, last
NEAR = 3  # of a frame's 64 bits may differ
CONTRAST = 4.0  # grey levels: pictures without any would be similar to all of their kind
NAMED = 5  # pairs of samples that a report names


class Marks(NamedTuple):
    """What a sample is recognised by; clip: a hash of frames and sound, "" without any; pictures:
    uint64[FRAMES], or None."""

    id: str
    dialogue: str
    text: str
    clip: str
    pictures: np.ndarray | None


def marks_of(sample: Sample) -> Marks:
    folded = unicodedata.normalize("NFC", sample.client_text).casefold()
    kept = (c if unicodedata.category(c)[0] in "LMN" else " " for c in folded)
    words, clip = "".join(kept).split(), ""
    if len(sample.frames) or len(sample.fbank):
        data = hashlib.sha256(np.ascontiguousarray(sample.frames))
        data.update(np.ascontiguousarray(sample.fbank))
        clip = data.hexdigest()
    # Some languages write no spaces.
    long = len(words) >= MIN_WORDS or (not folded.isascii() and len("".join(words)) >= MIN_LETTERS)
    text = " ".join(words) if long else ""
    return Marks(sample.id, sample.dialogue_id, text, clip, picture_hashes(sample.frames))


def picture_hashes(frames: np.ndarray) -> np.ndarray | None:
    """Computes difference hashes uint64[FRAMES]: whether each cell of a picture of 8 x 9 is darker
    than its neighbour on the right. None without frames or contrast."""
    if not len(frames):
        return None
    found = []
    for i in np.linspace(0, len(frames) - 1, FRAMES).round().astype(int):
        small = Image.fromarray(frames[i]).convert("L").resize((9, 8), Image.Resampling.BOX)
        cells = np.asarray(small, np.float32)
        if cells.std() < CONTRAST:
            return None
        bits = np.packbits(cells[:, 1:] > cells[:, :-1])
        found.append(bits.view(">u8")[0])
    return np.array(found, np.uint64)


def shared(splits: Mapping[str, Iterable[Marks]]) -> dict[str, dict[str, dict]]:
    """Returns "A, B" -> kind -> {"count": samples of B with a match in A, "pairs": the first of
    them, "id of A = id of B"}, for what splits A and B share; kinds without a match are left out.
    """
    marks = {name: list(own) for name, own in splits.items()}
    report: dict[str, dict[str, dict]] = {}
    for one, other in itertools.combinations(marks, 2):
        kinds = {
            "dialogues": same(marks[one], marks[other], "dialogue"),
            "longer texts": same(marks[one], marks[other], "text"),
            "equal clips": same(marks[one], marks[other], "clip"),
        }
        equal = {b for _, b in kinds["equal clips"]}
        kinds["similar clips"] = [p for p in similar(marks[one], marks[other]) if p[1] not in equal]
        found = {
            kind: {"count": len(pairs), "pairs": [f"{a} = {b}" for a, b in pairs[:NAMED]]}
            for kind, pairs in kinds.items()
            if pairs
        }
        if found:
            report[f"{one}, {other}"] = found
    return report


def same(one: list[Marks], other: list[Marks], field: str) -> list[tuple[str, str]]:
    """Lists (id, id) of the samples of `other` whose field, if any, occurs in `one`."""
    first: dict[str, str] = {}
    for mark in one:
        first.setdefault(getattr(mark, field), mark.id)
    first.pop("", None)
    return [(first[key], m.id) for m in other if (key := getattr(m, field)) in first]


def similar(one: list[Marks], other: list[Marks]) -> list[tuple[str, str]]:
    """Lists (id, id) of the samples of `other` whose pictures are near those of one in `one`."""
    one, other = ([m for m in own if m.pictures is not None] for own in (one, other))
    if not one or not other:
        return []
    table, pairs = np.stack([m.pictures for m in one]), []
    for mark in other:
        near = (np.bitwise_count(table ^ mark.pictures) <= NEAR).all(axis=1)
        if near.any():
            pairs.append((one[int(near.argmax())].id, mark.id))
    return pairs
