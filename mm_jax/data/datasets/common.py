"""Builds data sets with TFDS and reads them back: media with counts, the builder, the reader.

Records are ArrayRecord files read with `as_data_source`; neither TensorFlow nor jax is imported.
"""

from __future__ import annotations

import abc
import collections
import dataclasses
import functools
import itertools
import json
import logging
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import tensorflow_datasets as tfds
from tensorflow_datasets.core import hashing as tfds_hashing
from tensorflow_datasets.core import shuffle as tfds_shuffle

from mm_jax.config.errors import UserError
from mm_jax.config.files import write_whole
from mm_jax.data.datasets.leaks import marks_of, shared
from mm_jax.data.datasets.schema import (
    SHARE_KEPT,
    decode_pictures,
    features,
    from_example,
    to_example,
)
from mm_jax.data.images import load_images
from mm_jax.data.labels import LabelSpace, built_in, write_labels
from mm_jax.data.media import Clip, MediaSpec, load_media
from mm_jax.data.recording import MediaError
from mm_jax.data.records import Sample
from mm_jax.data.speech import Transcripts

BUILD_REPORT = "build_report.json"
TRANSCRIPTS = "transcripts.jsonl"  # of all builds of a data set
BEAM_NAMESPACE = "mm_jax"
UNUSABLE_NAMED = 100  # clips of a split that a report names
FINE = ("ok", "not requested", "none given", "no video stream", "no audio stream")
SPLITS = ("train", "val", "test")


class DataError(UserError, ValueError):
    """Reports a data set that violates its specification; the message names what and where."""


log = logging.getLogger(__name__)


class SampleSource:
    """Reads the samples of one split of a built data set in any order; picklable.

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
        stored, skipped = builder.info.features["frames"], ["fbank"]
        self._coded = isinstance(stored, tfds.features.Sequence)
        if not self._coded:
            skipped.append("frames")
        decoders = None
        if self.light:
            decoders = {name: tfds.decode.SkipDecoding() for name in skipped}
        self._source = builder.as_data_source(self.split, decoders=decoders)

    def __getstate__(self):
        return {k: v for k, v in vars(self).items() if k not in ("_source", "_coded")}

    def __setstate__(self, state):
        vars(self).update(state)
        self._open()

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Sample:
        example = self._source[index]
        if self._coded and not self.light:
            size = int(example["image_size"])
            example = {**example, "frames": decode_pictures(example["frames"], size)}
        return from_example(example, self.light)

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))


@dataclasses.dataclass(frozen=True)
class Pending:
    """A sample whose media are not decoded yet: `clips`, or single `images` (without sound).

    status: why there is neither ("" if none was requested).
    """

    sample: Sample
    clips: tuple[Clip, ...] = ()
    images: tuple[pathlib.Path, ...] = ()
    status: str = ""


def require_input(pending: Iterable[Pending], where: pathlib.Path, looked_for: str) -> None:
    """Raises DataError if samples were to have media and not one of them was found."""
    count = 0
    for one in pending:
        if one.images or any(clip.path.is_file() for clip in one.clips):
            return
        count += 1
    names = sorted(p.name for p in where.iterdir())[:5] if where.is_dir() else []
    holds = f"it holds {', '.join(names)}" if names else "it is empty or not a folder"
    raise DataError(
        f"no media found for any of {count} samples in {where} ({holds}); looked for {looked_for}"
    )


def load_pending(pending: Pending, spec: MediaSpec) -> tuple[Sample, list[tuple[str, str]]]:
    """Decodes a sample's media; also returns (what, outcome) pairs to count.

    There is one pair per modality and per clip that was left out. A bad file is an outcome, never
    an error.
    """
    sample = pending.sample
    if pending.clips:
        media = load_media(pending.clips, spec)
    elif pending.images:
        media = load_images(pending.images, spec)
    elif pending.status:
        media = dataclasses.replace(
            load_media((), spec, video=False, audio=False),
            video_status=pending.status,
            audio_status=pending.status,
        )
    else:
        return sample, []
    sample = dataclasses.replace(
        sample,
        frames=media.frames,
        fbank=media.fbank,
        video_status=media.video_status,
        audio_status=media.audio_status,
    )
    outcomes = [("video", media.video_status), ("audio", media.audio_status)]
    return sample, outcomes + [("single clips left out", e) for e in media.clip_errors]


def in_threads(function: Callable, items: Iterable) -> Iterator:
    """Applies `function` to every item, in order, with one thread per core.

    It runs only a few items ahead of the consumer, so that results do not pile up.
    """
    threads = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(threads) as pool:
        ahead = collections.deque()
        for item in items:
            ahead.append(pool.submit(function, item))
            if len(ahead) > 2 * threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


@dataclasses.dataclass
class BuilderConfig(tfds.core.BuilderConfig):
    """The options of a build; its name states them, so that different builds can coexist.

    frame_codec: of FRAME_CODECS. transcribe: the Whisper model that writes down the words of clips
    without text, "" for none.
    """

    raw: str = ""
    media: str = ""
    frame_codec: str = "zlib"
    transcribe: str = ""
    language: str = ""
    spec: MediaSpec = dataclasses.field(default_factory=MediaSpec)
    space: LabelSpace = dataclasses.field(
        default_factory=functools.partial(built_in, "mesc"), repr=False
    )
    options: dict = dataclasses.field(default_factory=dict)


class SampleBuilder(tfds.core.GeneratorBasedBuilder):
    """A TFDS builder of `Sample`s; subclasses define `splits()`.

    Threads of this process build it, or, if `beam_runner` is set, Apache Beam with one element per
    sample; the records are the same.
    """

    VERSION = tfds.core.Version("1.0.0")
    beam_runner = None

    def _info(self):
        config = self.builder_config
        return self.dataset_info_from_configs(
            features=features(config.spec.image_size, config.frame_codec, config.space),
            supervised_keys=None,
        )

    @abc.abstractmethod
    def splits(self) -> dict[str, Callable[..., Iterator[Pending]]]:
        """Maps split names to functions that yield their samples; decodes nothing.

        Where clips may be transcribed, the functions take `hear(name, clips)`, which returns the
        words of what has no text.
        """

    def _split_generators(self, dl_manager):
        self.outcomes: collections.Counter[tuple[str, str, str]] = collections.Counter()
        generate = self._generate_examples if self.beam_runner is None else self._beam_examples
        config, splits = self.builder_config, self.splits()
        if config.transcribe:
            path = pathlib.Path(self.data_dir).parents[1] / TRANSCRIPTS
            words = Transcripts(path, config.transcribe, config.language)
            splits = {
                name: functools.partial(pending, hear=functools.partial(self._hear, words, name))
                for name, pending in splits.items()
            }
        return {name: generate(name, pending) for name, pending in splits.items()}

    def _hear(self, words: Transcripts, split: str, name: str, clips: Sequence[Clip]) -> str:
        """Returns the words of clips, "" where there are none, and counts what became of them."""
        try:
            said = words(name, clips)
            outcome = "ok" if said else "nothing said"
        except MediaError as error:
            said, outcome = "", error.reason
        self.outcomes[split, "words", outcome] += 1
        return said

    def _generate_examples(self, split: str, pending: Callable[[], Iterator[Pending]]):
        config = self.builder_config
        spec, codec, space = config.spec, config.frame_codec, config.space

        def load(one: Pending):
            sample, outcomes = load_pending(one, spec)
            return sample.id, to_example(sample, spec.image_size, codec, space), outcomes

        for name, example, outcomes in in_threads(load, pending()):
            self.outcomes.update((split, *outcome) for outcome in outcomes)
            yield name, example

    def _beam_examples(self, split: str, pending: Callable[[], Iterator[Pending]]):
        import apache_beam as beam

        config = self.builder_config
        spec, codec, space = config.spec, config.frame_codec, config.space

        def decode(one: Pending):
            sample, outcomes = load_pending(one, spec)
            for what, outcome in outcomes:
                name = json.dumps([split, what, outcome])
                beam.metrics.Metrics.counter(BEAM_NAMESPACE, name).inc()
            return sample.id, to_example(sample, spec.image_size, codec, space)

        class Examples(beam.PTransform):
            def expand(self, pipeline):
                return (
                    pipeline
                    | "List" >> beam.Create(list(pending()))
                    | beam.Reshuffle()  # else one worker would decode everything
                    | "Decode" >> beam.Map(decode)
                )

        return Examples()

    def _process_pipeline_result(self, pipeline_result):
        import apache_beam as beam

        wanted = beam.metrics.MetricsFilter().with_namespace(BEAM_NAMESPACE)
        for counter in pipeline_result.metrics().query(wanted)["counters"]:
            self.outcomes[tuple(json.loads(counter.key.metric.name))] += counter.result

    def media_report(self) -> dict[str, dict[str, dict[str, int]]]:
        """Returns the counts of outcomes: split -> what -> outcome -> count."""
        report: dict = {}
        for (split, what, outcome), count in sorted(self.outcomes.items()):
            report.setdefault(split, {}).setdefault(what, {})[outcome] = count
        return report


class DiskShuffler(tfds_shuffle.Shuffler):
    """Sorts the records of a split by hashed key, with their bytes on disk.

    TFDS' own shuffler keeps up to 1 GB in memory and then needs TensorFlow to spill. This one keeps
    a key and an offset per record, so that a build's memory does not grow with the clips.
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


def build(
    builder_class: type[SampleBuilder],
    config: BuilderConfig,
    data_dir: str,
    beam_runner: str | None = None,
    beam_options: Sequence[str] = (),
) -> pathlib.Path:
    """Builds a data set (all or nothing: TFDS renames a finished folder) and returns its folder.

    `beam_runner` names an Apache Beam runner (DirectRunner, DataflowRunner, FlinkRunner, ...) and
    `beam_options` its pipeline options; without it this process does everything. Writes
    `build_report.json` (samples, media outcomes with reasons, what splits share) next to the
    records. Raises DataError if Beam is needed but not installed.
    """
    tfds_shuffle.Shuffler = DiskShuffler
    tfds.disable_progress_bar()
    builder = builder_class(config=config, data_dir=data_dir, file_format="array_record")
    folder = pathlib.Path(builder.data_dir)
    if (folder / BUILD_REPORT).exists():
        return folder
    log_expected_size(builder)
    download = None
    if beam_runner is not None:
        builder.beam_runner = beam_runner
        download = tfds.download.DownloadConfig(
            beam_runner=beam_runner, beam_options=pipeline_options(beam_options)
        )
    builder.download_and_prepare(download_config=download)
    report = {
        "dataset": f"{builder.name}/{config.name}",
        "samples": {name: split.num_examples for name, split in builder.info.splits.items()},
        "media": builder.media_report(),
        "spec": dataclasses.asdict(config.spec),
        "options": config.options,
    }
    write_labels(folder, config.space)
    write_whole(folder / BUILD_REPORT, json.dumps(report, indent=1))
    # The data set is complete without this, which reads it once.
    splits = {s: in_threads(marks_of, SampleSource(folder, s)) for s in builder.info.splits}
    report["shared"] = shared(splits)
    found = {s: unusable(SampleSource(folder, s, light=True)) for s in builder.info.splits}
    report["unusable"] = {split: named for split, named in found.items() if named}
    write_whole(folder / BUILD_REPORT, json.dumps(report, indent=1))
    return folder


def unusable(samples: Iterable[Sample]) -> list[str]:
    """Names the first samples whose pictures or sound could not be used, and why."""
    every = (
        f"{sample.id}: {what}: {why}"
        for sample in samples
        for what, why in (("video", sample.video_status), ("audio", sample.audio_status))
        if why not in FINE
    )
    return list(itertools.islice(every, UNUSABLE_NAMED))


def log_expected_size(builder: SampleBuilder) -> None:
    """Tells about how large the frames of a build will be, before anything is decoded."""
    config = builder.builder_config
    every = (one for pending in builder.splits().values() for one in pending())
    count = sum(bool(one.clips or one.images) for one in every)
    number, side = config.spec.num_frames, config.spec.image_size
    size = count * number * side**2 * 3 * SHARE_KEPT[config.frame_codec] / 1e6
    if count:
        log.info(
            "frames: about %.1f MB (%d samples with %d of %d pixels, %s)",
            *(size, count, number, side, config.frame_codec),
        )


def pipeline_options(flags: Sequence[str]):
    """Builds Beam's PipelineOptions. Raises DataError if Beam is not installed."""
    try:
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise DataError(
            "--beam_runner needs Apache Beam: pip install -r requirements-beam.txt"
        ) from error
    return PipelineOptions(list(flags))
