"""TFDS builder of DFEW: client emotion of short film clips, 5 folds (spec section 1)."""

from __future__ import annotations

import collections
import csv
import functools
import pathlib
from collections.abc import Iterator

import numpy as np
from PIL import Image, UnidentifiedImageError

from mm_jax.data import fbank as fbank_lib
from mm_jax.data import media
from mm_jax.data.datasets import common
from mm_jax.data.datasets.common import DataError
from mm_jax.data.media import Clip, MediaError, MediaSpec, inside
from mm_jax.data.records import DFEW_EMOTIONS, Sample

FOLDS = 5
SPLIT_SPELLINGS = ("{}(single-labeled)", "{}(single_labeled)", "{}_single-labeled")
FRAME_FOLDERS = ("clip_224x224", "clip_224x224_16f")


def split_file(root: pathlib.Path, split: str, fold: int) -> pathlib.Path:
    """`EmoLabel_DataSplit/<split>(single-labeled)/set_<fold>.csv`, in any of its spellings."""
    folder = root / "EmoLabel_DataSplit"
    tried = [folder / s.format(split) / f"set_{fold}.csv" for s in SPLIT_SPELLINGS]
    for path in tried:
        if path.is_file():
            return path
    raise DataError("DFEW: none of these exists: " + ", ".join(map(str, tried)))


def read_labels(path: pathlib.Path) -> dict[str, str]:
    """Video name (as written) -> emotion. Raises DataError naming the line."""
    labels: dict[str, str] = {}
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        if [name.strip() for name in reader.fieldnames or ()] != ["video_name", "label"]:
            raise DataError(f"{path}: expected header video_name,label; got {reader.fieldnames}")
        reader.fieldnames = ["video_name", "label"]
        for row in reader:
            where = f"{path} line {reader.line_num}"
            label = (row["label"] or "").strip()
            if label not in {str(i) for i in range(1, len(DFEW_EMOTIONS) + 1)}:
                raise DataError(f"{where}: label: expected 1 to 7, got {row['label']!r}")
            name = (row["video_name"] or "").strip()
            if not name or name in labels:
                raise DataError(f"{where}: video_name: empty or listed twice: {name!r}")
            labels[name] = DFEW_EMOTIONS[int(label) - 1]
    if not labels:
        raise DataError(f"{path}: no clips")
    return labels


def padded(name: str) -> str:
    """File names are zero-padded to 5 digits; annotations sometimes are not."""
    return name.zfill(5) if name.isdigit() else name


def hold_out(labels: dict[str, str], share: float, seed: int) -> set[str]:
    """A stratified slice of the names: of every label round(share * count), at least one where
    the label has two or more clips."""
    by_label = collections.defaultdict(list)
    for name, label in labels.items():
        by_label[label].append(name)
    held: set[str] = set()
    for i, label in enumerate(DFEW_EMOTIONS):
        names = sorted(by_label[label])
        count = max(round(share * len(names)), int(len(names) > 1))
        order = np.random.default_rng((seed, i)).permutation(len(names))
        held.update(names[j] for j in order[:count])
    return held


class ClipIndex:
    """Where each clip's files are: the original video, or folders of face frames."""

    def __init__(self, root: pathlib.Path):
        self.clips = root / "Clip"
        self.videos = {p.stem: p for p in sorted((self.clips / "original").glob("**/*.mp4"))}

    def video(self, name: str) -> pathlib.Path | None:
        """The original video (it has the sound), or None."""
        inside(self.clips, padded(name))
        return self.videos.get(padded(name))

    def frames(self, name: str) -> list[pathlib.Path]:
        """Face frames in numeric order, [] where there are none."""
        for folder in FRAME_FOLDERS:
            paths = inside(self.clips / folder, padded(name)).glob("*.jpg")
            found = sorted(paths, key=lambda p: (int(p.stem) if p.stem.isdigit() else 0, p.stem))
            if found:
                return found
        return []


def load_frames(paths: list[pathlib.Path], spec: MediaSpec) -> np.ndarray:
    """uint8[F, S, S, 3] sampled from image files. Raises MediaError where one cannot be read."""
    index = media.uniform_frame_indices(spec.num_frames, len(paths))
    try:
        images = [np.asarray(Image.open(paths[i]).convert("RGB")) for i in index]
    except (OSError, UnidentifiedImageError) as error:
        raise MediaError("corrupt", str(error)) from error
    return np.stack([media.prepare_frame(image, spec.image_size) for image in images])


class Builder(common.SampleBuilder):
    """One fold: the official train split less a stratified val slice, and the official test."""

    def splits(self, counters):
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
        return {
            name: functools.partial(self._samples, index, labels, counters[name])
            for name, labels in parts.items()
        }

    def _samples(
        self, index: ClipIndex, labels: dict[str, str], counter: common.MediaCounter
    ) -> Iterator[Sample]:
        for name, emotion in labels.items():
            yield self._sample(index, name, emotion, counter)

    def _sample(
        self, index: ClipIndex, name: str, emotion: str, counter: common.MediaCounter
    ) -> Sample:
        spec = self.builder_config.spec
        base = dict(id=padded(name), dialogue_id=padded(name), client_text="")
        base.update(client_emotion=emotion)
        try:
            video = index.video(name)
            if video is not None:
                return counter.attach(Sample(**base), [Clip(video)], spec)
            paths = index.frames(name)
        except MediaError as error:
            return counter.record(
                Sample(**base, video_status=error.reason, audio_status=error.reason)
            )
        frames, status = np.zeros((0, spec.image_size, spec.image_size, 3), np.uint8), "missing"
        if paths:
            try:
                frames, status = load_frames(paths, spec), "ok"
            except MediaError as error:
                status = error.reason
        bank = np.zeros((0, fbank_lib.NUM_MEL_BINS), np.float32)
        # Face frames come without sound.
        sound = "no audio stream" if paths else "missing"
        return counter.record(
            Sample(**base, frames=frames, fbank=bank, video_status=status, audio_status=sound)
        )
