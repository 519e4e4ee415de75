"""Shows metrics.json as report.html and report.md: a verdict first, then everything behind it."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence

from markupsafe import Markup

from mm_jax.data.answers import answer_tasks
from mm_jax.data.datasets.common import SampleSource
from mm_jax.data.records import CLIENT_EMOTION, Sample
from mm_jax.evaluation.predictions import PredictionRow, evenly_spread
from mm_jax.evaluation.report import figures, findings, sections
from mm_jax.evaluation.report.page import Note, Page, Section, Talk, as_text, write_pages
from mm_jax.evaluation.report.tables import spread
from mm_jax.evaluation.scores import MODALITY_NAMES, TASK_NAMES, Metrics, SystemMetrics

CONVERSATIONS = 6
SEEN = {"text": ["text"], "a": ["sound"], "v": ["video"], "av": ["sound", "video"]}


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
            Note(verdict(metrics), "lead"),
            *([] if metrics.complete else [Note(sections.PARTIAL, "warning")]),
            overview(metrics),
            sections.headline(metrics),
            "Percent, with bootstrap 95 % intervals over samples. An unparseable label counts as "
            "wrong and an empty reply as 0; nothing is dropped, except in paper_compat. "
            + never_right(metrics),
        ],
        [
            Section("Conversations", *conversations(rows, samples, source), columns=True),
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
            Section("Confusion", f"Of {main.name}.", *figures.confusion_figures(main.standard)),
            *sections.provenance(metrics),
        ],
    )
    write_pages(folder / "report", page)


def summary(metrics: Metrics) -> str:
    """The verdict, the headline table and the failures as Markdown."""
    left_out = [f"Not in the report: {text}." for text in metrics.left_out]
    parts = [Note(verdict(metrics), "lead"), sections.headline(metrics), *left_out]
    return as_text(Page(title(metrics), parts, [sections.failures(metrics)]))


def title(metrics: Metrics) -> str:
    return f"{metrics.run} on {metrics.dataset}, {metrics.split} split, {metrics.date[:10]}"


def best_of(systems: Mapping[str, SystemMetrics], task: str) -> str | None:
    """The system with the highest accuracy."""
    able = {name: s.standard.tasks[task] for name, s in systems.items() if task in s.standard.tasks}
    return max(able, key=lambda name: able[name].accuracy, default=None)


def verdict(metrics: Metrics) -> str:
    """Says in one sentence how the main system compares with the best trivial one."""
    main, task = metrics.main, CLIENT_EMOTION
    inputs = list(SEEN[main.modality])
    if main.history_labels != "none":
        inputs.append(f"{main.history_labels} history labels")
    *before, last = inputs
    seen = f"{', '.join(before)} and {last}" if before else last
    accuracy = main.standard.tasks[task].accuracy
    text = f"With {seen} {accuracy:.1f} % of the client's emotions are right"
    best = best_of(metrics.baselines, task)
    found = metrics.comparisons.to.get(best, {}).get(task)
    if not found:
        return f"{text}."
    low, high = found["interval"]
    chance = ", which chance alone can explain" if low <= 0 <= high else ""
    return (
        f"{text}; the best trivial system ({best}) has "
        f"{metrics.baselines[best].standard.tasks[task].accuracy:.1f} %: "
        f"{found['difference']:+.1f} points (95 % interval {spread(found['interval'])}){chance}."
    )


def never_right(metrics: Metrics) -> str:
    """Names the labels that the main system never predicts right."""
    found = []
    for task in metrics.tasks:
        recall = metrics.main.standard.tasks[task].recall
        labels = [label for label, value in recall.items() if value == 0]
        if labels:
            found.append(f"{', '.join(labels)} ({TASK_NAMES[task]})")
    if not found:
        return "The main system is right at least once about every label that occurs."
    return f"The main system is never right about {'; '.join(found)}."


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
    return figures.overview_figure(shown)


def conversations(
    rows: Sequence[PredictionRow], samples: Mapping[str, Sample], source: SampleSource
) -> list[Talk]:
    """Samples of the main system, evenly spread, with gold and predicted fields and frames."""
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
                    (TASK_NAMES[task], row.label(task), row.gold[task])
                    for task in answer_tasks(row.label_space)
                    if row.gold.get(task)
                ],
                response=row.response,
                gold_response=row.gold.get("response"),
            )
        )
    return out
