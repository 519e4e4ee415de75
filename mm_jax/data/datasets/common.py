"""What every TFDS builder shares: the feature schema, media loading with counts, and reading back.

Records are ArrayRecord files read with `as_data_source`; neither TensorFlow nor jax is imported.
"""

from __future__ import annotations

import abc
import collections
import dataclasses
import json
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import hashing as tfds_hashing
from tensorflow_datasets.core import shuffle as tfds_shuffle

from mm_jax.data.media import Clip, MediaSpec, load_media
from mm_jax.data.records import Sample, Utterance

BUILD_REPORT = "build_report.json"
SPLITS = ("train", "val", "test")

TEXT_FIELDS = tuple(
    f.name for f in dataclasses.fields(Sample) if f.type == "str" and f.name != "id"
)
UTTERANCE_TEXT_FIELDS = ("speaker", "text", "emotion", "strategy", "clue")


class DataError(ValueError):
    """A data set that is not as its specification says; the message names what and where."""


def features(image_size: int) -> tfds.features.FeaturesDict:
    """The schema of one sample (see `records.Sample`)."""
    text = tfds.features.Text
    return tfds.features.FeaturesDict(
        {
            "id": text(),
            **{name: text() for name in TEXT_FIELDS},
            "turn": np.int32,
            "history": tfds.features.Sequence(
                {**{name: text() for name in UTTERANCE_TEXT_FIELDS}, "turn": np.int32}
            ),
            "frames": tfds.features.Tensor(
                shape=(None, image_size, image_size, 3), dtype=np.uint8, encoding="zlib"
            ),
            "fbank": tfds.features.Tensor(shape=(None, 128), dtype=np.float32, encoding="zlib"),
            # The lengths of the two, so that they can be planned with without decoding them.
            "num_frames": np.int32,
            "fbank_frames": np.int32,
        }
    )


def to_example(sample: Sample, image_size: int) -> dict:
    """A `Sample` as the dict TFDS stores."""
    frames = sample.frames
    if len(frames) == 0:
        frames = np.zeros((0, image_size, image_size, 3), np.uint8)
    return {
        "id": sample.id,
        **{name: getattr(sample, name) for name in TEXT_FIELDS},
        "turn": sample.turn,
        "history": [
            {**{name: getattr(u, name) for name in UTTERANCE_TEXT_FIELDS}, "turn": u.turn}
            for u in sample.history
        ],
        "frames": frames,
        "fbank": sample.fbank,
        "num_frames": len(frames),
        "fbank_frames": len(sample.fbank),
    }


def from_example(example: dict, light: bool = False) -> Sample:
    """The `Sample` of a stored dict.

    `light`: the media were not decoded; `frames` and `fbank` are zeros of the right length that
    take no memory.
    """
    if light:
        frames = np.broadcast_to(np.uint8(0), (int(example["num_frames"]), 1, 1, 3))
        fbank = np.broadcast_to(np.float32(0), (int(example["fbank_frames"]), 128))
        example = {**example, "frames": frames, "fbank": fbank}
    history = example["history"]
    columns = [[value.decode() for value in history[name]] for name in UTTERANCE_TEXT_FIELDS]
    return Sample(
        id=example["id"].decode(),
        **{name: example[name].decode() for name in TEXT_FIELDS},
        turn=int(example["turn"]),
        history=tuple(
            Utterance(**dict(zip(UTTERANCE_TEXT_FIELDS, values, strict=True)), turn=int(turn))
            for *values, turn in zip(*columns, history["turn"], strict=True)
        ),
        frames=example["frames"],
        fbank=example["fbank"],
    )


class SampleSource:
    """Random access to the samples of one split of a built data set; picklable.

    `light` leaves the media undecoded (see `from_example`).
    """

    def __init__(self, folder: str | pathlib.Path, split: str, light: bool = False):
        self.folder, self.split, self.light = pathlib.Path(folder), split, light
        if not (self.folder / "dataset_info.json").is_file():
            raise DataError(
                f"no data set at {self.folder}; build it with `python -m mm_jax prepare`"
            )
        self._open()

    def _open(self):
        builder = tfds.builder_from_directory(self.folder)
        if self.split not in builder.info.splits:
            raise DataError(
                f"split: expected one of {sorted(builder.info.splits)}, got {self.split!r}"
            )
        decoders = None
        if self.light:
            decoders = {name: tfds.decode.SkipDecoding() for name in ("frames", "fbank")}
        self._source = builder.as_data_source(self.split, decoders=decoders)

    def __getstate__(self):
        return {k: v for k, v in vars(self).items() if k != "_source"}

    def __setstate__(self, state):
        vars(self).update(state)
        self._open()

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Sample:
        return from_example(self._source[index], self.light)

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))


class MediaCounter:
    """Counts what became of every modality of every sample and of every single clip."""

    def __init__(self):
        self.counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)

    def attach(self, sample: Sample, clips: list[Clip], spec: MediaSpec, **which: bool) -> Sample:
        """Decodes `clips` into `sample` and counts the outcome."""
        media = load_media(clips, spec, **which)
        return self.record(
            dataclasses.replace(
                sample,
                frames=media.frames,
                fbank=media.fbank,
                video_status=media.video_status,
                audio_status=media.audio_status,
            ),
            media.clip_errors,
        )

    def record(self, sample: Sample, clip_errors: Iterable[str] = ()) -> Sample:
        self.counts["video"][sample.video_status] += 1
        self.counts["audio"][sample.audio_status] += 1
        self.counts["single clips left out"].update(clip_errors)
        return sample

    def as_dict(self) -> dict[str, dict[str, int]]:
        return {name: dict(counter) for name, counter in sorted(self.counts.items()) if counter}


@dataclasses.dataclass
class BuilderConfig(tfds.core.BuilderConfig):
    """What a builder was asked for; the name states it, so different builds lie side by side."""

    raw: str = ""
    media: str = ""
    spec: MediaSpec = dataclasses.field(default_factory=MediaSpec)
    options: dict = dataclasses.field(default_factory=dict)


class SampleBuilder(tfds.core.GeneratorBasedBuilder):
    """A TFDS builder of `Sample`s; subclasses give `splits()`."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return self.dataset_info_from_configs(
            features=features(self.builder_config.spec.image_size), supervised_keys=None
        )

    @abc.abstractmethod
    def splits(
        self, counters: dict[str, MediaCounter]
    ) -> dict[str, Callable[[], Iterator[Sample]]]:
        """Split name -> a function that yields its samples."""

    def _split_generators(self, dl_manager):
        self.counters = {name: MediaCounter() for name in SPLITS}
        return {
            name: self._generate_examples(name, make)
            for name, make in self.splits(self.counters).items()
        }

    def _generate_examples(self, split: str, make: Callable[[], Iterator[Sample]]):
        for sample in make():
            yield sample.id, to_example(sample, self.builder_config.spec.image_size)


class DiskShuffler(tfds_shuffle.Shuffler):
    """Sorts the records of a split by hashed key with their bytes on disk.

    TFDS' own keeps up to 1 GB in memory and then needs TensorFlow to spill; this keeps a key and
    an offset a record, so that a build's memory does not grow with the clips.
    """

    def __init__(self, dirpath, hash_salt, disable_shuffling=False, ignore_duplicates=False):
        del disable_shuffling, ignore_duplicates  # both off for our builders
        self._hasher = tfds_hashing.Hasher(hash_salt)
        pathlib.Path(dirpath).mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=dirpath)
        self._places: list[tuple[int, int, int]] = []  # key, offset, size
        self._total_bytes = 0

    @property
    def bucket_lengths(self):
        return [len(self._places)]

    @property
    def num_examples(self):
        return len(self._places)

    def add(self, key, data):
        self._places.append((self._hasher.hash_key(key), self._total_bytes, len(data)))
        self._file.write(data)
        self._total_bytes += len(data)

    def __iter__(self):
        previous = None
        for key, offset, size in sorted(self._places):
            if key == previous:
                raise DataError("two samples have the same id")
            previous = key
            self._file.seek(offset)
            yield key, self._file.read(size)
        self._file.close()


def build(builder_class: type[SampleBuilder], config: BuilderConfig, data_dir: str) -> pathlib.Path:
    """Builds a data set (all or nothing: TFDS renames a finished folder) and returns its folder.

    Writes `build_report.json` (samples, media outcomes with reasons) beside the records.
    """
    tfds_shuffle.Shuffler = DiskShuffler
    tfds.disable_progress_bar()
    builder = builder_class(config=config, data_dir=data_dir, file_format="array_record")
    folder = pathlib.Path(builder.data_dir)
    if (folder / BUILD_REPORT).exists():
        return folder
    builder.download_and_prepare()
    report = {
        "dataset": f"{builder.name}/{config.name}",
        "samples": {name: split.num_examples for name, split in builder.info.splits.items()},
        "media": {s: c.as_dict() for s, c in builder.counters.items() if c.counts},
        "spec": dataclasses.asdict(config.spec),
        "options": config.options,
    }
    (folder / BUILD_REPORT).write_text(json.dumps(report, indent=1))
    return folder
