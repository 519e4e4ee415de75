"""prepare: build a data set as ArrayRecord files."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import pathlib
import shlex
import shutil

from mm_jax.config.errors import ConfigError, require
from mm_jax.data.datasets.common import BUILD_REPORT, BuilderConfig, build
from mm_jax.data.media import MediaSpec


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--dataset", required=True, choices=("mesc", "dfew", "synthetic"))
    add("--raw", type=pathlib.Path, help="folder of the raw files (mesc, dfew)")
    add("--data_dir", type=pathlib.Path, default=pathlib.Path("data"), help="default: data")
    add("--overwrite", action="store_true", help="build again where it exists")
    add("--num_frames", type=int, default=8, help="frames a sample (default 8)")
    add("--image_size", type=int, default=384, help="their side in pixels (default 384)")
    add("--max_audio_seconds", type=float, default=30.0, help="default 30")
    add(
        "--audio_mode",
        choices=("whole", "released"),
        default="whole",
        help="released: 8 clips of 2 s padded to 30 s, as the released code does",
    )
    add("--media", type=pathlib.Path, help="mesc: folder of utterance clips or whole episodes")
    add("--clues", action="store_true", help="mesc: keep the clue sentences of the json files")
    add(
        "--check_counts",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="mesc: refuse files whose sample and label counts are not the release's",
    )
    add("--fold", type=int, default=1, choices=range(1, 6), help="dfew: fold 1 to 5 (default 1)")
    add("--val_share", type=float, default=0.1, help="dfew: share of train held out as val")
    add("--size", type=int, default=480, help="synthetic: dialogues (default 480)")
    add("--seed", type=int, default=0, help="synthetic and dfew's val slice (default 0)")
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
    print(prepare(args))


def request(args: argparse.Namespace) -> tuple[type, BuilderConfig]:
    """The builder and its config that `args` ask for. Raises ConfigError."""
    try:
        spec = MediaSpec(args.num_frames, args.image_size, args.max_audio_seconds, args.audio_mode)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    shape = f"f{spec.num_frames}_s{spec.image_size}"
    shape += "_released" if spec.audio_mode == "released" else ""
    if args.dataset != "synthetic":
        require(args.raw is not None, f"--raw: {args.dataset} needs the folder of its raw files")
        require(args.raw.is_dir(), f"--raw: {args.raw} is not a folder")
    if args.dataset == "mesc":
        from mm_jax.data.datasets.mesc.mesc_dataset_builder import Builder

        require(args.media is None or args.media.is_dir(), f"--media: {args.media} is not a folder")
        name = (shape if args.media else "text") + ("_clues" if args.clues else "")
        raw, media = str(args.raw), str(args.media or "")
        options = dict(clues=args.clues, check_counts=args.check_counts)
    elif args.dataset == "dfew":
        from mm_jax.data.datasets.dfew.dfew_dataset_builder import Builder

        require(
            0 < args.val_share < 1, f"--val_share: expected between 0 and 1, got {args.val_share}"
        )
        name, raw, media = f"fold{args.fold}_{shape}", str(args.raw), ""
        options = dict(fold=args.fold, val_share=args.val_share, seed=args.seed)
    else:
        from mm_jax.data.datasets.synthetic.synthetic_dataset_builder import Builder

        require(args.size >= 10, f"--size: expected at least 10 dialogues, got {args.size}")
        source = f"n{args.size}_seed{args.seed}"
        name, media = f"{source}_{shape}", ""
        raw = str(args.data_dir / "synthetic" / f"raw_{source}")
        options = dict(size=args.size, seed=args.seed)
    return Builder, BuilderConfig(name=name, raw=raw, media=media, spec=spec, options=options)


def target_folder(args: argparse.Namespace) -> pathlib.Path:
    """Where the data set that `args` ask for is, or will be."""
    builder, config = request(args)
    return args.data_dir / args.dataset / config.name / str(builder.VERSION)


def prepare(args: argparse.Namespace) -> pathlib.Path:
    """Builds what `args` ask for and returns the folder of the data set."""
    builder, config = request(args)
    folder = target_folder(args)
    if args.overwrite and folder.exists():
        require((folder / BUILD_REPORT).exists(), f"--overwrite: {folder} is not a built data set")
        shutil.rmtree(folder)
    require(not folder.exists(), f"{folder} exists; pass --overwrite to build it again")
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces itself there
        built = build(
            builder,
            config,
            str(args.data_dir),
            args.beam_runner,
            shlex.split(args.beam_options),
        )
    report = json.loads((built / BUILD_REPORT).read_text())
    print("samples: " + ", ".join(f"{k} {v}" for k, v in report["samples"].items()))
    for split, counts in report["media"].items():
        for what, reasons in counts.items():
            print(f"  {split} {what}: " + ", ".join(f"{k} {v}" for k, v in reasons.items()))
    return built
