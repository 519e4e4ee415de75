"""Builds DFEW with TFDS: the client's emotion in short film clips, 5 folds (spec section 1)."""

from __future__ import annotations

import collections
import csv
import dataclasses
import functools
import io
import itertools
import pathlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from mm_jax.config.files import read_text
from mm_jax.data.datasets import common
from mm_jax.data.datasets.common import DataError
from mm_jax.data.labels import built_in
from mm_jax.data.media import Clip, MediaError, inside, media_files
from mm_jax.data.recording import IMAGE_SUFFIXES
from mm_jax.data.records import Sample

FOLDS = 5
EMOTION = built_in("dfew").tasks[0]
SPLIT_SPELLINGS = ("{}(single-labeled)", "{}(single_labeled)", "{}_single-labeled")
FRAME_FOLDERS = ("clip_224x224", "clip_224x224_16f")


def split_file(root: pathlib.Path, split: str, fold: int) -> pathlib.Path:
    """Finds `EmoLabel_DataSplit/<split>(single-labeled)/set_<fold>.csv`, in any of its spellings.

    Raises DataError.
    """
    folder = root / "EmoLabel_DataSplit"
    tried = [folder / s.format(split) / f"set_{fold}.csv" for s in SPLIT_SPELLINGS]
    for path in tried:
        if path.is_file():
            return path
    raise DataError("DFEW: none of these exists: " + ", ".join(map(str, tried)))


def read_labels(path: pathlib.Path) -> dict[str, str]:
    """Maps video names, as written, to emotions. Raises DataError naming the line."""
    labels: dict[str, str] = {}
    with io.StringIO(read_text(path), newline="") as file:
        reader = csv.DictReader(file)
        if [name.strip() for name in reader.fieldnames or ()] != ["video_name", "label"]:
            raise DataError(f"{path}: expected header video_name,label; got {reader.fieldnames}")
        reader.fieldnames = ["video_name", "label"]
        for row in reader:
            where = f"{path} line {reader.line_num}"
            label = (row["label"] or "").strip()
            if label not in {str(i) for i in range(1, len(EMOTION.labels) + 1)}:
                raise DataError(f"{where}: label: expected 1 to 7, got {row['label']!r}")
            name = (row["video_name"] or "").strip()
            if not name or name in labels:
                raise DataError(f"{where}: video_name: empty or listed twice: {name!r}")
            labels[name] = EMOTION.labels[int(label) - 1]
    if not labels:
        raise DataError(f"{path}: no clips")
    return labels


def padded(name: str) -> str:
    """Pads a name with zeros to the 5 digits of file names; annotations sometimes have fewer."""
    return name.zfill(5) if name.isdigit() else name


def hold_out(labels: dict[str, str], share: float, seed: int) -> set[str]:
    """Chooses a stratified slice of the names: round(share * count) of every label.

    It has at least one name of every label that has two or more clips.
    """
    by_label = collections.defaultdict(list)
    for name, label in labels.items():
        by_label[label].append(name)
    held: set[str] = set()
    for i, label in enumerate(EMOTION.labels):
        names = sorted(by_label[label])
        count = max(round(share * len(names)), int(len(names) > 1))
        order = np.random.default_rng((seed, i)).permutation(len(names))
        held.update(names[j] for j in order[:count])
    return held


class ClipIndex:
    """Finds each clip's files: the original video, or folders of face frames.

    Names may be padded with zeros or not, with any suffix of video and image files.
    """

    def __init__(self, root: pathlib.Path):
        self.clips = root / "Clip"
        found = media_files(self.clips / "original", "**/*")
        self.videos = {padded(name): path for name, path in sorted(found.items(), reverse=True)}
        self.folders = {
            (kind, padded(path.name)): path
            for kind in FRAME_FOLDERS
            for path in sorted((self.clips / kind).glob("*"), reverse=True)
            if path.is_dir()
        }

    def video(self, name: str) -> pathlib.Path | None:
        """Returns the original video, which has the sound, or None."""
        inside(self.clips, padded(name))
        return self.videos.get(padded(name))

    def frames(self, name: str) -> list[pathlib.Path]:
        """Lists the face frames in numeric order; [] if there are none."""
        for kind in FRAME_FOLDERS:
            inside(self.clips / kind, padded(name))
            folder = self.folders.get((kind, padded(name)))
            found = media_files(folder, suffixes=IMAGE_SUFFIXES).values() if folder else ()
            if found:
                return sorted(found, key=lambda p: (int(p.stem) if p.stem.isdigit() else 0, p.stem))
        return []


class Builder(common.SampleBuilder):
    """One fold: the official train split without a stratified val slice, and the official test."""

    def splits(self):
        config = self.builder_config
        root, options = pathlib.Path(config.raw), config.options
        train = read_labels(split_file(root, "train", options["fold"]))
        test = read_labels(split_file(root, "test", options["fold"]))
        both = sorted(set(map(padded, train)) & set(map(padded, test)))
        if both:
            raise DataError(f"DFEW fold {options['fold']}: clips in train and test: {both[:5]}")
        held = hold_out(train, options["val_share"], options["seed"])
        if not held:
            raise DataError("DFEW: too few train clips to hold out a val slice")
        index = ClipIndex(root)
        parts = {
            "train": {n: e for n, e in train.items() if n not in held},
            "val": {n: e for n, e in train.items() if n in held},
            "test": test,
        }
        splits = {
            name: functools.partial(pending_samples, index, labels)
            for name, labels in parts.items()
        }
        common.require_input(
            itertools.chain.from_iterable(pending() for pending in splits.values()),
            index.clips,
            "original/**/N.mp4 (or .avi, .mkv, ...), and N/*.jpg (or .png, ...) in "
            + ", ".join(FRAME_FOLDERS)
            + "; N as in the label files, with or without leading zeros",
        )
        return splits


def pending_samples(
    index: ClipIndex,
    labels: dict[str, str],
    hear: Callable[[str, Sequence[Clip]], str] | None = None,
) -> Iterator[common.Pending]:
    """Yields a sample of every clip, with the original video or else with its face frames."""
    for name, emotion in labels.items():
        name = padded(name)
        sample = Sample(name, name, client_text="", labels={EMOTION.name: emotion})
        try:
            video = index.video(name)
            images = () if video is not None else tuple(index.frames(name))
        except MediaError as error:
            yield common.Pending(sample, status=error.reason)
            continue
        clips = (Clip(video),) if video is not None else ()
        if hear is not None:
            sample = dataclasses.replace(sample, client_text=hear(name, clips))
        yield common.Pending(sample, clips, images, "" if clips or images else "missing")
