"""Evaluates a run's predictions next to trivial systems and other models; writes the report.

The report includes what the run folder holds: other models' predictions in `baselines/` (written by
`baseline`), `judgements.json` (`judge`), `study.json` (`study`) and `safety.json` (`safety`).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import pathlib
import platform
from collections.abc import Mapping, Sequence

from mm_jax import __version__
from mm_jax.config.errors import ConfigError
from mm_jax.config.files import read_json
from mm_jax.config.load import read_config
from mm_jax.config.schema import Config
from mm_jax.data.datasets.common import BUILD_REPORT, SampleSource
from mm_jax.data.labels import LabelSpace
from mm_jax.data.records import Sample
from mm_jax.evaluation.analysis import calibration, compare_systems, slices
from mm_jax.evaluation.metrics import evaluate_rows
from mm_jax.evaluation.predictions import (
    PredictionRow,
    file_hash,
    main_group,
    other_files,
    read_groups,
    row_names,
)
from mm_jax.evaluation.probe import probe_labels, source_is_local
from mm_jax.evaluation.report import write_report
from mm_jax.evaluation.scores import Comparisons, Metrics, OwnMetrics, write_metrics
from mm_jax.evaluation.systems import baseline_predictions, trivial_rows
from mm_jax.run.build import data_labels
from mm_jax.run.folder import read_commands, timestamp

log = logging.getLogger(__name__)

SIDE_FILES = ("judgements", "study", "safety")
PACKAGES = ("jax", "flax", "transformers", "scikit-learn", "sacrebleu", "rouge-score", "nltk")


def evaluate(
    run: pathlib.Path,
    predictions: pathlib.Path | None = None,
    split: str = "test",
    data: pathlib.Path | None = None,
    out: pathlib.Path | None = None,
    bertscore_model: str = "",
    others: Sequence[pathlib.Path] | None = None,
    partial: bool = False,
    probe: bool | None = None,
) -> tuple[Metrics, pathlib.Path]:
    """Writes metrics.json, report.html and report.md; returns the metrics and the folder.

    That is `out`, or else the run's own, where predictions of a part of the split get a folder
    `partial`, so that they never replace the whole report. `probe`: the linear probe of a released
    language model is among the trivial systems (see probe.py); None: where its weights are local.
    """
    config = read_config(run / "config.json")
    folder = pathlib.Path(data or config.data.folder)
    train = list(SampleSource(folder, "train", light=True))
    by_id = {s.id: s for s in SampleSource(folder, split, light=True)}
    where = f"split {split} of {folder}"
    predictions = predictions or run / "predictions.jsonl"
    space = data_labels(folder)
    groups = read_groups(predictions, by_id, space, where, partial)
    systems = [
        own_metrics(key, rows, by_id, space, bertscore_model) for key, rows in groups.items()
    ]
    rows = main_group(groups)
    test = [by_id[r.id] for r in next(iter(groups.values()))]
    complete = all(len(own) == len(by_id) for own in groups.values())
    named_files, models, not_shown = others is not None, {}, []
    others = other_files(run, others)
    for path, name in zip(others, row_names(others), strict=True):
        try:
            lacking = partial and (named_files or not complete)
            found = read_groups(path, by_id, space, where, lacking)
        except ConfigError as error:
            if named_files:
                raise
            not_shown.append(f"the row {name}: {error}")
            continue
        for (modality, regime), own in found.items():
            models[f"{name} ({modality}, history labels {regime})"] = own
    trivial = baseline_predictions(train, test, space)
    if probe or (probe is None and source_is_local(config)):
        try:
            # A penalty chosen on the split that is evaluated would flatter the probe.
            val = [] if split == "val" else list(SampleSource(folder, "val", light=True))
            found = probe_labels(run, config, train, val, test, space)
        except Exception as error:  # out of memory, offline, a source that is gone: only a row
            log.warning("no linear probe: %s: %s", type(error).__name__, error)
            not_shown.append(f"the linear probe: {type(error).__name__}: {error}")
            found = None
        if found is not None:
            trivial["linear probe"] = trivial_rows(test, found, space)
    named = {s.name: own for s, own in zip(systems, groups.values(), strict=True)}
    main = next(name for name, own in named.items() if own is rows)
    rest = {name: own for name, own in named.items() if own is not rows}
    report = json.loads((folder / BUILD_REPORT).read_text())
    mark = file_hash(predictions)
    side, left_out = read_side(run, split, mark)
    metrics = Metrics(
        date=timestamp(),
        version=__version__,
        versions={
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
        config_sha256=hashlib.sha256((run / "config.json").read_bytes()).hexdigest(),
        commands=read_commands(run),
        run=run.resolve().name,
        dataset=report["dataset"],
        split=split,
        label_space=space.name,
        label_tasks=space.names,
        trained_with_history_labels=config.data.history_labels,
        complete=complete,
        predictions_sha256=mark,
        left_out=[*not_shown, *left_out],
        media=report["media"].get(split, {}),
        shared={k: v for k, v in report.get("shared", {}).items() if split in k.split(", ")},
        rewards=reward_sources(config),
        systems=systems,
        models={name: evaluate_rows(own, space, bertscore_model) for name, own in models.items()},
        baselines={name: evaluate_rows(own, space) for name, own in trivial.items()},
        comparisons=Comparisons(of=main, to=compare_systems(rows, {**rest, **models, **trivial})),
        **side,
    )
    out = out or (run if complete else run / "partial")
    out.mkdir(parents=True, exist_ok=True)
    training = read_log(run / "metrics.jsonl")
    write_report(out, metrics, training, rows, by_id, SampleSource(folder, split))
    write_metrics(out / "metrics.json", metrics)
    return metrics, out


def own_metrics(
    key: tuple[str, str],
    rows: Sequence[PredictionRow],
    by_id: Mapping[str, Sample],
    space: LabelSpace,
    bertscore_model: str,
) -> OwnMetrics:
    """Computes all metrics of one set of the model's own rows."""
    scores = evaluate_rows(rows, space, bertscore_model)
    found = {task: calibration(rows, task) for task in scores.standard.tasks}
    cues = sorted({r.cue for r in rows if r.cue})
    first = space.names[0]
    by_cue = {cue: _accuracy([r for r in rows if r.cue == cue], first) for cue in cues}
    return OwnMetrics(
        **vars(scores),
        modality=key[0],
        history_labels=key[1],
        calibration={task: value for task, value in found.items() if value},
        slices=slices(rows, by_id),
        **({"by_cue": by_cue} if cues else {}),
    )


def _accuracy(rows: Sequence[PredictionRow], task: str) -> dict:
    hits = [r.label(task) == r.gold[task] for r in rows]
    return {"n": len(hits), "accuracy": 100 * sum(hits) / len(hits)}


def read_log(path: pathlib.Path) -> list[dict]:
    """Reads metrics.jsonl, if any, without a last line that a killed run left unfinished."""
    text = path.read_text() if path.exists() else ""
    *lines, last = text.splitlines() or [""]
    records = [json.loads(line) for line in lines]
    try:
        return [*records, json.loads(last)]
    except json.JSONDecodeError:
        return records


def read_side(run: pathlib.Path, split: str, mark: str) -> tuple[dict[str, dict], list[str]]:
    """Reads other commands' results on these predictions, and lists what is left out and why.

    `mark` is the predictions' hash; judgements belong to one file, studies to one split.
    """
    found, left_out = {}, []
    for name in SIDE_FILES:
        path = run / f"{name}.json"
        if not path.is_file():
            continue
        own = read_json(path)
        if own.get("split", split) != split:
            left_out.append(f"{name}.json is of split {own['split']}")
        elif own.get("predictions_sha256", mark) != mark:
            left_out.append(f"{name}.json is of other predictions: run `judge` again")
        else:
            found[name] = own
    return found, left_out


def reward_sources(config: Config) -> dict[str, str]:
    """Tells where the rewards of a reinforcement stage came from: component -> source."""
    if not reinforced(config):
        return {}
    judges = [j.model for j in (config.reward.judge, config.reward.second_judge) if j.model]
    sources = {
        "trust": "judged by " + " and ".join(judges),
        "similarity": "BGE-M3",
        "lexical": "tf-idf cosine and shared words",
    }
    return {name: sources.get(name, "") for name in config.reward.weights}


def reinforced(config: Config) -> bool:
    """Tells whether one of the run's stages learned from rewards."""
    return any(config.stage[name].reinforces for name in config.stages)
