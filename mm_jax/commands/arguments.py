"""Adds and reads arguments that several commands share (not a command itself)."""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Sequence

from flax import nnx

from mm_jax.config.errors import ConfigError, prefixed, require
from mm_jax.config.files import read_json, read_text
from mm_jax.config.load import overridden, read_config
from mm_jax.config.reward import Limits
from mm_jax.data.conversation import parse_history
from mm_jax.data.datasets.common import SampleSource
from mm_jax.data.labels import LabelSpace
from mm_jax.data.media import MediaSpec
from mm_jax.data.records import Sample, Utterance
from mm_jax.rewards.calls import SpendCapError, StopError
from mm_jax.run import build
from mm_jax.run.build import Run
from mm_jax.run.folder import MEDIA_FILE, finished_stage
from mm_jax.training.checkpoint import load_stage

SPLITS = ("train", "val", "test")


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `open_run`: a run folder, a stage and a step."""
    add = parser.add_argument
    add("--checkpoint", required=True, type=pathlib.Path, help="run folder written by train")
    add("--stage", help="stage whose best checkpoint is used (default: the last finished)")
    add("--step", type=int, help="its step (default: the best on val)")
    # Overrides of the run's config, for example --config.predict.temperature=0.8.
    parser.set_defaults(config=None)


def add_safety(parser: argparse.ArgumentParser) -> None:
    """Adds --safety (see `evaluation.care.Texts`)."""
    parser.add_argument(
        "--safety",
        metavar="FILE[:LOCALE]",
        help="texts that are shown in place of a reply (default: configs/safety.py:en)",
    )


def add_transcribing(parser, what: str) -> None:
    """Adds --transcribe and --language (see `data.speech.Transcriber`)."""
    parser.add_argument(
        "--transcribe",
        metavar="MODEL",
        help=f"{what}, by Whisper (pip install -r requirements-speech.txt): a folder in "
        "CTranslate2's format, or a name such as small",
    )
    parser.add_argument(
        "--language",
        metavar="CODE",
        help="the language spoken, such as en (default: the model finds out)",
    )


def open_run(
    folder: pathlib.Path,
    stage: str | None = None,
    step: int | None = None,
    overrides: Sequence[str] = (),
) -> tuple[Run, MediaSpec, nnx.State]:
    """Opens a run folder; returns the run, its media spec and the stage's parameters."""
    config = overridden(read_config(folder / "config.json"), overrides)
    name = finished_stage(config, folder, stage, "--checkpoint")
    spec = MediaSpec(**read_json(folder / MEDIA_FILE))
    run = Run.open(config, folder)
    params, _ = load_stage(run, name, step)
    return run, spec, params


def read_history(path: pathlib.Path, space: LabelSpace) -> tuple[Utterance, ...]:
    """Reads earlier utterances from a text or JSON file. Raises ConfigError naming the entry."""
    require(path.is_file(), f"--history: {path} does not exist")
    with prefixed("--history", ": "):
        return parse_history(read_text(path), space)


def split_samples(
    run: Run, data: pathlib.Path | None, split: str, limit: int | None = None
) -> list[Sample]:
    """Reads the first samples of a split (default: all) of a data set (default: the run's)."""
    folder = data or run.config.data.folder
    build.check_media(folder, run.model_config)
    if data is not None:
        other = run.config.replace(data__folder=str(data))
        build.check_labels(other, run.prompter.label_space)
    source = SampleSource(folder, split)
    return [source[i] for i in range(len(source))[:limit]]


def add_limit_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the limits on calls to an endpoint and on their cost."""
    add = parser.add_argument
    add("--concurrency", type=int, default=16)
    add("--requests_per_minute", type=float, default=0.0, help="0: no limit")
    add("--price_in", type=float, default=0.0, help="per million prompt tokens")
    add("--price_out", type=float, default=0.0, help="per million answer tokens")
    add("--spend_cap", type=float, default=0.0, help="stop this command there; 0: no cap")


def stopped(error: StopError) -> ConfigError:
    """Returns the error of a command whose calls were stopped."""
    more = "raise --spend_cap to go on; " if isinstance(error, SpendCapError) else ""
    return ConfigError(f"{error}; {more}the answers so far are kept and cost nothing again")


def limits(args: argparse.Namespace) -> Limits:
    names = ("concurrency", "requests_per_minute", "price_in", "price_out", "spend_cap")
    return Limits(**{name: vars(args)[name] for name in names}, breaker_waits=True)
