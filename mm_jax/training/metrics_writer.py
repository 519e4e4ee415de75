"""metrics.jsonl and TensorBoard events."""

from __future__ import annotations

import json
import pathlib

import tensorboardX


class MetricsWriter:
    """Appends one JSON object a record; the same numbers go to TensorBoard under `stage/name`."""

    def __init__(self, workdir: pathlib.Path):
        self.file = open(workdir / "metrics.jsonl", "a", encoding="utf-8")
        self.events = tensorboardX.SummaryWriter(str(workdir / "tensorboard"))

    def write(self, stage: str, step: int, values: dict[str, float]) -> None:
        record = {"stage": stage, "step": step, **{k: float(v) for k, v in values.items()}}
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        for name, value in values.items():
            self.events.add_scalar(f"{stage}/{name}", float(value), step)

    def close(self) -> None:
        self.file.close()
        self.events.close()
