"""Builds the sections of a run's report: tables and figures of metrics.json, with explanations."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mm_jax.data.labels import built_in
from mm_jax.evaluation import paper
from mm_jax.evaluation.report import figures
from mm_jax.evaluation.report.page import Section, words
from mm_jax.evaluation.report.tables import (
    Rows,
    Table,
    best_row,
    counted,
    difference,
    number,
    share,
    with_interval,
)
from mm_jax.evaluation.scores import MODALITY_NAMES, Metrics, SystemMetrics

PAPER_MESC = "the paper, MESC test (its own evaluation: compare with paper_compat)"
PAPER_DFEW = "the paper, DFEW mean of 5 folds (WAR as accuracy)"


def score_names(metrics: Metrics) -> dict[str, str]:
    return {**metrics.titles, "rouge_l": "ROUGE-L"}


def short(metrics: Metrics, task: str) -> str:
    return metrics.titles[task].split()[0]


class Named(NamedTuple):
    """Holds a system's name in metrics.json, and the one it has below its group's heading."""

    name: str
    label: str
    scores: SystemMetrics


Cell = Callable[[Named], str]
Columns = Mapping[str, Cell]  # heading -> the cell of a system


def groups(metrics: Metrics, *kinds: str) -> dict[str, list[Named]]:
    """Groups the systems of some kinds ("own", "models", "trivial"; default: all) by heading."""
    out: dict[str, list[Named]] = {}
    kinds = kinds or ("own", "models", "trivial")
    for s in metrics.systems if "own" in kinds else ():
        heading = f"this model, {s.history_labels} history labels"
        out.setdefault(heading, []).append(Named(s.name, MODALITY_NAMES[s.modality], s))
    for name, s in metrics.models.items() if "models" in kinds else ():
        label, heading = name, "other models"
        if found := re.fullmatch(r"(.+) \((\w+), history labels (\w+)\)", name):
            label = found[1]
            heading += f", {MODALITY_NAMES[found[2]]}, {found[3]} history labels"
        out.setdefault(heading, []).append(Named(name, label, s))
    if "trivial" in kinds and metrics.baselines:
        heading = "trivial systems, on the same samples (they see gold history labels)"
        out[heading] = [Named(name, name, s) for name, s in metrics.baselines.items()]
    return out


def system_rows(systems: dict[str, list[Named]], columns: Columns) -> Rows:
    """Writes one row per system below its group's heading, without rows that would be empty."""
    rows: Rows = []
    for heading, members in systems.items():
        own = [[m.label, *(cell(m) for cell in columns.values())] for m in members]
        own = [row for row in own if any(text != "–" for text in row[1:])]
        rows += [heading, *own] if own else []
    return rows


def system_table(metrics: Metrics, columns: Columns, *kinds: str, first: str = "system") -> Table:
    return Table([first, *columns], system_rows(groups(metrics, *kinds), columns))


def samples(system: Named) -> str:
    return str(system.scores.n)


def score(column: str, task: str | None, field: str, digits: int = 2) -> Cell:
    """Returns the cell of a score of a task, or of the replies (task None); `column` is "standard"
    or "paper_compat"."""

    def cell(system: Named) -> str:
        found = getattr(system.scores, column)
        found = found.tasks.get(task) if task else found.response
        return number(found and getattr(found, field), digits)

    return cell


def accuracy(task: str) -> Cell:
    """Returns the cell of an accuracy with its interval."""

    def cell(system: Named) -> str:
        m = system.scores.standard.tasks.get(task)
        return with_interval(m.accuracy, m.interval) if m else "–"

    return cell


def headline_columns(metrics: Metrics, replies: Sequence[str] = ("bleu2", "rouge_l")) -> Columns:
    """Chooses n, the accuracies, and scores of the replies (UAR where there are none)."""
    columns = {"n": samples, **{metrics.titles[t]: accuracy(t) for t in metrics.tasks}}
    if metrics.main.standard.response is None and metrics.tasks:
        first = f"{short(metrics, metrics.tasks[0])} " if len(metrics.tasks) > 1 else ""
        return columns | {f"{first}UAR": score("standard", metrics.tasks[0], "uar")}
    if metrics.main.standard.response is None:
        return columns
    named = {field: name for name, field, _ in PER_REPLY}
    return columns | {named[field]: score("standard", None, field) for field in replies}


def headline(metrics: Metrics) -> Table:
    """Tabulates accuracies with intervals, and scores of the replies; marks the system that is most
    accurate in the first task."""
    table = system_table(metrics, headline_columns(metrics))
    rows, best = [*table.rows], best_row(table.rows, 2)
    published = paper_rows(metrics)
    rows += [PAPER_MESC] if published else []
    for name, (*pairs, bleu, rouge, _) in published.items():
        accuracies = [number(pair[0] if pair else None) for pair in pairs]
        rows.append([name, "–", *accuracies, number(bleu), number(rouge)])
    if metrics.is_dfew:
        rows.append(PAPER_DFEW)
        rows += [[name, "–", number(w), number(u)] for name, (_, u, w) in paper.DFEW.items()]
    return Table(table.header, rows, best)


def paper_rows(metrics: Metrics) -> dict[str, tuple]:
    """Returns the paper's rows: system -> (T1, T2, T3, BLEU-2, ROUGE-L, BERTScore)."""
    mesc = metrics.label_space == "mesc" and metrics.dataset.startswith("mesc")
    return paper.MESC_TEST if mesc else {}


def cues(metrics: Metrics) -> list[Section]:
    """Tabulates T1 accuracy by the channel that holds the emotion (synthetic data)."""
    counts = metrics.systems[0].by_cue
    if not counts:
        return []

    def told_by(cue: str) -> Cell:
        return lambda s: number((s.scores.by_cue or {}).get(cue, {}).get("accuracy"), 1)

    names = sorted({cue for s in metrics.systems for cue in s.by_cue or {}})
    columns = {f"told by {c} (n={counts[c]['n']})": told_by(c) for c in names}
    table = system_table(metrics, columns, "own", first="T1 accuracy")
    return [Section("What each modality is worth", *words("cues"), table)]


def comparisons(metrics: Metrics) -> list[Section]:
    """Tabulates paired differences to every other system."""
    found = metrics.comparisons.to
    if not found:
        return []

    def cell(name: str) -> Cell:
        return lambda system: difference(found.get(system.name, {}).get(name))

    names = score_names(metrics)
    scores = [n for n in names if any(n in own for own in found.values())]
    columns = {names[n]: cell(n) for n in scores}
    table = system_table(metrics, columns, first="difference to")
    what = words("comparisons", metrics.comparisons.of)
    return [Section("Differences to other systems", *what, table)]


def all_scores(metrics: Metrics) -> list[Section]:
    response = metrics.main.standard.response
    notes = words("replies", response) if response else []
    return [
        Section("All scores: standard", full_table(metrics, "standard"), *notes),
        Section(
            "All scores: paper_compat", *words("released"), full_table(metrics, "paper_compat")
        ),
        *recalls(metrics),
    ]


# Column heading, field and digits of every score; those of the paper come first.
PER_TASK = (("acc", "accuracy", 2), ("w-F1", "weighted_f1", 2), ("m-F1", "macro_f1", 2))
PER_TASK += (("UAR", "uar", 2), ("parsed %", "parse_rate", 1))
PER_REPLY = (("BLEU-2", "bleu2", 2), ("ROUGE-L", "rouge_l", 2), ("sacreBLEU", "sacrebleu", 1))
PER_REPLY += (("dist-1", "distinct_1", 1), ("dist-2", "distinct_2", 1), ("words", "length", 1))
PER_REPLY += (("empty %", "empty_rate", 1), ("refused %", "refusal_rate", 1))


def full_table(metrics: Metrics, column: str) -> Table:
    """Tabulates every score of a column, one row per system."""
    released = column == "paper_compat"
    per_task = (("n", "n", 0), *PER_TASK[:2]) if released else PER_TASK
    per_reply = PER_REPLY[:2] if released else PER_REPLY
    if metrics.main.standard.response is None:
        per_reply = ()
    columns = {"n": samples}
    for t in metrics.tasks:
        columns |= {
            f"{short(metrics, t)} {name}": score(column, t, *how) for name, *how in per_task
        }
    columns |= {name: score(column, None, *how) for name, *how in per_reply}
    table = system_table(metrics, columns)
    published = paper_rows(metrics)
    rows = [*table.rows, *([PAPER_MESC] if published else [])]
    for name, (*pairs, bleu, rouge, _) in published.items():
        row = [name, "–"]
        for pair in pairs:
            known = [number(x) for x in pair or (None, None)]
            row += ["–", *known] if released else known + ["–"] * (len(per_task) - 2)
        rows.append([*row, number(bleu), number(rouge), *["–"] * (len(per_reply) - 2)])
    return Table(table.header, rows)


def recalls(metrics: Metrics) -> list[Section]:
    def cell(task: str, label: str) -> Cell:
        return lambda system: number(system.scores.standard.tasks[task].recall[label], 1)

    out = []
    for task in metrics.tasks:
        recall = metrics.main.standard.tasks[task].recall
        labels, published = [k for k, v in recall.items() if v is not None], []
        if metrics.is_dfew:
            known = {name: values for name, (values, _, _) in paper.DFEW.items() if values}
            labels = built_in("dfew").tasks[0].labels
            published = [PAPER_DFEW, *([name, *map(number, v)] for name, v in known.items())]
        table = system_table(metrics, {label: cell(task, label) for label in labels}, "own")
        table = Table(table.header, [*table.rows, *published])
        out.append(Section(f"{metrics.titles[task]}: recall of every label", table, level=3))
    return out


def calibration(metrics: Metrics) -> list[Section]:
    if not any(s.calibration for s in metrics.systems):
        return []

    def cell(task: str, measure: str, digits: int) -> Cell:
        return lambda s: number(s.scores.calibration.get(task, {}).get(measure), digits)

    columns = {}
    for t in metrics.tasks:
        columns[f"{short(metrics, t)} ECE"] = cell(t, "ece", 1)
        columns[f"{short(metrics, t)} Brier"] = cell(t, "brier", 3)
    plot = metrics.main.calibration
    return [
        Section(
            "Calibration",
            *words("calibration", metrics.main),
            system_table(metrics, columns, "own"),
            *([figures.reliability_figure(plot, metrics.titles)] if plot else []),
        )
    ]


def slices(metrics: Metrics) -> list[Section]:
    main = metrics.main
    if not main.slices:
        return []
    first = next(iter(next(iter(main.slices.values())).values()))
    titles = score_names(metrics)
    names = [n for n in titles if n in first]
    rows: Rows = []
    for dimension, found in main.slices.items():
        rows.append(dimension)
        rows += [[g, str(own["n"]), *(share(own[n]) for n in names)] for g, own in found.items()]
    table = Table(["group", "n", *(titles[n] for n in names)], rows)
    return [Section("Slices", f"Of {main.name}.", table)]


def failures(metrics: Metrics) -> Section:
    columns = {
        "n": samples,
        "status": lambda system: counted(system.scores.status),
        "damage": lambda system: counted(system.scores.damage),
    }
    table = system_table(metrics, columns, "own", "models")
    return Section("Failures", *words("failures"), table)


def training(metrics: Metrics, records: Sequence[dict]) -> Section:
    curves = figures.loss_curves(records) or "No training record in this folder."
    notes = words("rewards", metrics.rewards) if metrics.rewards else []
    return Section("Training", curves, *figures.reward_curves(records), *notes, *padding(records))


def padding(records: Sequence[dict]) -> list[Table]:
    """Tells how many shapes each stage compiled, and how much of its batches was padding."""
    rows = []
    for stage in dict.fromkeys(r["stage"] for r in records if "padding_share" in r):
        own = [r for r in records if r["stage"] == stage and "padding_share" in r]
        share = np.mean([r["padding_share"] for r in own])
        rows.append([stage, f"{max(r['programs'] for r in own):.0f}", f"{100 * share:.1f}"])
    return [Table(["stage", "shapes compiled", "padding, % of tokens"], rows)] if rows else []


def provenance(metrics: Metrics) -> list[Section]:
    commands = [[c["date"], c["command"]] for c in metrics.commands]
    table = [Table(["date", "command"], commands)] if commands else []
    return [
        Section("How this was made", *words("provenance", metrics), *table),
        Section("Limits", *words("limits", metrics), level=3),
    ]
