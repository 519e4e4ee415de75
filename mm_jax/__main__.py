"""python -m mm_jax COMMAND ...: multimodal emotional-support models from data to report."""

from __future__ import annotations

import argparse
import errno
import importlib
import logging
import os
import re
import sys
import threading
import traceback

from mm_jax import __version__
from mm_jax.config.errors import UserError
from mm_jax.run.host_memory import keep_freed_memory

COMMANDS = {
    "prepare": "build a data set from your own files, or from those of a public one",
    "plan": "memory, FLOPs, traffic and time of a training step, before it is paid for",
    "train": "run the training stages of a config",
    "predict": "predict a split, or one video, sound or text of your own",
    "chat": "talk with a run's model in the terminal",
    "serve": "a page to talk to a run's model, and an OpenAI-compatible server",
    "evaluate": "metrics, trivial systems and report from predictions",
    "study": "what every modality and the history's labels are worth to a model",
    "baseline": "predictions of other models (API or transformers)",
    "judge": "let language models rate and compare replies",
    "safety": "replies to an authored set of crisis, idiom and privacy prompts",
    "compare": "several runs side by side",
    "dfew": "train and evaluate the five folds of DFEW",
    "export": "write a run's model as a Hugging Face folder",
    "demo": "the whole chain on synthetic data",
}

TRAINING = ("train", "dfew", "demo")  # commands that run large programs again and again


def build_parser(command: str | None) -> argparse.ArgumentParser:
    """Builds the parser with the arguments of one command; imports only that command's module, so
    that help is quick."""
    parser = argparse.ArgumentParser(prog="python -m mm_jax", description=__doc__)
    parser.add_argument("--version", action="version", version=f"mm_jax {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        if name == command:
            importlib.import_module(f"mm_jax.commands.{name}").add_arguments(sub)
    return parser


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns the arguments, with the command line itself in `argv`, and the config overrides."""
    parser = build_parser(argv[0] if argv else None)
    args, rest = parser.parse_known_args(argv)
    args.argv = argv  # for the record in a run folder
    args.run = run  # for commands that run others
    overrides = [a.removeprefix("--config.") for a in rest if a.startswith("--config.")]
    unknown = [a for a in rest if not a.startswith("--config.")]
    if unknown or (overrides and "config" not in args):
        parser.error(f"{args.command}: unrecognised arguments: {' '.join(unknown or rest)}")
    return args, overrides


def run(argv: list[str]) -> None:
    """Runs a command; its errors go to the caller."""
    args, overrides = parse(argv)
    importlib.import_module(f"mm_jax.commands.{args.command}").main(args, overrides)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    set_up_process()
    if argv and argv[0] in TRAINING:
        keep_freed_memory()
    args, overrides = parse(argv)
    command = importlib.import_module(f"mm_jax.commands.{args.command}")
    try:
        command.main(args, overrides)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        named = error.filename is not None and error.strerror
        text = f"{error.filename}: {error.strerror}" if named else error.strerror or str(error)
        if error.errno == errno.ENOSPC:
            text += "; free some (a run then goes on with --resume)"
        print(f"error: {text}", file=sys.stderr)
        return 2
    return 0


def report_thread(args: threading.ExceptHookArgs) -> None:
    """Reports an error that ended a thread, but for those of orbax and tensorboardX: they become
    one line where a save is waited for, or the next event is written."""
    frames = traceback.extract_tb(args.exc_traceback)
    quiet = re.compile(r"[/\\](orbax|tensorboardX)[/\\]")
    if not any(quiet.search(frame.filename) for frame in frames):
        threading.__excepthook__(args)


def set_up_process() -> None:
    """Sets up logging, a persistent compilation cache, and quiet libraries."""
    threading.excepthook = report_thread
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in ("absl", "jax", "orbax", "matplotlib", "grain", "httpx", "httpx2", "openai"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Orbax logs by absl, with a traceback, what it raises too.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    default = os.path.join(os.path.expanduser("~"), ".cache", "mm_jax", "xla")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", default)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault(
        "TOKENIZERS_PARALLELISM", "false"
    )  # loaders run in processes of their own


if __name__ == "__main__":
    sys.exit(main())
