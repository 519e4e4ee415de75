"""train: run the stages of a config, with checkpoints, resume and selection on the val split."""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import functools
import json
import logging
import pathlib
import shutil

from ml_collections import ConfigDict

from mm_jax.config.errors import ConfigError, require
from mm_jax.config.load import flatten, load_config, read_config, save_config
from mm_jax.data.datasets.common import SampleSource
from mm_jax.data.pipeline import WorkerError
from mm_jax.models.sharding import batch_parallelism
from mm_jax.rewards.build import check_services
from mm_jax.rewards.pool import RewardFailureError
from mm_jax.run import build
from mm_jax.run.folder import (
    MEDIA_FILE,
    Session,
    mesh_of,
    read_stages,
    record_command,
    write_stages,
)
from mm_jax.run.start import adopt_sources, apply_sources
from mm_jax.stages import check_batch_size, train_stage
from mm_jax.training import hosts
from mm_jax.training.checkpoint import CheckpointError
from mm_jax.training.metrics_writer import MetricsWriter
from mm_jax.training.supervised import NonFiniteError, Preempted

log = logging.getLogger(__name__)

# Fields that a resumed run may change: where and how it runs, not what it computes. (Another mesh
# or accumulation adds in another order: results then agree up to round-off and dropout masks.)
MAY_CHANGE = (
    "mesh.*",
    "stage.*.accumulation",
    "stage.*.checkpoint_every",
    "model.remat",
    "data.reader_threads",
    "data.reader_processes",
    "data.prefetch",
    "log_every",
    "profile_steps",
    "keep_checkpoints",
    "predict.*",
    "reward.judge.base_url",
    "reward.second_judge.base_url",
    "reward.similarity_url",
    "reward.limits.*",
    "reward.failure_limit",
    "reward.function_timeout",
)
EXIT_PREEMPTED = 75  # of a run that SIGTERM stopped after saving (EX_TEMPFAIL: start it again)
USER_ERRORS = (CheckpointError, NonFiniteError, RewardFailureError, WorkerError)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="configs/NAME.py[:arg]")
    parser.add_argument("--workdir", required=True, type=pathlib.Path, help="folder of the run")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="go on with the run in workdir")
    existing.add_argument("--overwrite", action="store_true", help="delete the run in workdir")
    hosts.add_arguments(parser)


def main(args: argparse.Namespace, overrides: list[str]) -> None:
    config = load_config(args.config, overrides)
    hosts.initialize(args)
    try:
        train(config, args.workdir, resume=args.resume, overwrite=args.overwrite)
        hosts.on_first(functools.partial(record_command, args.workdir, args.argv))
    except Preempted as stopped:
        log.warning("%s; go on with --resume (exit status %d)", stopped, EXIT_PREEMPTED)
        raise SystemExit(EXIT_PREEMPTED) from None


def open_workdir(config: ConfigDict, workdir: pathlib.Path, resume: bool, overwrite: bool) -> None:
    """Creates or takes up a run folder. A folder that holds anything else is never deleted."""
    known = (workdir / "config.json").is_file()
    if workdir.exists() and any(workdir.iterdir()):
        if overwrite:
            require(known, f"--overwrite: {workdir} is no run folder; not deleted")
            shutil.rmtree(workdir)
        elif not resume:
            raise ConfigError(f"--workdir: {workdir} is not empty; pass --resume or --overwrite")
    if resume and known:
        before = read_config(workdir / "config.json")
        old, new = flatten(before), flatten(config)
        changed = sorted(
            k for k in {**old, **new} if json.dumps(old.get(k)) != json.dumps(new.get(k))
        )
        free = MAY_CHANGE + added_stages(before, config)
        fixed = [k for k in changed if not any(fnmatch.fnmatch(k, p) for p in free)]
        require(
            not fixed,
            f"--resume: the config differs from {workdir}/config.json in {fixed}; only "
            f"{', '.join(MAY_CHANGE)} may change, and stages may be added at the end",
        )
        for key in changed:
            log.info("--resume: %s changed from %s to %s", key, old.get(key), new.get(key))
    workdir.mkdir(parents=True, exist_ok=True)
    save_config(config, workdir / "config.json")


def added_stages(before: ConfigDict, config: ConfigDict) -> tuple[str, ...]:
    """Patterns of the fields that stages added behind those of `before` bring with them."""
    old, new = before.stages, config.stages
    if new[: len(old)] != old:
        return ()
    patterns = [f"stage.{name}.*" for name in new[len(old) :]]
    if not any(before.stage[name].objective in ("grpo", "ppo") for name in old):
        patterns.append("reward.*")  # nothing has used it
    return ("stages", *patterns) if len(new) > len(old) else ()


def train(
    config: ConfigDict, workdir: pathlib.Path, resume: bool = False, overwrite: bool = False
) -> None:
    """Runs every stage of `config` that `workdir` has not finished."""
    saved = workdir / "config.json"
    known = resume and saved.is_file()
    if not (known and adopt_sources(config, read_config(saved))):
        apply_sources(config)
    build.validate(config)
    finished = read_stages(workdir) if known else {}
    to_do = [name for name in config.stages if name not in finished]
    if any(config.stage[name].objective in ("grpo", "ppo") for name in to_do):
        check_services(config.reward)
    ways = batch_parallelism(mesh_of(config))
    for name in to_do:
        check_batch_size(config.stage[name], name, ways)
    spec = build.data_spec(config.data.folder)
    sources = {s: SampleSource(config.data.folder, s, light=True) for s in ("train", "val")}

    def prepare_workdir() -> None:
        open_workdir(config, workdir, resume, overwrite)
        (workdir / MEDIA_FILE).write_text(json.dumps(dataclasses.asdict(spec)))
        build.run_tokenizer(config, workdir)

    hosts.on_first(prepare_workdir)
    session = Session.open(config, workdir)
    build.check_media(config.data.folder, session.model_config)
    log_model(session)
    writer = MetricsWriter(workdir)
    try:
        for name in config.stages:
            if name in finished:
                log.info("%s: finished before, best step %d", name, finished[name])
            else:
                finished[name] = train_stage(session, sources, name, writer)
                hosts.on_first(functools.partial(write_stages, workdir, finished))
    finally:
        writer.close()


def log_model(session: Session) -> None:
    counts: dict[str, int] = {}
    for path, variable in session.abstract.params.flat_state():
        counts[path[0]] = counts.get(path[0], 0) + variable.size
    shown = ", ".join(f"{k} {v:,}" for k, v in counts.items())
    log.info("parameters: %s; vocabulary %d", shown, len(session.tokenizer))
