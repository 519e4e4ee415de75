"""compare: several evaluated runs side by side, with paired differences to the first.

Reads every run's metrics.json and predictions.jsonl; writes compare.html, compare.md, compare.json.
"""

from __future__ import annotations

import argparse
import json
import pathlib

from mm_jax.commands.evaluate import SCHEMA as METRICS_SCHEMA
from mm_jax.commands.evaluate import file_hash
from mm_jax.config.errors import ConfigError, require
from mm_jax.config.files import read_json, write_whole
from mm_jax.evaluation.analysis import compare_systems
from mm_jax.evaluation.blocks import (
    Block,
    Heading,
    Note,
    Table,
    difference,
    number,
    with_interval,
    write_pages,
)
from mm_jax.evaluation.figures import TASK_NAMES
from mm_jax.evaluation.predictions import read_predictions
from mm_jax.evaluation.report import best_system, system_name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("runs", nargs="+", type=pathlib.Path, metavar="RUN", help="folders with metrics.json")
    add(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("compare"),
        help="folder (default: compare)",
    )


def main(args: argparse.Namespace, overrides: list[str]) -> None:
    del overrides
    runs = [read_run(path) for path in args.runs]
    names = unique_names(args.runs)
    first = runs[0]
    for name, run in zip(names[1:], runs[1:], strict=True):
        for field in ("dataset", "split", "label_space"):
            require(
                run[field] == first[field],
                f"compare: {name} was evaluated on {field} {run[field]!r}, {names[0]} on "
                f"{first[field]!r}",
            )
    rows = {n: main_rows(p, r) for n, p, r in zip(names, args.runs, runs, strict=True)}
    base, *others = names
    differences = {
        name: compare_systems(rows[name], {base: rows[base]}).get(base, {}) for name in others
    }
    blocks = [
        Heading("Runs side by side", 1),
        Note(f"{first['dataset']}, split {first['split']}; percent, bootstrap 95 % intervals."),
        side_by_side(dict(zip(names, runs, strict=True))),
        *difference_blocks(base, differences),
        Heading("Configs"),
        Table(
            ["run", "written", "mm_jax", "config SHA-256", "history labels in training"],
            [
                [
                    n,
                    r["date"],
                    r["version"],
                    r["config_sha256"][:16],
                    r["trained_with_history_labels"],
                ]
                for n, r in zip(names, runs, strict=True)
            ],
        ),
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    text = write_pages(args.out / "compare", "mm_jax: runs side by side", blocks)
    found = {"schema": "mm_jax.compare/1", "runs": names, "less": base, "differences": differences}
    write_whole(args.out / "compare.json", json.dumps(found, indent=1))
    print(text)
    print(f"compared in {args.out / 'compare.html'}")


def read_run(path: pathlib.Path) -> dict:
    file = path / "metrics.json"
    require(file.is_file(), f"compare: {path} has no metrics.json; run `evaluate` on it")
    metrics = read_json(file)
    got = metrics.get("schema")
    require(
        got == METRICS_SCHEMA,
        f"compare: {file}: expected schema {METRICS_SCHEMA}, got {got}; run `evaluate` again",
    )
    return metrics


def main_rows(path: pathlib.Path, metrics: dict) -> list[dict]:
    """The prediction rows of a run's main system."""
    best = best_system(metrics["systems"])
    file = path / "predictions.jsonl"
    require(
        file_hash(file) == metrics["predictions_sha256"],
        f"compare: {file} is not what {path / 'metrics.json'} was made from; run `evaluate` again",
    )
    try:
        rows = read_predictions(file)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    key = (best["modality"], best["history_labels"])
    return [r for r in rows if (r["modality_asked"], r["history_labels"]) == key]


def unique_names(paths: list[pathlib.Path]) -> list[str]:
    """The folders' names, or their paths where names are alike."""
    names = [p.resolve().name for p in paths]
    if len(set(names)) < len(names):
        names = [str(p) for p in paths]
    require(len(set(names)) == len(names), "compare: a run is given twice")
    return names


def side_by_side(runs: dict[str, dict]) -> Table:
    first = best_system(next(iter(runs.values()))["systems"])["standard"]
    tasks = [t for t in TASK_NAMES if t in first]
    replies = "response" in first
    header = ["run", "system", "n", *(TASK_NAMES[t] for t in tasks)]
    header += ["BLEU-2", "ROUGE-L", "words"] if replies else ["UAR"]
    rows: list[list[str]] = []
    for name, metrics in runs.items():
        for entry in metrics["systems"]:
            own = entry["standard"]
            row = [name, system_name(entry).removeprefix("this model: "), str(entry["n"])]
            row += [with_interval(own[t]["accuracy"], own[t]["interval"]) for t in tasks]
            if replies:
                row += [number(own["response"][k]) for k in ("bleu2", "rouge_l", "length")]
            else:
                row.append(number(own[tasks[0]]["uar"]))
            rows.append(row)
    return Table(header, rows)


def difference_blocks(base: str, differences: dict[str, dict]) -> list[Block]:
    found = {name: d for name, d in differences.items() if d}
    if not found:
        return []
    scores = list(dict.fromkeys(s for d in found.values() for s in d))
    rows = [
        [
            name,
            *(difference(d.get(s)) for s in scores),
        ]
        for name, d in found.items()
    ]
    return [
        Heading(f"Less {base}"),
        Note(
            "Main systems on the same samples, in points: bootstrap 95 % interval and p of a "
            "permutation test."
        ),
        Table(["run", *(TASK_NAMES.get(s, "ROUGE-L") for s in scores)], rows),
    ]
