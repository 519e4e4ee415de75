"""evaluate: metrics.json and report.html from predictions, beside the trivial systems."""

from __future__ import annotations

import argparse
import json
import pathlib

from mm_jax import __version__
from mm_jax.config import ConfigError, read_config, require
from mm_jax.data.datasets.common import BUILD_REPORT, SampleSource
from mm_jax.evaluation.baselines import baseline_predictions
from mm_jax.evaluation.metrics import evaluate_rows
from mm_jax.evaluation.predict import read_predictions
from mm_jax.evaluation.report import TASK_NAMES, system_name, write_report
from mm_jax.rewards.build import reward_weights


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--checkpoint", required=True, type=pathlib.Path, help="run folder with predictions.jsonl")
    add("--predictions", type=pathlib.Path, help="default: CHECKPOINT/predictions.jsonl")
    add("--split", choices=("train", "val", "test"), default="test", help="what was predicted")
    add("--data", type=pathlib.Path, help="data set folder (default: the run's)")
    add(
        "--out",
        type=pathlib.Path,
        help="folder of metrics.json and report.html (default: CHECKPOINT)",
    )
    add("--bertscore_model", default="", help="folder of BERTScore's model (roberta-large)")


def main(args: argparse.Namespace, overrides: list[str]) -> None:
    del overrides
    metrics = evaluate(
        args.checkpoint,
        args.predictions,
        args.split,
        args.data,
        args.out,
        args.bertscore_model,
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
) -> dict:
    """Writes metrics.json and report.html and returns the metrics."""
    config = read_config(run / "config.json")
    try:
        rows = read_predictions(predictions or run / "predictions.jsonl")
    except ValueError as error:
        raise ConfigError(str(error)) from error
    folder = pathlib.Path(data or config.data.folder)
    train = list(SampleSource(folder, "train", light=True))
    by_id = {s.id: s for s in SampleSource(folder, split, light=True)}
    unknown = sorted({r["id"] for r in rows} - set(by_id))
    require(
        not unknown,
        f"predictions: {len(unknown)} ids are not in split {split} of {folder}, such as "
        f"{unknown[:3]}; pass --split or --data",
    )
    systems, groups = [], {}
    for row in rows:
        groups.setdefault((row["modality_asked"], row["history_labels"]), []).append(row)
    for (modality, regime), own in groups.items():
        ids = [r["id"] for r in own]
        require(len(set(ids)) == len(ids), f"predictions: an id occurs twice ({modality} {regime})")
        entry = {"modality": modality, "history_labels": regime}
        entry.update(evaluate_rows(own, bertscore_model))
        cues = sorted({r["cue"] for r in own if r.get("cue")})
        if cues:
            entry["by_cue"] = {c: _accuracy([r for r in own if r["cue"] == c]) for c in cues}
        systems.append(entry)
    space = rows[0]["label_space"]
    first = next(iter(groups.values()))
    test = [by_id[r["id"]] for r in first]
    baselines = {
        name: evaluate_rows(own) for name, own in baseline_predictions(train, test, space).items()
    }
    report = json.loads((folder / BUILD_REPORT).read_text())
    metrics = {
        "version": __version__,
        "run": run.resolve().name,
        "dataset": report["dataset"],
        "split": split,
        "label_space": space,
        "trained_with_history_labels": config.data.history_labels,
        "complete": len(test) == len(by_id),
        "media": report["media"].get(split, {}),
        "rewards": reward_sources(config),
        "systems": systems,
        "baselines": baselines,
    }
    out = out or run
    out.mkdir(parents=True, exist_ok=True)
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1))
    log = run / "metrics.jsonl"
    training = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    write_report(out / "report.html", metrics, training, rows, by_id)
    return metrics


def reward_sources(config) -> dict[str, str]:
    """Reward component -> where it came from, of a run with a reinforcement stage."""
    if not any(config.stage[name].objective in ("grpo", "ppo") for name in config.stages):
        return {}
    names = reward_weights(config.reward)
    judges = [j.model for j in (config.reward.judge, config.reward.second_judge) if j.model]
    sources = {"trust": "judged by " + " and ".join(judges), "similarity": "BGE-M3"}
    sources["lexical"] = "tf-idf cosine and shared words"
    return {name: sources.get(name, "") for name in names}


def _accuracy(rows: list[dict]) -> dict:
    task = next(iter(TASK_NAMES))
    hits = [r["predicted"][task] == r["gold"][task] for r in rows]
    return {"n": len(hits), "accuracy": 100 * sum(hits) / len(hits)}


def print_summary(metrics: dict) -> None:
    """Accuracy / weighted-F1 of every task and ROUGE-L, a line a system."""
    rows = [(system_name(e), e) for e in metrics["systems"]] + list(metrics["baselines"].items())
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
