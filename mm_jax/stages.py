"""Trains the stages of a run in their order, each by the function of its objective."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import logging
import pathlib

from tqdm.contrib.logging import logging_redirect_tqdm

from mm_jax.config.errors import require
from mm_jax.config.load import read_config
from mm_jax.config.schema import Config
from mm_jax.data.datasets.common import SampleSource
from mm_jax.data.labels import LabelSpace, write_labels
from mm_jax.models.sharding import batch_parallelism
from mm_jax.rewards.pool import check_services
from mm_jax.rl import reinforce, reward_model
from mm_jax.run import build, folder
from mm_jax.run.build import Run
from mm_jax.run.lock import RunLock
from mm_jax.run.start import adopt_sources, apply_sources
from mm_jax.training import hosts, supervised
from mm_jax.training.metrics_writer import MetricsWriter, start_wandb
from mm_jax.training.runner import check_batch_size

log = logging.getLogger(__name__)

# objective -> train(run, name, splits, writer) -> the stage's best step
TRAIN = {
    "sft": supervised.train,
    "compressor": supervised.train,
    "preference": reward_model.train,
    "grpo": reinforce.train,
    "ppo": reinforce.train,
}


def train(
    config: Config,
    workdir: pathlib.Path,
    resume: bool = False,
    overwrite: bool = False,
    wandb_project: str = "",
) -> None:
    """Trains every stage of `config` that `workdir` has not finished. Raises ConfigError where
    something is wrong with the config, before anything is written or trained."""
    found = importlib.util.find_spec("wandb")
    require(
        # A folder of that name, which W&B leaves behind, has no origin.
        not wandb_project or (found is not None and found.origin is not None),
        f"--wandb={wandb_project}: needs `pip install wandb`",
    )
    known = resume and (workdir / folder.CONFIG_FILE).is_file()
    before = read_config(workdir / folder.CONFIG_FILE) if known else None
    if before is not None and not config.data.label_space:  # older configs name it
        config = config.replace(data__label_space=before.data.label_space)
    adopted = adopt_sources(config, before) if before is not None else None
    config = adopted or apply_sources(config)
    finished = folder.read_stages(workdir) if known else {}
    space = build.label_space(config, workdir if known else None)
    check(config, space, [name for name in config.stages if name not in finished])
    spec = build.data_spec(config.data.folder)
    splits = {s: SampleSource(config.data.folder, s, light=True) for s in ("train", "val")}
    space = build.check_labels(config, space)

    def prepare_workdir() -> None:
        folder.open_workdir(config, workdir, resume, overwrite)
        (workdir / folder.MEDIA_FILE).write_text(json.dumps(dataclasses.asdict(spec)))
        write_labels(workdir, space)
        build.run_tokenizer(config, workdir, space)

    lock = RunLock(workdir)
    hosts.on_first(lock.acquire)
    try:
        hosts.on_first(prepare_workdir)
        train_stages(config, workdir, finished, splits, wandb_project)
    finally:
        lock.release()


def train_stages(
    config: Config, workdir: pathlib.Path, finished: dict[str, int], splits, wandb_project: str
) -> None:
    run = Run.open(config, workdir)
    build.check_media(config.data.folder, run.model_config)
    log_model(run)
    writer = MetricsWriter(workdir)

    def start() -> None:
        writer.wandb = start_wandb(wandb_project, workdir)

    try:
        if wandb_project:
            hosts.on_first(start)
        for name in config.stages:
            if name in finished:
                log.info("%s: finished before, best step %d", name, finished[name])
                continue
            with logging_redirect_tqdm():  # else log lines break the progress bar
                step = TRAIN[config.stage[name].objective](run, name, splits, writer)
            finished[name] = step
            hosts.on_first(functools.partial(folder.write_stages, workdir, finished))
    finally:
        writer.close()


def check(config: Config, space: LabelSpace, to_do: list[str]) -> None:
    """Raises ConfigError where a stage could not be trained with this config on these devices."""
    build.check_label_space(config, space)
    if any(config.stage[name].reinforces for name in to_do):
        check_services(config.reward)
    ways = batch_parallelism(build.mesh_of(config.mesh))
    for name in to_do:
        check_batch_size(config, name, ways)


def log_model(run: Run) -> None:
    counts: dict[str, int] = {}
    for path, variable in run.abstract.params.flat_state():
        counts[path[0]] = counts.get(path[0], 0) + variable.size
    shown = ", ".join(f"{k} {v:,}" for k, v in counts.items())
    log.info("parameters: %s; vocabulary %d", shown, len(run.tokenizer))
