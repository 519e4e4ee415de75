"""evaluate: metrics.json, report.html and report.md from predictions, beside the trivial systems.

What lies in the run folder joins the report: other models' predictions in `baselines/` (written by
`baseline`), `judgements.json` (`judge`), `study.json` (`study`) and `safety.json` (`safety`).
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import importlib.metadata
import json
import pathlib
import platform
from collections.abc import Sequence

from mm_jax import __version__
from mm_jax.config.errors import ConfigError, require
from mm_jax.config.load import read_config
from mm_jax.data.datasets.common import BUILD_REPORT, SampleSource
from mm_jax.data.records import LABEL_SPACES, STRATEGY, Sample
from mm_jax.evaluation.analysis import calibration, compare_systems, slices
from mm_jax.evaluation.figures import TASK_NAMES
from mm_jax.evaluation.metrics import evaluate_rows
from mm_jax.evaluation.predictions import read_predictions
from mm_jax.evaluation.report import (
    Evaluated,
    best_system,
    system_name,
    write_report,
)
from mm_jax.evaluation.systems import baseline_predictions
from mm_jax.run.folder import read_commands, record_command, timestamp

SCHEMA = "mm_jax.metrics/1"  # docs/evaluation.md
SIDE_FILES = ("judgements", "study", "safety")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--checkpoint", required=True, type=pathlib.Path, help="run folder with predictions.jsonl")
    add("--predictions", type=pathlib.Path, help="default: CHECKPOINT/predictions.jsonl")
    add(
        "--others",
        type=pathlib.Path,
        nargs="*",
        help="predictions of other models, a row each named by its file (default: "
        "CHECKPOINT/baselines/*.jsonl)",
    )
    add("--split", choices=("train", "val", "test"), default="test", help="what was predicted")
    add("--partial", action="store_true", help="allow predictions of a part of the split")
    add("--data", type=pathlib.Path, help="data set folder (default: the run's)")
    add(
        "--out",
        type=pathlib.Path,
        help="folder of metrics.json, report.html and report.md (default: CHECKPOINT)",
    )
    add(
        "--bertscore_model",
        default="",
        help="folder of BERTScore's model, named as bert-score knows it, such as .../roberta-large",
    )


def main(args: argparse.Namespace, overrides: list[str]) -> None:
    del overrides
    record_command(args.checkpoint, args.argv)
    metrics = evaluate(
        args.checkpoint,
        args.predictions,
        args.split,
        args.data,
        args.out,
        args.bertscore_model,
        args.others,
        args.partial,
    )
    print_summary(metrics)
    print(f"report: {(args.out or args.checkpoint) / 'report.html'}")


def evaluate(
    run: pathlib.Path,
    predictions: pathlib.Path | None = None,
    split: str = "test",
    data: pathlib.Path | None = None,
    out: pathlib.Path | None = None,
    bertscore_model: str = "",
    others: Sequence[pathlib.Path] | None = None,
    partial: bool = False,
) -> dict:
    """Writes metrics.json, report.html and report.md and returns the metrics."""
    config = read_config(run / "config.json")
    folder = pathlib.Path(data or config.data.folder)
    train = list(SampleSource(folder, "train", light=True))
    by_id = {s.id: s for s in SampleSource(folder, split, light=True)}
    if others is None:
        others = sorted((run / "baselines").glob("*.jsonl"))
    predictions = predictions or run / "predictions.jsonl"
    where = f"split {split} of {folder}"
    groups = read_groups(predictions, by_id, where, partial)
    systems = [system_entry(key, rows, by_id, bertscore_model) for key, rows in groups.items()]
    first = next(iter(groups.values()))
    space, test = first[0]["label_space"], [by_id[r["id"]] for r in first]
    trivial = baseline_predictions(train, test, space)
    models = {}
    for path, name in zip(others, row_names(others), strict=True):
        for (modality, regime), rows in read_groups(path, by_id, where, partial).items():
            require(
                rows[0]["label_space"] == space, f"{path}: expected rows of label space {space}"
            )
            models[f"{name} ({modality}, history labels {regime})"] = rows
    best = best_system(systems)
    main_rows = main_group(groups)
    rest = {system_name(e): groups[e["modality"], e["history_labels"]] for e in systems}
    del rest[system_name(best)]
    report = json.loads((folder / BUILD_REPORT).read_text())
    mark = file_hash(predictions)
    side, left_out = read_side(run, split, mark)
    metrics = {
        "schema": SCHEMA,
        "date": timestamp(),
        "version": __version__,
        "versions": versions(),
        "config_sha256": hashlib.sha256((run / "config.json").read_bytes()).hexdigest(),
        "commands": read_commands(run),
        "run": run.resolve().name,
        "dataset": report["dataset"],
        "split": split,
        "label_space": space,
        "trained_with_history_labels": config.data.history_labels,
        "complete": all(len(rows) == len(by_id) for rows in groups.values()),
        "predictions_sha256": mark,
        "left_out": left_out,
        "media": report["media"].get(split, {}),
        "rewards": reward_sources(config),
        "systems": systems,
        "models": {name: evaluate_rows(rows, bertscore_model) for name, rows in models.items()},
        "baselines": {name: evaluate_rows(rows) for name, rows in trivial.items()},
        "comparisons": {
            "of": system_name(best),
            "to": compare_systems(main_rows, {**rest, **models, **trivial}),
        },
        **side,
    }
    out = out or run
    out.mkdir(parents=True, exist_ok=True)
    log = run / "metrics.jsonl"
    training = read_log(log) if log.exists() else []
    write_report(out, Evaluated(metrics, training, main_rows, by_id, SampleSource(folder, split)))
    return metrics


def read_groups(
    path: pathlib.Path, by_id: dict, where: str, partial: bool
) -> dict[tuple[str, str], list[dict]]:
    """The rows of a predictions file by (modality, history labels). Raises ConfigError where an id
    is unknown, occurs twice, or (unless `partial`) is missing."""
    try:
        rows = read_predictions(path)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    unknown = sorted({r["id"] for r in rows} - set(by_id))
    require(
        not unknown,
        f"{path}: {len(unknown)} ids are not in {where}, such as {unknown[:3]}; pass --split or "
        "--data",
    )
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        true = gold_of(by_id[row["id"]], row["label_space"])
        differing = sorted(k for k, v in row["gold"].items() if k in true and v != true[k])
        require(
            not differing,
            f"{path}: id {row['id']}: the gold {differing} are not those of {where}; another "
            "version of the data set?",
        )
        row["gold"] = true
        groups.setdefault((row["modality_asked"], row["history_labels"]), []).append(row)
    for (modality, regime), own in groups.items():
        ids = [r["id"] for r in own]
        twice = sorted(name for name, n in collections.Counter(ids).items() if n > 1)
        what = f"{path} ({modality}, history labels {regime})"
        require(not twice, f"{what}: {len(twice)} ids occur twice, such as {twice[:3]}")
        missing = sorted(set(by_id) - set(ids))
        require(
            partial or not missing,
            f"{what}: {len(missing)} of {len(by_id)} ids of {where} are missing, such as "
            f"{missing[:3]}; pass --partial to evaluate the others",
        )
    return groups


def gold_of(sample: Sample, label_space: str) -> dict[str, str]:
    """The gold fields of a sample as predictions hold them."""
    gold = {task: sample.target(task) for task in LABEL_SPACES[label_space]}
    return gold | ({"response": sample.response} if STRATEGY in gold else {})


def main_group(groups: dict[tuple[str, str], list[dict]]) -> list[dict]:
    """The rows of the main system (`best_system`)."""
    best = best_system([{"modality": m, "history_labels": r} for m, r in groups])
    return groups[best["modality"], best["history_labels"]]


def row_names(paths: Sequence[pathlib.Path], reserved: Sequence[str] = ()) -> list[str]:
    """A name for every file: its stem, or its whole path where that is taken."""
    counts = collections.Counter([p.stem for p in paths])
    return [p.stem if counts[p.stem] == 1 and p.stem not in reserved else str(p) for p in paths]


def file_hash(path: pathlib.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_log(path: pathlib.Path) -> list[dict]:
    """The records of metrics.jsonl; a last line that a killed run left unfinished is not one."""
    *lines, last = path.read_text().splitlines() or [""]
    records = [json.loads(line) for line in lines]
    try:
        return [*records, json.loads(last)]
    except json.JSONDecodeError:
        return records


def system_entry(key: tuple[str, str], rows: list[dict], by_id: dict, bertscore_model: str) -> dict:
    """All metrics of one set of the model's own rows."""
    entry = {"modality": key[0], "history_labels": key[1]}
    entry.update(evaluate_rows(rows, bertscore_model))
    found = {task: calibration(rows, task) for task in TASK_NAMES if task in entry["standard"]}
    entry["calibration"] = {task: value for task, value in found.items() if value}
    entry["slices"] = slices(rows, by_id)
    cues = sorted({r["cue"] for r in rows if r.get("cue")})
    if cues:
        entry["by_cue"] = {c: _accuracy([r for r in rows if r["cue"] == c]) for c in cues}
    return entry


def read_side(run: pathlib.Path, split: str, mark: str) -> tuple[dict[str, dict], list[str]]:
    """name -> what another command found about these predictions, and why one is left out.

    `mark` is the predictions' hash; judgements belong to one file, studies to one split.
    """
    found, left_out = {}, []
    for name in SIDE_FILES:
        path = run / f"{name}.json"
        if not path.is_file():
            continue
        try:
            own = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}: not JSON: {error}; run `{name}` again") from error
        if own.get("split", split) != split:
            left_out.append(f"{name}.json is of split {own['split']}")
        elif own.get("predictions_sha256", mark) != mark:
            left_out.append(f"{name}.json is of other predictions: run `judge` again")
        else:
            found[name] = own
    return found, left_out


def versions() -> dict[str, str]:
    packages = ("jax", "flax", "transformers", "scikit-learn", "sacrebleu", "rouge-score", "nltk")
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def reward_sources(config) -> dict[str, str]:
    """Reward component -> where it came from, of a run with a reinforcement stage."""
    if not any(config.stage[name].reinforces for name in config.stages):
        return {}
    names = config.reward.weights
    judges = [j.model for j in (config.reward.judge, config.reward.second_judge) if j.model]
    sources = {"trust": "judged by " + " and ".join(judges), "similarity": "BGE-M3"}
    sources["lexical"] = "tf-idf cosine and shared words"
    return {name: sources.get(name, "") for name in names}


def _accuracy(rows: list[dict]) -> dict:
    task = next(iter(TASK_NAMES))
    hits = [r["predicted"].get(task) == r["gold"][task] for r in rows]
    return {"n": len(hits), "accuracy": 100 * sum(hits) / len(hits)}


def print_summary(metrics: dict) -> None:
    """Accuracy / weighted-F1 of every task and ROUGE-L, a line a system."""
    rows = [(system_name(e), e) for e in metrics["systems"]]
    rows += [*metrics["models"].items(), *metrics["baselines"].items()]
    width = max(len(name) for name, _ in rows)
    header = "".join(f"  {name.split()[0] + ' acc / w-F1':>15}" for name in TASK_NAMES.values())
    print(f"{'':<{width}}{header}  {'BLEU-2':>6}  {'ROUGE-L':>7}")
    for name, entry in rows:
        own = entry["standard"]
        cells = ""
        for task in TASK_NAMES:
            m = own.get(task)
            text = f"{m['accuracy']:.2f} / {m['weighted_f1']:.2f}" if m else "–"
            cells += f"  {text:>15}"
        m = own.get("response")
        cells += f"  {m['bleu2']:>6.2f}  {m['rouge_l']:>7.2f}" if m else f"  {'–':>6}  {'–':>7}"
        print(f"{name:<{width}}{cells}")
    for text in metrics["left_out"]:
        print(f"not in the report: {text}")
    for entry in metrics["systems"]:
        if entry["damage"]:
            shown = ", ".join(f"{name} {n}" for name, n in entry["damage"].items())
            print(f"{system_name(entry)}: of {entry['n']} predictions: {shown}")
