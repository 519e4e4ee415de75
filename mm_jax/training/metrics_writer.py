"""Writes metrics.jsonl, TensorBoard events and, if asked to, to Weights & Biases."""

from __future__ import annotations

import json
import os
import pathlib
import uuid
from collections.abc import Callable

import jax
import tensorboardX

from mm_jax.config.errors import ConfigError
from mm_jax.config.files import read_json, write_whole


class MetricsWriter:
    """Appends one JSON object per record, and the same numbers to TensorBoard as `stage/name`.

    Only process 0 writes.
    """

    def __init__(self, workdir: pathlib.Path):
        self.writes = jax.process_index() == 0
        self.path, self.wandb = workdir / "metrics.jsonl", None
        if self.writes:
            self.events = tensorboardX.SummaryWriter(str(workdir / "tensorboard"))

    def rewind(self, stage: str, step: int) -> None:
        """Drops the stage's records after `step`: lost steps run again and write them again."""
        if not self.writes or not self.path.exists():
            return
        keep_records(self.path, lambda r: r["stage"] != stage or r["step"] <= step)

    def write(self, stage: str, step: int, values: dict[str, float]) -> None:
        if not self.writes:
            return
        record = {"stage": stage, "step": step, **{k: float(v) for k, v in values.items()}}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if not self.events.file_writer.event_writer._worker.is_alive():  # or it would wait for ever
            raise OSError(f"{self.events.logdir}: events cannot be written (disk full?)")
        for name, value in values.items():
            # TensorBoard warns at every ":" in a name, such as that of a reward module:function.
            self.events.add_scalar(f"{stage}/{name.replace(':', '.')}", float(value), step)
        if self.wandb is not None:
            # Steps begin again in every stage, so each has an axis of its own.
            values = {f"{stage}/{name}": value for name, value in record.items() if name in values}
            self.wandb.log({**values, f"{stage}/step": step})

    def close(self) -> None:
        if self.writes:
            self.events.close()
        if self.wandb is not None:
            self.wandb.finish()


def start_wandb(project: str, workdir: pathlib.Path):
    """Starts, or continues, the W&B run of a run folder. Raises ConfigError."""
    import wandb  # an optional package

    try:
        return _start_wandb(wandb, project, workdir)
    except wandb.errors.Error as error:
        raise ConfigError(f"--wandb={project}: {error}") from error


def _start_wandb(wandb, project: str, workdir: pathlib.Path):
    mark = workdir / "wandb_id"
    if not mark.exists():
        write_whole(mark, uuid.uuid4().hex[:12])
    run = wandb.init(
        project=project,
        name=workdir.resolve().name,
        id=mark.read_text(),
        resume="allow",
        dir=str(workdir),
        config=read_json(workdir / "config.json"),
    )
    for name in read_json(workdir / "config.json")["stages"]:
        run.define_metric(f"{name}/step", hidden=True)
        run.define_metric(f"{name}/*", step_metric=f"{name}/step")
    return run


def keep_records(path: pathlib.Path, wanted: Callable[[dict], bool]) -> None:
    """Keeps the wanted records of a file of JSON lines, and drops a line that a kill cut off,
    possibly within a character."""
    partial = path.with_name(path.name + ".partial")
    with (
        open(path, encoding="utf-8", errors="replace") as old,
        open(partial, "w", encoding="utf-8") as new,
    ):
        for line in old:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if wanted(record):
                new.write(line.rstrip("\n") + "\n")
    os.replace(partial, path)
