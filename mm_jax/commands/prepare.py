"""Builds a data set as ArrayRecord files (command `prepare`)."""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import io
import json
import pathlib
import shlex
import shutil
import tempfile

from mm_jax.commands.arguments import add_transcribing
from mm_jax.config.errors import require
from mm_jax.data.answers import format_answer
from mm_jax.data.datasets.common import (
    BUILD_REPORT,
    BuilderConfig,
    Pending,
    SampleBuilder,
    build,
)
from mm_jax.data.datasets.corpus import Corpus, CorpusBuilder
from mm_jax.data.datasets.request import DATASETS, DataRequest
from mm_jax.data.datasets.schema import FRAME_CODECS
from mm_jax.data.history import history_labels
from mm_jax.data.prompts import chat_messages


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, of = parser.add_argument, DataRequest
    add("--dataset", required=True, choices=DATASETS)
    add("--raw", type=pathlib.Path, help="folder of the raw files (docs/data.md)")
    add("--check", action="store_true", help="only read and check the raw files; write nothing")
    add("--data_dir", type=pathlib.Path, default=of.data_dir, help="default: data")
    add("--overwrite", action="store_true", help="build again where it exists")
    add("--num_frames", type=int, default=of.num_frames, help="frames per sample (default 8)")
    add("--image_size", type=int, default=of.image_size, help="side in pixels (default 384)")
    add("--max_audio_seconds", type=float, default=of.max_audio_seconds, help="default 30")
    add(
        "--audio_mode",
        choices=("whole", "released"),
        default=of.audio_mode,
        help="released: 8 clips of 2 s padded to 30 s, as the released code does",
    )
    add(
        "--frame_codec",
        choices=tuple(FRAME_CODECS),
        default=of.frame_codec,
        help="how records hold frames: lossless WebP (default), JPEG of quality 95 (half as "
        "large, not the same pictures), or zlib (twice as large; how builds were)",
    )
    add("--media", type=pathlib.Path, help="mesc, meld: folder of the clips")
    add("--clues", action="store_true", help="mesc: keep the clue sentences of the json files")
    add(
        "--check_counts",
        action=argparse.BooleanOptionalAction,
        default=of.check_counts,
        help="mesc, meld: refuse files whose counts are not the release's",
    )
    add("--fold", type=int, default=of.fold, help="that is the test (default 1)")
    add("--classes", type=int, default=of.classes, choices=(4, 6), help="iemocap (default 4)")
    add("--val_share", type=float, default=of.val_share, help="share held out (default 0.1)")
    add("--size", type=int, default=of.size, help="synthetic: dialogues (default 480)")
    add("--seed", type=int, default=of.seed, help="of what is drawn (default 0)")
    add_transcribing(parser, "dialogues, dfew: write down what is said in clips without text")
    beam = parser.add_argument_group("Apache Beam (pip install -r requirements-beam.txt)")
    beam.add_argument(
        "--beam_runner", help="DirectRunner, DataflowRunner, FlinkRunner, SparkRunner"
    )
    beam.add_argument(
        "--beam_options",
        default="",
        help="its pipeline options in one argument, such as '--direct_running_mode="
        "multi_processing --direct_num_workers=8'",
    )


def main(args: argparse.Namespace, overrides: list[str]) -> None:
    del overrides
    request = request_of(args)
    require(
        not (args.transcribe and args.beam_runner),
        "--transcribe does not go with --beam_runner: one process transcribes",
    )
    builder, config = request.builder()
    if args.check:
        check(args, builder, config)
        return
    folder = request.folder_of(builder, config)
    aside = folder.with_name(f"{folder.name}.before")
    if aside.exists() and not folder.exists():  # an earlier build was killed
        aside.rename(folder)
    if args.overwrite and folder.exists():
        known = (folder / "dataset_info.json").exists()
        require(known, f"--overwrite: {folder} is not a built data set")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)  # back again if the build fails
    require(not folder.exists(), f"{folder} exists; pass --overwrite to build it again")
    options = shlex.split(args.beam_options)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces itself there
            built = build(builder, config, str(args.data_dir), args.beam_runner, options)
    except BaseException:
        if aside.exists():
            shutil.rmtree(folder, ignore_errors=True)
            aside.rename(folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)
    report = json.loads((built / BUILD_REPORT).read_text())
    print("samples: " + ", ".join(f"{k} {v}" for k, v in report["samples"].items()))
    for split, counts in report["media"].items():
        for what, reasons in counts.items():
            print(f"  {split} {what}: " + ", ".join(f"{k} {v}" for k, v in reasons.items()))
    for split, named in report["unusable"].items():
        more = f" and {len(named) - 3} more in {BUILD_REPORT}" if len(named) > 3 else ""
        print(f"  {split} cannot use {', '.join(named[:3])}{more}")
    for splits, kinds in report["shared"].items():
        found = (f"{n['count']} {kind} ({n['pairs'][0]})" for kind, n in kinds.items())
        print(f"  shared by {splits.replace(', ', ' and ')}: {', '.join(found)}")
    if not report["shared"]:
        print("  the splits share neither dialogues, longer texts nor clips")
    size = sum(file.stat().st_size for file in built.iterdir())
    print(f"  {size / 1e6:,.1f} MB in")
    print(built)


def check(args: argparse.Namespace, builder: type[SampleBuilder], config: BuilderConfig) -> None:
    """Reads the raw files and prints what a build would hold."""
    require(args.dataset != "synthetic", "--check: synthetic has no raw files")
    with tempfile.TemporaryDirectory() as empty, contextlib.redirect_stdout(io.StringIO()):
        made = builder(config=config, data_dir=empty, file_format="array_record")
        splits = {name: list(pending()) for name, pending in made.splits().items()}
    for name, pending in splits.items():
        found = (one.images or any(c.path.is_file() for c in one.clips) for one in pending)
        clips = sum(map(bool, found))
        print(f"{name}: {len(pending)} samples" + (f", {clips} with clips" if clips else ""))
    for task in config.space.tasks:
        print(f"{task.name} ({task.about}), in prompts {task.field}")
        counts = {
            n: collections.Counter(p.sample.target(task.name) for p in own)
            for n, own in splits.items()
        }
        for label in task.labels:
            print(f"  {label}: " + ", ".join(f"{n} {found[label]}" for n, found in counts.items()))
        none = {n: found[""] for n, found in counts.items() if found[""]}
        if none:
            print("  without a label: " + ", ".join(f"{n} {k}" for n, k in none.items()))
    print("answers end in a reply" if config.space.reply else "answers have no reply")
    if isinstance(made, CorpusBuilder):
        for note in notes(made.corpus, splits):
            print(f"note: {note}")
    sample = next(one.sample for own in splits.values() for one in own if one.sample.labels)
    shown = history_labels(sample, "gold")
    (_, user) = chat_messages(sample, "ecot", config.space, shown)
    answer = {task: sample.target(task) or "?" for task in config.space.names}
    print(f"\nA sample, as the long prompt (data.template=ecot) shows it:\n{user['content']}")
    print(f"\nIts answer:\n{format_answer(answer, sample.response, config.space)}")
    print("\nThe tables are in order; clips are only opened by the build. Nothing was written.")


def notes(corpus: Corpus, splits: dict[str, list[Pending]]) -> list[str]:
    """Tells what is no error in people's data, but may not be meant."""
    found = []
    for task in corpus.space.tasks:
        said = collections.Counter(u.labels.get(task.name, "") for u in corpus.utterances)
        used = {
            name: collections.Counter(one.sample.target(task.name) for one in own)
            for name, own in splits.items()
        }
        count, samples = said.total() - said[""], sum(c.total() - c[""] for c in used.values())
        if samples < count:
            found.append(
                f"{task.name}: {count} labels give {samples} samples, as one is a turn before or "
                "after a reply, with the commonest label of its utterances; docs/data.md"
            )
        rare = [label for label in task.labels if said[label] < 2]
        if rare:
            found.append(f"{task.name}: fewer than two utterances have {', '.join(rare)}")
        unseen = [x for x in task.labels if not used["train"][x] and said[x] > 1]
        if unseen:
            found.append(f"{task.name}: train has no {', '.join(unseen)}")
    return found


def request_of(args: argparse.Namespace) -> DataRequest:
    names = [field.name for field in dataclasses.fields(DataRequest)]
    return DataRequest(**{name: vars(args)[name] for name in names})
