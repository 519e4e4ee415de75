"""Trains a config's stages, with checkpoints, resume and selection on val (command `train`)."""

from __future__ import annotations

import argparse
import functools
import logging
import pathlib

from mm_jax import stages
from mm_jax.config.load import load_config, resolve
from mm_jax.run.folder import record_command
from mm_jax.training import hosts
from mm_jax.training.runner import Preempted

log = logging.getLogger(__name__)

EXIT_PREEMPTED = 75  # SIGTERM stopped the run after saving (EX_TEMPFAIL: start it again)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="configs/NAME.py[:arg]")
    parser.add_argument("--workdir", required=True, type=pathlib.Path, help="folder of the run")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="continue the run in workdir")
    existing.add_argument("--overwrite", action="store_true", help="delete the run in workdir")
    parser.add_argument("--wandb", default="", metavar="PROJECT", help="log to W&B too")
    hosts.add_arguments(parser)


def main(args: argparse.Namespace, overrides: list[str]) -> None:
    config = resolve(load_config(args.config, overrides))
    hosts.initialize(args)
    try:
        stages.train(config, args.workdir, args.resume, args.overwrite, args.wandb)
        hosts.on_first(functools.partial(record_command, args.workdir, args.argv))
    except Preempted as stopped:
        log.warning("%s; continue with --resume (exit status %d)", stopped, EXIT_PREEMPTED)
        raise SystemExit(EXIT_PREEMPTED) from None
