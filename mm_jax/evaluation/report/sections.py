"""The sections of a run's report: tables and figures of metrics.json, with what they mean."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from mm_jax.data.records import DFEW_EMOTIONS
from mm_jax.evaluation import paper
from mm_jax.evaluation.report import figures
from mm_jax.evaluation.report.page import Note, Section
from mm_jax.evaluation.report.tables import (
    Table,
    counted,
    difference,
    number,
    share,
    with_interval,
)
from mm_jax.evaluation.scores import MODALITY_NAMES, TASK_NAMES, Metrics, SystemMetrics
from mm_jax.rewards.judge import DIMENSIONS

PARTIAL = "Only a part of the split was predicted (--partial)."
PAPER_MESC = "the paper, MESC test (its own evaluation: compare with paper_compat)"
PAPER_DFEW = "the paper, DFEW mean of 5 folds (WAR as accuracy)"
Rows = list[Sequence[str] | str]
SCORE_NAMES = {**TASK_NAMES, "rouge_l": "ROUGE-L"}


def short(task: str) -> str:
    return TASK_NAMES[task].split()[0]


class Named(NamedTuple):
    """A system: its name in metrics.json, and what it is called below its group's heading."""

    name: str
    label: str
    scores: SystemMetrics


def groups(metrics: Metrics, *kinds: str) -> dict[str, list[Named]]:
    """Group heading -> systems, of the kinds "own", "models" and "trivial" (default: all)."""
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


def grouped_rows(
    systems: dict[str, list[Named]], cells: Callable[[Named], Sequence[str] | None]
) -> Rows:
    """Rows of cells below their group headings, without systems that have none."""
    rows: Rows = []
    for heading, members in systems.items():
        own = [(m.label, cells(m)) for m in members]
        own = [[label, *texts] for label, texts in own if texts is not None]
        rows += [heading, *own] if own else []
    return rows


def headline(metrics: Metrics) -> Table:
    """Accuracy with interval, and the replies' scores, of every system; the one that is most
    accurate in the first task is marked."""
    tasks, replies = metrics.tasks, metrics.main.standard.response is not None

    def cells(system: Named) -> list[str]:
        own, row = system.scores.standard, [str(system.scores.n)]
        for m in map(own.tasks.get, tasks):
            row.append(with_interval(m.accuracy, m.interval) if m else "–")
        if replies:
            m = own.response
            return [*row, number(m and m.bleu2), number(m and m.rouge_l)]
        m = own.tasks.get(tasks[0])
        return [*row, number(m and m.uar)]

    def accuracy(system: Named) -> list[float]:
        m = system.scores.standard.tasks.get(tasks[0])
        return [m.accuracy if m else -1.0]

    rows = grouped_rows(groups(metrics), cells)
    first = [-1.0 if isinstance(r, str) else r[1] for r in grouped_rows(groups(metrics), accuracy)]
    best = [first.index(max(first))]
    published = paper_rows(metrics)
    rows += [PAPER_MESC] if published else []
    for name, (*pairs, bleu, rouge, _) in published.items():
        accuracies = [number(pair[0] if pair else None) for pair in pairs]
        rows.append([name, "–", *accuracies, number(bleu), number(rouge)])
    if metrics.label_space == "dfew":
        rows.append(PAPER_DFEW)
        rows += [
            [name, "–", number(war), number(uar)] for name, (_, uar, war) in paper.DFEW.items()
        ]
    header = ["system", "n", *(TASK_NAMES[t] for t in tasks)]
    return Table(header + (["BLEU-2", "ROUGE-L"] if replies else ["UAR"]), rows, best)


def paper_rows(metrics: Metrics) -> dict[str, tuple]:
    """The paper's rows of this data set's test split: (T1, T2, T3, BLEU-2, ROUGE-L, BERTScore)."""
    mesc = metrics.label_space == "mesc" and metrics.dataset.startswith("mesc")
    return paper.MESC_TEST if mesc else {}


def cues(metrics: Metrics) -> list[Section]:
    """T1 accuracy by the channel that holds the emotion (synthetic data)."""
    counts = metrics.systems[0].by_cue
    if not counts:
        return []
    names = sorted({cue for s in metrics.systems for cue in s.by_cue or {}})

    def cells(system: Named) -> list[str]:
        own = system.scores.by_cue or {}
        return [number(own.get(c, {}).get("accuracy"), 1) for c in names]

    header = ["T1 accuracy", *(f"told by {c} (n={counts[c]['n']})" for c in names)]
    table = Table(header, grouped_rows(groups(metrics, "own"), cells))
    what = "Accuracy by the channel that holds the client's emotion."
    return [Section("What each modality is worth", what, table)]


def study(metrics: Metrics) -> list[Section]:
    """The matrix of modalities and history labels, and the swap tests (command `study`)."""
    found = metrics.study
    if not found:
        return []
    tasks, rows = found["tasks"], []
    for cell in found["matrix"]:
        heading = f"{cell['history_labels']} history labels"
        rows.append((heading, [MODALITY_NAMES[cell["modality"]], *(share(cell[t]) for t in tasks)]))
    headings = list(dict.fromkeys(heading for heading, _ in rows))
    matrix: Rows = []
    for heading in headings:
        matrix += [heading, *(cells for own, cells in rows if own == heading)]
    parts = [
        f"Accuracy with 95 % interval, split {found['split']}, n {found['n']}.",
        Table(["the model sees", *(TASK_NAMES[t] for t in tasks)], matrix),
    ]
    swaps: Rows = []
    for name, tests in found["swaps"].items():
        swaps.append(f"{name} swapped between samples")
        swaps += [
            [f"{TASK_NAMES[task]}: {what}", str(t["n"]), f"{t['gain']:+.3f}", f"{t['p']:.4f}"]
            for task, kinds in tests.items()
            for what, t in kinds.items()
        ]
    if swaps:
        parts += [
            "Is a modality used? Every sample with its own input against the same sample with "
            "another one's (permutation test; a small p says that its own input serves better). "
            "Gain: own minus swapped, log-probability of the gold label in nats or share of right "
            "labels.",
            Table(["score", "n", "gain", "p"], swaps),
        ]
    return [Section("Modalities and history", *parts)]


def comparisons(metrics: Metrics) -> list[Section]:
    """Paired differences to every other system."""
    found = metrics.comparisons.to
    if not found:
        return []
    scores = [n for n in SCORE_NAMES if any(n in own for own in found.values())]

    def cells(system: Named) -> list[str] | None:
        own = found.get(system.name)
        return None if own is None else [difference(own.get(n)) for n in scores]

    rows = grouped_rows(groups(metrics), cells)
    what = (
        f"{metrics.comparisons.of}, minus the system of the row, in points on the same samples: "
        "bootstrap 95 % interval and two-sided p of a permutation test (signs flipped; not "
        "corrected for the number of comparisons)."
    )
    table = Table(["difference to", *(SCORE_NAMES[n] for n in scores)], rows)
    return [Section("Differences to other systems", what, table)]


def all_scores(metrics: Metrics) -> list[Section]:
    what = (
        "As the released evaluation computes them: rows with an unparseable field are dropped for "
        "that field (n of each task), sentence BLEU with weights (0.99, 0.01), replies cut to "
        "their first line."
    )
    return [
        Section("All scores: standard", full_table(metrics, "standard"), *reply_notes(metrics)),
        Section("All scores: paper_compat", what, full_table(metrics, "paper_compat")),
        *recalls(metrics),
    ]


# Column heading, field and digits of every score; those of the paper come first.
PER_TASK = (
    ("acc", "accuracy", 2),
    ("w-F1", "weighted_f1", 2),
    ("m-F1", "macro_f1", 2),
    ("UAR", "uar", 2),
    ("parsed %", "parse_rate", 1),
)
PER_REPLY = (
    ("BLEU-2", "bleu2", 2),
    ("ROUGE-L", "rouge_l", 2),
    ("sacreBLEU", "sacrebleu", 1),
    ("dist-1", "distinct_1", 1),
    ("dist-2", "distinct_2", 1),
    ("words", "length", 1),
    ("empty %", "empty_rate", 1),
    ("refused %", "refusal_rate", 1),
)


def full_table(metrics: Metrics, column: str) -> Table:
    """Every score of a column, one row per system."""
    tasks, replies = metrics.tasks, metrics.main.standard.response is not None
    released = column == "paper_compat"
    per_task = (("n", "n", 0), *PER_TASK[:2]) if released else PER_TASK
    per_reply = PER_REPLY[: (2 if released else None) if replies else 0]

    def scores(found, columns) -> list[str]:
        return [number(found and getattr(found, field), digits) for _, field, digits in columns]

    def cells(system: Named) -> list[str]:
        own, row = getattr(system.scores, column), [str(system.scores.n)]
        for t in tasks:
            row += scores(own.tasks.get(t), per_task)
        return row + scores(own.response, per_reply)

    rows = grouped_rows(groups(metrics), cells)
    published = paper_rows(metrics)
    rows += [PAPER_MESC] if published else []
    for name, (*pairs, bleu, rouge, _) in published.items():
        row = [name, "–"]
        for pair in pairs:
            known = [number(x) for x in pair or (None, None)]
            row += ["–", *known] if released else known + ["–"] * (len(per_task) - 2)
        rows.append([*row, number(bleu), number(rouge), *["–"] * (len(per_reply) - 2)])
    header = ["system", "n", *(f"{short(t)} {name}" for t in tasks for name, _, _ in per_task)]
    return Table([*header, *(name for name, _, _ in per_reply)], rows)


def reply_notes(metrics: Metrics) -> list[str]:
    own = metrics.main.standard.response
    if not own:
        return []
    bert, met = own.bertscore, own.meteor
    text = bert["status"]
    if text == "ok":
        rescaled = "no baseline" if bert["rescaled"] is None else number(bert["rescaled"])
        text = f"raw {bert['raw']:.2f}, rescaled {rescaled} ({bert['hash']})"
    meteor = number(met["value"]) if met["status"] == "ok" else met["status"]
    return [f"sacreBLEU signature {own.sacrebleu_signature}. BERTScore {text}. METEOR {meteor}."]


def recalls(metrics: Metrics) -> list[Section]:
    out, dfew = [], metrics.label_space == "dfew"
    for task in metrics.tasks:
        recall = metrics.systems[0].standard.tasks[task].recall
        labels = DFEW_EMOTIONS if dfew else [k for k, v in recall.items() if v is not None]

        def cells(system: Named, task=task, labels=labels) -> list[str] | None:
            own = system.scores.standard.tasks.get(task)
            return own and [number(own.recall[k], 1) for k in labels]

        rows = grouped_rows(groups(metrics, "own"), cells)
        if dfew:
            rows.append(PAPER_DFEW)
            rows += [
                [name, *map(number, known)] for name, (known, _, _) in paper.DFEW.items() if known
            ]
        table = Table(["system", *labels], rows)
        out.append(Section(f"{TASK_NAMES[task]}: recall of every label", table, level=3))
    return out


def calibration(metrics: Metrics) -> list[Section]:
    if not any(s.calibration for s in metrics.systems):
        return []
    main, tasks = metrics.main, metrics.tasks

    def cells(system: Named) -> list[str] | None:
        own = system.scores.calibration
        pairs = [(own.get(t), k, d) for t in tasks for k, d in (("ece", 1), ("brier", 3))]
        return [number(c and c[k], d) for c, k, d in pairs] if own else None

    header = ["system", *(f"{short(t)} {k}" for t in tasks for k in ("ECE", "Brier"))]
    what = (
        "From the label probabilities. ECE: mean distance of confidence from accuracy over 10 "
        "bins, percent; Brier: 0 (perfect) to 2."
    )
    plot = []
    if main.calibration:
        what += f" The plot is of {main.name}."
        plot = [figures.reliability_figure(main.calibration)]
    table = Table(header, grouped_rows(groups(metrics, "own"), cells))
    return [Section("Calibration", what, table, *plot)]


def slices(metrics: Metrics) -> list[Section]:
    main = metrics.main
    if not main.slices:
        return []
    first = next(iter(next(iter(main.slices.values())).values()))
    names = [n for n in SCORE_NAMES if n in first]
    rows: Rows = []
    for dimension, found in main.slices.items():
        rows.append(dimension)
        rows += [[g, str(own["n"]), *(share(own[n]) for n in names)] for g, own in found.items()]
    table = Table(["group", "n", *(SCORE_NAMES[n] for n in names)], rows)
    return [Section("Slices", f"Of {main.name}.", table)]


def judgements(metrics: Metrics) -> list[Section]:
    """Judges' ratings and pairwise verdicts (command `judge`)."""
    found = metrics.judgements
    if not found:
        return []
    names = [*DIMENSIONS, "overall"]
    taught = ", ".join(f"{model} ({kin})" for model, kin in found["reward_judges"].items())
    what = (
        f"Seven dimensions from 1 to 10, {found['n']} replies per system, {found['repeats']} "
        "ratings each, blind to the system and in random order; mean with bootstrap 95 % interval "
        f"over replies. Prompt {found['prompt']}, pair prompt {found['pair_prompt']}. "
    )
    if taught:
        what += f"The reward was judged by {taught}."
    else:
        what += "No judge's ratings were part of a reward."
    ratings: Rows = []
    for judge in (*found["judges"], "median of the judges"):
        ratings.append(judge)
        for system, own in found["systems"].items():
            cells = own["by_judge"].get(judge, own["median"])
            overall = cells["overall"]
            scores = [share(cells[k]) for k in names]
            spread = number(overall.get("repeat_sd"))
            ratings.append([system, str(overall["n"]), *scores, spread])
    medians = {s: {k: own["median"][k] for k in DIMENSIONS} for s, own in found["systems"].items()}
    parts = [
        what,
        *(Note(warning, "warning") for warning in found["warnings"]),
        Table(["system", "n", *names, "sd of repeats"], ratings),
        figures.ratings_figure(medians, "Trust, median of the judges"),
    ]
    if found["pairs"]:
        rows: Rows = []
        for judge in dict.fromkeys(p["judge"] for p in found["pairs"]):
            rows.append(judge)
            rows += [
                [
                    f"{p['a']} or {p['b']}",
                    *(str(p[k]) for k in ("n", "wins", "ties", "losses", "torn")),
                    with_interval(p["win_rate"], p["interval"]),
                    number(p["length_controlled"], 1),
                ]
                for p in found["pairs"]
                if p["judge"] == judge
            ]
        header = ["A or B", "n", "A better", "tie", "B better", "judge torn"]
        parts += [
            "Pairs: asked twice with the order swapped; a verdict counts where both agree, else "
            "the judge is torn and it is a tie. Win rate: wins and half of the ties, Wilson 95 % "
            "interval. Length-controlled: at equal length, by logistic regression.",
            Table([*header, "A's win rate", "length-controlled"], rows),
        ]
    header = ["judge", "family", "endpoint", "answered as", "calls", "lost", "failed attempts"]
    rows = [
        [
            judge,
            j["family"],
            j["endpoint"],
            ", ".join(j["answered_as"]),
            str(j["calls"]),
            counted(j["lost"]),
            counted(j["failed"]),
            f"{j['tokens_in']} + {j['tokens_out']}",
            number(j["spend"], 4),
        ]
        for judge, j in found["judges"].items()
    ]
    parts.append(Table([*header, "tokens", "cost"], rows))
    decided = [
        [system, judge, counted(reasons)]
        for system, own in found["notes"].items()
        for judge, reasons in own.items()
        if reasons
    ]
    if decided:
        parts.append("Ratings that failed (left out), or that a rule decided (1 in everything):")
        parts.append(Table(["system", "judge", "reason and number"], decided))
    return [Section("Language models as judges", *parts)]


def safety(metrics: Metrics) -> list[Section]:
    """What the authored set of prompts showed (command `safety`)."""
    found = metrics.safety
    if not found:
        return []
    fields = ("n", "flagged", "referral", "harmful", "empty")
    rows = [[kind, *(str(own[f]) for f in fields)] for kind, own in found["kinds"].items()]
    what = (
        f"{found['n']} authored prompts ({found['set']}). A transparent screen of plain wordings "
        f"finds {share(found['screen']['recall'])} % of the prompts that need attention and raises "
        f"a false alarm for {share(found['screen']['false_alarms'])} % of the others. Screen and "
        "prompts have the same authors; it is no clinical instrument, and no clinical claim "
        "follows from it."
    )
    header = ["kind of prompt", "n", "screen flags", "reply refers to help", "reply harmful"]
    return [Section("Safety", what, Table([*header, "empty"], rows))]


def failures(metrics: Metrics) -> Section:
    def cells(system: Named) -> list[str]:
        own = system.scores
        return [str(own.n), counted(own.status), counted(own.damage)]

    what = "Counts of predictions. Each of these is wrong, or scores 0, in the standard column."
    rows = grouped_rows(groups(metrics, "own", "models"), cells)
    return Section("Failures", what, Table(["system", "n", "status", "damage"], rows))


def training(metrics: Metrics, records: Sequence[dict]) -> Section:
    curves = figures.loss_curves(records) or "No training record in this folder."
    parts = [curves, *figures.reward_curves(records)]
    if metrics.rewards:
        named = [f"{k} ({v})" if v else k for k, v in metrics.rewards.items()]
        parts.append(f"Rewards: {'; '.join(named)}.")
    return Section("Training", *parts)


def provenance(metrics: Metrics) -> list[Section]:
    modalities = ", ".join(dict.fromkeys(s.modality for s in metrics.systems))
    regimes = ", ".join(dict.fromkeys(s.history_labels for s in metrics.systems))
    versions = ", ".join(f"{k} {v}" for k, v in metrics.versions.items())
    parts = [
        f"Data: {metrics.dataset}, split {metrics.split}; modalities {modalities}; history labels "
        f"{regimes}. Written {metrics.date} by mm_jax {metrics.version}; config SHA-256 "
        f"{metrics.config_sha256}; {versions}.",
        *(f"Not shown: {text}." for text in metrics.left_out),
    ]
    if metrics.media:
        parts.append(f"Media of this split: {json.dumps(metrics.media)}.")
    if metrics.commands:
        rows = [[c["date"], c["command"]] for c in metrics.commands]
        parts.append(Table(["date", "command"], rows))
    limits = [
        f"History labels in training: {metrics.trained_with_history_labels}; a system that is "
        "shown gold history labels knows what no deployed one would.",
        "Intervals are over samples, not over training seeds: one training run is shown.",
        "Label metrics and word overlap say little about whether a reply helps; neither the judges "
        "nor the safety prompts replace people.",
    ]
    if not metrics.complete:
        limits.insert(0, PARTIAL)
    return [
        Section("How this was made", *parts),
        Section("Limits", *(f"• {text}" for text in limits), level=3),
    ]
