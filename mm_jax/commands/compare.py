"""Compares several evaluated runs, with paired differences to the first (command `compare`).

Reads every run's metrics.json and predictions.jsonl; writes compare.html, compare.md, compare.json.
"""

from __future__ import annotations

import argparse
import json
import pathlib

from mm_jax.config.errors import require
from mm_jax.config.files import write_whole
from mm_jax.evaluation.analysis import compare_systems
from mm_jax.evaluation.predictions import PredictionRow, file_hash, read_predictions
from mm_jax.evaluation.report.page import Page, Section, write_pages
from mm_jax.evaluation.report.sections import groups, headline_columns, score_names, system_rows
from mm_jax.evaluation.report.tables import Table, best_row, difference
from mm_jax.evaluation.scores import Metrics, read_metrics


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
    runs = [read_metrics(path / "metrics.json") for path in args.runs]
    names = unique_names(args.runs)
    first = runs[0]
    for name, run in zip(names[1:], runs[1:], strict=True):
        for field in ("dataset", "split", "label_space"):
            own, expected = getattr(run, field), getattr(first, field)
            require(
                own == expected,
                f"compare: {name} was evaluated on {field} {own!r}, {names[0]} on {expected!r}",
            )
    rows = {n: main_rows(p, r) for n, p, r in zip(names, args.runs, runs, strict=True)}
    base, *others = names
    differences = {
        name: compare_systems(rows[name], {base: rows[base]}).get(base, {}) for name in others
    }
    found = {"schema": "mm_jax.compare/1", "runs": names, "less": base, "differences": differences}
    args.out.mkdir(parents=True, exist_ok=True)
    page = compare_page(dict(zip(names, runs, strict=True)), base, differences)
    text = write_pages(args.out / "compare", page)
    write_whole(args.out / "compare.json", json.dumps(found, indent=1))
    print(text)
    print(f"compared in {args.out / 'compare.html'}")


def main_rows(path: pathlib.Path, metrics: Metrics) -> list[PredictionRow]:
    """Reads the prediction rows of a run's main system."""
    file = path / "predictions.jsonl"
    require(
        file_hash(file) == metrics.predictions_sha256,
        f"compare: {file} is not what {path / 'metrics.json'} was made from; run `evaluate` again",
    )
    key = (metrics.main.modality, metrics.main.history_labels)
    return [r for r in read_predictions(file) if r.system == key]


def unique_names(paths: list[pathlib.Path]) -> list[str]:
    """Names runs by their folders, or by their paths where folders are named alike."""
    names = [p.resolve().name for p in paths]
    if len(set(names)) < len(names):
        names = [str(p) for p in paths]
    require(len(set(names)) == len(names), "compare: a run is given twice")
    return names


def compare_page(runs: dict[str, Metrics], base: str, differences: dict[str, dict]) -> Page:
    first = runs[base]
    sections = []
    found = {name: own for name, own in differences.items() if own}
    if found:
        scores = list(dict.fromkeys(s for own in found.values() for s in own))
        table = Table(
            ["run", *(score_names(first)[s] for s in scores)],
            [[name, *(difference(own.get(s)) for s in scores)] for name, own in found.items()],
        )
        what = (
            f"Main systems minus that of {base} on the same samples, in points: bootstrap 95 % "
            "interval and p of a permutation test."
        )
        sections.append(Section(f"Difference from {base}", what, table))
    configs = [
        [name, m.date, m.version, m.config_sha256[:16], m.trained_with_history_labels]
        for name, m in runs.items()
    ]
    header = ["run", "written", "mm_jax", "config SHA-256", "history labels in training"]
    sections.append(Section("Configs", Table(header, configs)))
    title = f"{', '.join(runs)} on {first.dataset}, {first.split} split"
    return Page(title, [side_by_side(runs), "Percent, bootstrap 95 % intervals."], sections)


def side_by_side(runs: dict[str, Metrics]) -> Table:
    """Tabulates all runs' systems; marks the one that is most accurate in the first task."""
    first = next(iter(runs.values()))
    columns = headline_columns(first, ("bleu2", "rouge_l", "length"))
    systems = {
        f"{name}, {heading.removeprefix('this model, ')}": members
        for name, metrics in runs.items()
        for heading, members in groups(metrics, "own").items()
    }
    rows = system_rows(systems, columns)
    return Table(["system", *columns], rows, best_row(rows, 2))
