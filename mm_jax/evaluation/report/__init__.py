"""Renders metrics.json as report.html and report.md: the verdict first, then all details."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence

from markupsafe import Markup

from mm_jax.data.datasets.common import SampleSource
from mm_jax.data.records import Sample
from mm_jax.evaluation.predictions import PredictionRow, evenly_spread
from mm_jax.evaluation.report import figures, findings, sections
from mm_jax.evaluation.report.page import Note, Page, Section, Talk, as_text, words, write_pages
from mm_jax.evaluation.scores import MODALITY_NAMES, Metrics, SystemMetrics

CONVERSATIONS = 6


def write_report(
    folder: pathlib.Path,
    metrics: Metrics,
    training: Sequence[dict],
    rows: Sequence[PredictionRow],
    samples: Mapping[str, Sample],
    source: SampleSource,
) -> None:
    """Writes report.html and report.md.

    `training`: the records of metrics.jsonl; `rows`: those of the main system; `samples`: the
    split's by id, without media; `source`: the split with its media.
    """
    main = metrics.main
    side = {findings.study: metrics.study, findings.judgements: metrics.judgements}
    study, judgements, safety = (
        [section(found)] if found else []
        for section, found in (*side.items(), (findings.safety, metrics.safety))
    )
    page = Page(
        title(metrics),
        [
            *partial(metrics),
            Note(verdict(metrics), "lead"),
            *([overview(metrics)] if metrics.tasks else []),
            sections.headline(metrics),
            *words("scores", never_right(metrics)),
        ],
        [
            Section("Conversations", *conversations(metrics, rows, samples, source), columns=True),
            *sections.cues(metrics),
            *study,
            *sections.comparisons(metrics),
            *sections.all_scores(metrics),
            *sections.calibration(metrics),
            *sections.slices(metrics),
            *judgements,
            *safety,
            sections.failures(metrics),
            sections.training(metrics, training),
            Section(
                "Confusion",
                f"Of {main.name}.",
                *figures.confusion_figures(main.standard, metrics.titles),
            ),
            *sections.provenance(metrics),
        ],
    )
    write_pages(folder / "report", page)


def summary(metrics: Metrics) -> str:
    """Renders the verdict, the headline table and the failures as Markdown."""
    left_out = [f"Not in the report: {text}." for text in metrics.left_out]
    parts = [
        *partial(metrics),
        Note(verdict(metrics), "lead"),
        sections.headline(metrics),
        *left_out,
    ]
    return as_text(Page(title(metrics), parts, [sections.failures(metrics)]))


def title(metrics: Metrics) -> str:
    part = "" if metrics.complete else "a part of the "
    return f"{metrics.run} on {metrics.dataset}, {part}{metrics.split} split, {metrics.date[:10]}"


def partial(metrics: Metrics) -> list[Note]:
    return [] if metrics.complete else [Note(*words("partial"), "warning")]


def best_of(systems: Mapping[str, SystemMetrics], task: str) -> str | None:
    """Returns the name of the system with the highest accuracy."""
    able = {name: s.standard.tasks[task] for name, s in systems.items() if task in s.standard.tasks}
    return max(able, key=lambda name: able[name].accuracy, default=None)


def verdict(metrics: Metrics) -> str:
    """Says in one sentence how the main system compares with the best trivial one."""
    if not metrics.tasks:
        return "No sample of this split has a label."
    task = metrics.tasks[0]
    best = best_of(metrics.baselines, task)
    rival = metrics.baselines[best].standard.tasks[task] if best else None
    found = metrics.comparisons.to.get(best, {}).get(task)
    return " ".join(words("verdict", metrics, task, found, best, rival))


def never_right(metrics: Metrics) -> dict[str, list[str]]:
    """Lists the labels that the main system never predicts right, by task."""
    scores = {metrics.titles[t]: metrics.main.standard.tasks[t].recall for t in metrics.tasks}
    found = {t: [label for label, r in recall.items() if r == 0] for t, recall in scores.items()}
    return {task: labels for task, labels in found.items() if labels}


def overview(metrics: Metrics) -> Markup:
    """Plots our systems of the main history regime with the best other and trivial ones."""
    shown = {
        MODALITY_NAMES[s.modality]: ("C0", s.standard.tasks)
        for s in metrics.systems
        if s.history_labels == metrics.main.history_labels
    }
    for name, colour, systems in (
        ("best other model", "C1", metrics.models),
        ("best trivial system", figures.GREY, metrics.baselines),
    ):
        best = {t: best_of(systems, t) for t in metrics.tasks}
        found = {t: systems[b].standard.tasks[t] for t, b in best.items() if b}
        shown |= {name: (colour, found)} if found else {}
    return figures.overview_figure(shown, {t: metrics.titles[t] for t in metrics.tasks})


def conversations(
    metrics: Metrics,
    rows: Sequence[PredictionRow],
    samples: Mapping[str, Sample],
    source: SampleSource,
) -> list[Talk]:
    """Shows evenly spread samples with gold and predicted fields and frames."""
    place = {name: i for i, name in enumerate(samples)}
    out = []
    for row in evenly_spread(rows, CONVERSATIONS):
        sample = source[place[row.id]]
        lines = [(u.speaker.capitalize(), u.text) for u in sample.history[-4:]]
        cue = f", emotion told by {row.cue}" if row.cue else ""
        out.append(
            Talk(
                about=f"sample {row.id}, {MODALITY_NAMES[row.modality]}{cue}",
                frames=figures.thumbnails(sample.frames),
                lines=[*lines, ("Client (now)", sample.client_text or "(no words)")],
                fields=[
                    (title, row.label(task), row.gold[task])
                    for task, title in metrics.titles.items()
                    if row.gold.get(task)
                ],
                response=row.response,
                gold_response=row.gold.get("response"),
            )
        )
    return out
