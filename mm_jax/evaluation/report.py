"""metrics.json as report.html (self-contained) and report.md: tables, plots, conversations."""

from __future__ import annotations

import dataclasses
import html
import io
import json
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

from mm_jax.config.files import write_whole
from mm_jax.data.answers import answer_tasks
from mm_jax.data.datasets.common import SampleSource
from mm_jax.data.records import DFEW_EMOTIONS, Sample
from mm_jax.evaluation import figures, paper
from mm_jax.evaluation.blocks import (
    Block,
    Heading,
    Note,
    Raw,
    Table,
    difference,
    number,
    with_interval,
    write_pages,
)
from mm_jax.evaluation.figures import MODALITY_NAMES, TASK_NAMES
from mm_jax.evaluation.findings import judgement_blocks, safety_blocks, study_blocks

CONVERSATIONS = 6


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """What a report shows: metrics.json, the records of metrics.jsonl, the rows of the main system,
    the split's samples by id (without media), and the split with its media."""

    metrics: dict
    training: list[dict]
    rows: list[dict]
    samples: dict[str, Sample]
    source: SampleSource


def system_name(entry: dict) -> str:
    modality = MODALITY_NAMES[entry["modality"]]
    return f"this model: {modality}, history labels {entry['history_labels']}"


def best_system(systems: Sequence[dict]) -> dict:
    """The system with the most modalities (the first of them)."""
    return max(systems, key=lambda e: len(e["modality"].replace("text", "")))


def named_entries(metrics: dict) -> list[tuple[str, list[tuple[str, dict]]]]:
    """(group heading, [(system, entry)]) of all that was measured here."""
    own = [(system_name(e), e) for e in metrics["systems"]]
    groups = [("this model", own)]
    if metrics["models"]:
        groups.append(("other models", list(metrics["models"].items())))
    if metrics["baselines"]:
        heading = "trivial systems (measured on the same samples; they see gold history labels)"
        groups.append((heading, list(metrics["baselines"].items())))
    return groups


def own_tasks(metrics: dict, column: str = "standard") -> list[str]:
    return [t for t in TASK_NAMES if t in metrics["systems"][0][column]]


def paper_rows(metrics: dict) -> dict[str, tuple]:
    """The paper's rows of this data set's test split: (T1, T2, T3, BLEU-2, ROUGE-L, BERTScore)."""
    mesc = metrics["label_space"] == "mesc" and metrics["dataset"].startswith("mesc")
    return paper.MESC_TEST if mesc else {}


PAPER_MESC = "the paper, MESC test (its own evaluation: compare with paper_compat)"
PAPER_DFEW = "the paper, DFEW mean of 5 folds (WAR as accuracy)"


def headline(metrics: dict) -> Table:
    """Accuracy with interval, and the replies' scores, of every system."""
    tasks = own_tasks(metrics)
    replies = "response" in metrics["systems"][0]["standard"]
    header = ["system", "n", *(f"{TASK_NAMES[t]}" for t in tasks)]
    header += ["BLEU-2", "ROUGE-L"] if replies else ["UAR"]
    rows: list[Sequence[str] | str] = []
    for group, entries in named_entries(metrics):
        rows.append(group)
        for name, entry in entries:
            own = entry["standard"]
            row = [name, str(entry["n"])]
            for t in tasks:
                m = own.get(t)
                row.append(with_interval(m["accuracy"], m["interval"]) if m else "–")
            if replies:
                m = own.get("response")
                row += [number(m and m["bleu2"]), number(m and m["rouge_l"])]
            else:
                m = own.get(tasks[0])
                row.append(number(m and m["uar"]))
            rows.append(row)
    published = paper_rows(metrics)
    if published:
        rows.append(PAPER_MESC)
        for name, (*pairs, bleu, rouge, _) in published.items():
            cells = [number(pair[0] if pair else None) for pair in pairs]
            rows.append([name, "–", *cells, number(bleu), number(rouge)])
    if metrics["label_space"] == "dfew":
        rows.append(PAPER_DFEW)
        for name, (_, uar, war) in paper.DFEW.items():
            rows.append([name, "–", number(war), number(uar)])
    return Table(header, rows)


def full_table(metrics: dict, column: str) -> Table:
    """Every score of a column, a row a system."""
    tasks = own_tasks(metrics, column)
    replies = "response" in metrics["systems"][0][column]
    standard = column == "standard"
    per_task = [("acc", "accuracy", 2), ("w-F1", "weighted_f1", 2)]
    per_reply = [("BLEU-2", "bleu2", 2), ("ROUGE-L", "rouge_l", 2)]
    if standard:
        per_task += [("m-F1", "macro_f1", 2), ("UAR", "uar", 2), ("parsed %", "parse_rate", 1)]
        per_reply += [
            ("sacreBLEU", "sacrebleu", 1),
            ("dist-1", "distinct_1", 1),
            ("dist-2", "distinct_2", 1),
            ("words", "length", 1),
            ("empty %", "empty_rate", 1),
            ("refused %", "refusal_rate", 1),
        ]
    header = ["system", "n"]
    header += [f"{TASK_NAMES[t].split()[0]} {short}" for t in tasks for short, _, _ in per_task]
    if not standard:
        header[2:2] = [f"{TASK_NAMES[t].split()[0]} n" for t in tasks]
    header += [short for short, _, _ in per_reply] if replies else []
    rows: list[Sequence[str] | str] = []
    for group, entries in named_entries(metrics):
        rows.append(group)
        for name, entry in entries:
            own = entry[column]
            row = [name, str(entry["n"])]
            if not standard:
                row += [str(own[t]["n"]) if t in own else "–" for t in tasks]
            for t in tasks:
                row += [number(own[t][key] if t in own else None, d) for _, key, d in per_task]
            if replies:
                m = own.get("response")
                row += [number(m and m[key], d) for _, key, d in per_reply]
            rows.append(row)
    published = paper_rows(metrics)
    if published:
        rows.append(PAPER_MESC)
        for name, (*pairs, bleu, rouge, _) in published.items():
            row = [name, "–"] + ([] if standard else ["–"] * len(tasks))
            for pair in pairs:
                row += [number(pair[0] if pair else None), number(pair[1] if pair else None)]
                row += ["–"] * (len(per_task) - 2)
            rows.append([*row, number(bleu), number(rouge), *["–"] * (len(per_reply) - 2)])
    return Table(header, rows)


def cue_blocks(metrics: dict) -> list[Block]:
    """T1 accuracy by the channel that holds the emotion (synthetic data)."""
    cues = sorted({cue for e in metrics["systems"] for cue in e.get("by_cue", {})})
    if not cues:
        return []
    rows = [
        [system_name(e), *(number(e["by_cue"].get(c, {}).get("accuracy"), 1) for c in cues)]
        for e in metrics["systems"]
    ]
    counts = metrics["systems"][0]["by_cue"]
    header = ["T1 accuracy where the emotion is in", *(f"{c} (n={counts[c]['n']})" for c in cues)]
    return [Heading("What each modality is worth"), Table(header, rows)]


def comparison_blocks(metrics: dict) -> list[Block]:
    """Paired differences to every other system."""
    found = metrics["comparisons"]
    if not found["to"]:
        return []
    names = [*own_tasks(metrics), "rouge_l"]
    names = [n for n in names if any(n in scores for scores in found["to"].values())]
    titles = [TASK_NAMES.get(n, "ROUGE-L") for n in names]

    rows = [
        [other, *(difference(scores.get(n)) for n in names)]
        for other, scores in found["to"].items()
    ]
    return [
        Heading("Differences to other systems"),
        Note(
            f"{found['of']}, less the system of the row, in points on the same samples: "
            "bootstrap 95 % interval and two-sided p of a permutation test (signs flipped; not "
            "corrected for how many comparisons there are)."
        ),
        Table(["less", *titles], rows),
    ]


def recall_blocks(metrics: dict) -> list[Block]:
    out: list[Block] = []
    for task in own_tasks(metrics):
        own = [e for e in metrics["systems"] if task in e["standard"]]
        labels = [k for k, v in own[0]["standard"][task]["recall"].items() if v is not None]
        if metrics["label_space"] == "dfew":
            labels = list(DFEW_EMOTIONS)
        rows: list[Sequence[str] | str] = [
            [system_name(e), *(number(e["standard"][task]["recall"][k], 1) for k in labels)]
            for e in own
        ]
        if metrics["label_space"] == "dfew":
            rows.append(PAPER_DFEW)
            rows += [
                [name, *(number(r) for r in recalls)]
                for name, (recalls, _, _) in paper.DFEW.items()
                if recalls
            ]
        out += [
            Heading(f"{TASK_NAMES[task]}: recall of every label", 3),
            Table(["", *labels], rows),
        ]
    return out


def calibration_blocks(metrics: dict, shown: dict) -> list[Block]:
    entries = [e for e in metrics["systems"] if e["calibration"]]
    if not entries:
        return []
    tasks = own_tasks(metrics)
    header = ["system"]
    header += [f"{TASK_NAMES[t].split()[0]} {k}" for t in tasks for k in ("ECE", "Brier")]
    rows = []
    for e in entries:
        row = [system_name(e)]
        for t in tasks:
            c = e["calibration"].get(t)
            row += [number(c and c["ece"], 1), number(c and c["brier"], 3)]
        rows.append(row)
    return [
        Heading("Calibration"),
        Note(
            "From the label probabilities. ECE: mean distance of confidence from accuracy over 10 "
            "bins, percent; Brier: 0 (perfect) to 2. "
            + (f"The plot is of {system_name(shown)}." if shown["calibration"] else "")
        ),
        Table(header, rows),
        Raw(figures.reliability_figure(shown["calibration"]) if shown["calibration"] else ""),
    ]


def slice_blocks(shown: dict) -> list[Block]:
    if not shown["slices"]:
        return []
    first = next(iter(next(iter(shown["slices"].values())).values()))
    names = [n for n in (*TASK_NAMES, "rouge_l") if n in first]
    rows: list[Sequence[str] | str] = []
    for dimension, groups in shown["slices"].items():
        rows.append(dimension)
        for group, own in groups.items():
            cells = [with_interval(own[n]["mean"], own[n]["interval"]) for n in names]
            rows.append([group, str(own["n"]), *cells])
    header = ["group", "n", *(TASK_NAMES.get(n, "ROUGE-L") for n in names)]
    return [Heading(f"Slices: {system_name(shown)}"), Table(header, rows)]


def damage_blocks(metrics: dict) -> list[Block]:
    entries = [(system_name(e), e) for e in metrics["systems"]] + list(metrics["models"].items())
    rows = [
        [
            name,
            str(e["n"]),
            ", ".join(f"{k} {n}" for k, n in e["status"].items()),
            ", ".join(f"{k} {n}" for k, n in e["damage"].items()) or "none",
        ]
        for name, e in entries
    ]
    return [
        Heading("Failures"),
        Note("Counts of predictions. Each of these is wrong, or scores 0, in the standard column."),
        Table(["system", "n", "status", "damage"], rows),
    ]


def provenance_blocks(metrics: dict) -> list[Block]:
    limits = [
        f"History labels in training: {metrics['trained_with_history_labels']}; a system that is "
        "shown gold history labels knows what no deployed one would.",
        "Intervals are over samples, not over training seeds: one training run is shown.",
        "Label metrics and word overlap say little about whether a reply helps; neither the judges "
        "nor the safety prompts replace people.",
    ]
    if not metrics["complete"]:
        limits.insert(0, "Only a part of the split was predicted (--partial).")
    rows = [[c["date"], c["command"]] for c in metrics["commands"]]
    shown = {
        key: ", ".join(dict.fromkeys(e[key] for e in metrics["systems"]))
        for key in ("modality", "history_labels")
    }
    out: list[Block] = [
        Heading("How this was made"),
        Note(
            f"Data: {metrics['dataset']}, split {metrics['split']}; modalities "
            f"{shown['modality']}; history labels {shown['history_labels']}. Written "
            f"{metrics['date']} by mm_jax {metrics['version']}; config SHA-256 "
            f"{metrics['config_sha256']}; "
            + ", ".join(f"{k} {v}" for k, v in metrics["versions"].items())
            + "."
        ),
    ]
    out += [Note(f"Not shown: {text}.") for text in metrics["left_out"]]
    if metrics["media"]:
        out.append(Note(f"Media of this split: {json.dumps(metrics['media'])}."))
    if rows:
        out.append(Table(["date", "command"], rows))
    return [*out, Heading("Limits", 3), *(Note(f"• {text}") for text in limits)]


def reward_note(rewards: dict[str, str]) -> str:
    return "Rewards: " + "; ".join(f"{k} ({v})" if v else k for k, v in rewards.items()) + "."


def reply_notes(shown: dict) -> list[Block]:
    own = shown["standard"].get("response")
    if not own:
        return []
    bert, met = own["bertscore"], own["meteor"]
    text = f"sacreBLEU signature {own['sacrebleu_signature']}. BERTScore "
    if bert["status"] == "ok":
        rescaled = number(bert["rescaled"]) if bert["rescaled"] is not None else "no baseline"
        text += f"raw {bert['raw']:.2f}, rescaled {rescaled} ({bert['hash']})"
    else:
        text += bert["status"]
    text += f". METEOR {number(met['value']) if met['status'] == 'ok' else met['status']}."
    return [Note(text)]


def thumbnails(frames: np.ndarray, count: int = 4) -> str:
    """Up to `count` frames uint8[F, S, S, 3] as small JPEGs."""
    if not len(frames):
        return ""
    places = np.unique(np.linspace(0, len(frames) - 1, count).round().astype(int))
    out = []
    for i in places:
        buffer = io.BytesIO()
        Image.fromarray(frames[i]).resize((96, 96)).save(buffer, "JPEG", quality=80)
        out.append(figures.inline(buffer.getvalue(), "jpeg", "frame of the client's video"))
    return f'<div class="frames">{"".join(out)}</div>'


def conversations(shown: Evaluated) -> str:
    """Sample conversations, evenly spread, with gold and predicted fields and frames."""
    rows = shown.rows
    chosen = {
        r["id"]: r for r in (rows[i * len(rows) // CONVERSATIONS] for i in range(CONVERSATIONS))
    }
    place = {name: i for i, name in enumerate(shown.samples)}
    out = []
    for row in chosen.values():
        sample = shown.source[place[row["id"]]]
        lines = [(u.speaker.capitalize(), u.text) for u in sample.history[-4:]]
        lines.append(("Client (now)", sample.client_text or "(no words)"))
        talk = "".join(
            f'<p><span class="who">{html.escape(who)}:</span> {html.escape(text)}</p>'
            for who, text in lines
        )
        fields = []
        for task in answer_tasks(row["label_space"]):
            gold, got = row["gold"].get(task), row["predicted"].get(task, "")
            if gold:
                kind = "right" if gold == got else "wrong"
                label = html.escape(got or "(unparseable)")
                fields.append(
                    f'<p>{TASK_NAMES[task]}: <span class="{kind}">{label}</span> '
                    f"(gold: {html.escape(gold)})</p>"
                )
        if "response" in row["gold"]:
            fields.append(
                f"<p>Reply: <i>{html.escape(row['predicted'].get('response') or '(empty)')}</i></p>"
                f'<p class="note">Gold reply: {html.escape(row["gold"]["response"])}</p>'
            )
        cue = f", emotion told by {html.escape(str(row['cue']))}" if row.get("cue") else ""
        out.append(
            f'<div class="talk"><p class="note">sample {html.escape(row["id"])}, '
            f"{MODALITY_NAMES[row['modality']]}{cue}</p>{thumbnails(sample.frames)}{talk}"
            f"{''.join(fields)}</div>"
        )
    return "".join(out)


def report_blocks(shown: Evaluated) -> Iterable[Block]:
    metrics = shown.metrics
    best = best_system(metrics["systems"])
    yield Heading(f"Evaluation of {metrics['run']}", 1)
    yield Note(
        f"{metrics['dataset']}, split {metrics['split']}, mm_jax {metrics['version']}. Percent, "
        "with bootstrap 95 % intervals over samples. An unparseable label counts as wrong and an "
        "empty reply as 0; nothing is dropped, but in paper_compat."
    )
    yield headline(metrics)
    yield from cue_blocks(metrics)
    yield from study_blocks(metrics)
    yield from comparison_blocks(metrics)
    yield Heading("All scores: standard")
    yield full_table(metrics, "standard")
    yield from reply_notes(best)
    yield Heading("All scores: paper_compat")
    yield Note(
        "As the released evaluation computes them: rows with an unparseable field are dropped for "
        "that field (n of each task), sentence BLEU with weights (0.99, 0.01), replies cut to "
        "their first line."
    )
    yield full_table(metrics, "paper_compat")
    yield from recall_blocks(metrics)
    yield from calibration_blocks(metrics, best)
    yield from slice_blocks(best)
    yield from judgement_blocks(metrics)
    yield from safety_blocks(metrics)
    yield from damage_blocks(metrics)
    yield Heading("Training")
    curves = figures.loss_curves(shown.training)
    yield Raw(curves) if curves else Note("No training record in this folder.")
    yield Raw(figures.reward_curves(shown.training))
    if metrics["rewards"]:
        yield Note(reward_note(metrics["rewards"]))
    yield Heading(f"Confusion: {system_name(best)}")
    yield Raw(figures.confusion_figure(best))
    yield Heading("Conversations")
    yield Raw(conversations(shown))
    yield from provenance_blocks(metrics)


def write_report(folder: pathlib.Path, shown: Evaluated) -> None:
    """Writes metrics.json, report.html and report.md into `folder`."""
    blocks = list(report_blocks(shown))
    write_pages(folder / "report", f"mm_jax: {shown.metrics['run']}", blocks)
    write_whole(folder / "metrics.json", json.dumps(shown.metrics, indent=1, allow_nan=False))
