"""metrics.jsonl and TensorBoard events."""

from __future__ import annotations

import json
import os
import pathlib

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
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # the process was killed while it wrote
                continue
            if record["stage"] != stage or record["step"] <= step:
                kept.append(line + "\n")
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text("".join(kept), encoding="utf-8")
        os.replace(partial, self.path)

    def write(self, stage: str, step: int, values: dict[str, float]) -> None:
        if not self.writes:
            return
        record = {"stage": stage, "step": step, **{k: float(v) for k, v in values.items()}}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        for name, value in values.items():
            self.events.add_scalar(f"{stage}/{name}", float(value), step)

    def close(self) -> None:
        if self.writes:
            self.events.close()
