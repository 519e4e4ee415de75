"""Defines the contents of metrics.json as types (schema mm_jax.metrics/1, docs/evaluation.md)."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable

import numpy as np
import pydantic

from mm_jax.config.errors import ConfigError, require
from mm_jax.config.files import read_json, write_whole
from mm_jax.data.records import CLIENT_EMOTION, STRATEGY, THERAPIST_EMOTION
from mm_jax.evaluation.predictions import main_system

SCHEMA = "mm_jax.metrics/1"
BOOTSTRAP_DRAWS = 1000
MESC_TASKS = (CLIENT_EMOTION, THERAPIST_EMOTION, STRATEGY)
MODALITY_NAMES = {
    "text": "text only",
    "a": "text + audio",
    "v": "text + video",
    "av": "text + audio + video",
}


def titles(tasks: Iterable[str]) -> dict[str, str]:
    """Maps a label space's tasks to their names in reports, such as "T1 client emotion"."""
    return {task: f"T{i} {task.replace('_', ' ')}" for i, task in enumerate(tasks, 1)}


Interval = tuple[float, float]


class PaperTask(pydantic.BaseModel):
    """Holds a task's scores as in the released evaluation; None where no row counts."""

    n: int
    accuracy: float | None
    weighted_f1: float | None


class TaskMetrics(PaperTask):
    """Holds a task's scores. `interval` is the accuracy's; rows of `confusion` are gold labels."""

    interval: Interval
    macro_f1: float
    uar: float
    recall: dict[str, float | None]
    parse_rate: float
    labels: list[str]
    confusion: list[list[int]]


class PaperReply(pydantic.BaseModel):
    """Holds the responses' scores as in the released evaluation; None where no row counts."""

    n: int
    bleu2: float | None
    rouge_l: float | None


class ReplyMetrics(PaperReply):
    sacrebleu: float
    sacrebleu_signature: str
    distinct_1: float
    distinct_2: float
    length: float
    empty_rate: float
    refusal_rate: float
    bertscore: dict
    meteor: dict


class Column(pydantic.BaseModel):
    """Holds the scores of the tasks and the response that a system predicts; one level in the
    file."""

    tasks: dict[str, PaperTask] = {}
    response: PaperReply | None = None

    @pydantic.model_validator(mode="before")
    @classmethod
    def _read(cls, data):
        if not isinstance(data, dict) or "tasks" in data:
            return data
        return {
            "tasks": {name: value for name, value in data.items() if name != "response"},
            "response": data.get("response"),
        }

    @pydantic.model_serializer(mode="wrap")
    def _dump(self, dump) -> dict:
        data = dump(self)
        return data["tasks"] | ({"response": data["response"]} if self.response else {})


class Standard(Column):
    tasks: dict[str, TaskMetrics] = {}
    response: ReplyMetrics | None = None


class SystemMetrics(pydantic.BaseModel):
    """Holds a system's scores; status and damage count its rows."""

    n: int
    standard: Standard
    paper_compat: Column
    status: dict[str, int]
    damage: dict[str, int]


class OwnMetrics(SystemMetrics):
    """Holds the scores of one set of the model's own rows."""

    modality: str
    history_labels: str
    calibration: dict[str, dict]
    slices: dict[str, dict[str, dict]]
    by_cue: dict[str, dict] | None = None  # synthetic data: which channel holds the emotion

    @property
    def name(self) -> str:
        modality = MODALITY_NAMES[self.modality]
        return f"this model: {modality}, history labels {self.history_labels}"


class Comparisons(pydantic.BaseModel):
    """Holds the main system's differences to others: name -> score -> `paired_difference`."""

    of: str
    to: dict[str, dict[str, dict]]


class Metrics(pydantic.BaseModel):
    """Holds metrics.json, with other commands' results on the same predictions."""

    date: str
    version: str
    versions: dict[str, str]
    config_sha256: str
    commands: list[dict[str, str]]
    run: str
    dataset: str
    split: str
    label_space: str
    label_tasks: tuple[str, ...] = MESC_TASKS  # all of the label space, in order
    trained_with_history_labels: str
    complete: bool
    predictions_sha256: str
    left_out: list[str]
    media: dict
    shared: dict[str, dict[str, dict]] = {}
    rewards: dict[str, str]
    systems: list[OwnMetrics]
    models: dict[str, SystemMetrics]
    baselines: dict[str, SystemMetrics]
    comparisons: Comparisons
    judgements: dict | None = None
    study: dict | None = None
    safety: dict | None = None

    @property
    def main(self) -> OwnMetrics:
        """Returns the system with the most modalities, the first of several."""
        key = main_system((s.modality, s.history_labels) for s in self.systems)
        return next(s for s in self.systems if (s.modality, s.history_labels) == key)

    @property
    def tasks(self) -> list[str]:
        """Lists the tasks that were evaluated, in the report's order."""
        return [t for t in self.label_tasks if t in self.systems[0].standard.tasks]

    @property
    def is_dfew(self) -> bool:
        """Tells whether DFEW's published numbers are of the same clips."""
        return self.label_space == "dfew" and self.dataset.startswith("dfew")

    @property
    def titles(self) -> dict[str, str]:
        """Maps tasks to their names in the report."""
        return titles(self.label_tasks)

    def dump(self) -> dict:
        return {"schema": SCHEMA, **self.model_dump(mode="json", exclude_unset=True)}


def write_metrics(path: pathlib.Path, metrics: Metrics) -> None:
    write_whole(path, json.dumps(metrics.dump(), indent=1, allow_nan=False))


def read_metrics(path: pathlib.Path) -> Metrics:
    """Reads metrics.json. Raises ConfigError where it is missing, damaged or of another schema."""
    require(path.is_file(), f"{path.parent} has no {path.name}; run `evaluate` on it")
    values = read_json(path)
    got = values.pop("schema", None) if isinstance(values, dict) else None
    require(got == SCHEMA, f"{path}: expected schema {SCHEMA}, got {got}; run `evaluate` again")
    try:
        return Metrics(**values)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{path}: {place}: {first['msg']}; run `evaluate` again") from error


def mean_interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Bootstraps the 95 % interval of a mean (percentiles of 1,000 resamples)."""
    draws = np.random.default_rng(seed).integers(len(values), size=(BOOTSTRAP_DRAWS, len(values)))
    low, high = np.percentile(values[draws].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def percent(values: np.ndarray) -> dict:
    """Averages scores in [0, 1], ignoring NaN: "n", "mean" and its "interval" in percent, None
    where there are no scores."""
    own = values[~np.isnan(values)]
    if not len(own):
        return {"n": 0, "mean": None, "interval": None}
    low, high = mean_interval(own)
    return {"n": len(own), "mean": 100 * float(own.mean()), "interval": [100 * low, 100 * high]}
