"""metrics.jsonl and TensorBoard events."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Callable

import jax
import tensorboardX


class MetricsWriter:
    """Appends one JSON object a record; the same numbers go to TensorBoard under `stage/name`.

    Process 0 writes; the others write nothing.
    """

    def __init__(self, workdir: pathlib.Path):
        self.writes = jax.process_index() == 0
        self.path = workdir / "metrics.jsonl"
        if self.writes:
            self.events = tensorboardX.SummaryWriter(str(workdir / "tensorboard"))

    def rewind(self, stage: str, step: int) -> None:
        """Forgets the stage's records after `step`: steps that ran but were lost are run again."""
        if not self.writes or not self.path.exists():
            return
        keep_records(self.path, lambda r: r["stage"] != stage or r["step"] <= step)

    def write(self, stage: str, step: int, values: dict[str, float]) -> None:
        if not self.writes:
            return
        record = {"stage": stage, "step": step, **{k: float(v) for k, v in values.items()}}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        for name, value in values.items():
            # TensorBoard takes no ":" of a module:function, and says so every time.
            self.events.add_scalar(f"{stage}/{name.replace(':', '.')}", float(value), step)

    def close(self) -> None:
        if self.writes:
            self.events.close()


def keep_records(path: pathlib.Path, wanted: Callable[[dict], bool]) -> None:
    """Leaves the wanted records of a file of JSON lines; a line that a kill cut off, maybe within a
    character, is dropped."""
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
