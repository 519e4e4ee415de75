"""metrics.json as a self-contained HTML report: tables, curves, confusions, conversations."""

from __future__ import annotations

import base64
import html
import io
import json
import pathlib
import re
from collections.abc import Iterable, Sequence

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from mm_jax.data.records import CLIENT_EMOTION, STRATEGY, THERAPIST_EMOTION, Sample
from mm_jax.evaluation import paper

TASK_NAMES = {
    CLIENT_EMOTION: "T1 client emotion",
    THERAPIST_EMOTION: "T2 therapist emotion",
    STRATEGY: "T3 strategy",
}
MODALITY_NAMES = {
    "text": "text only",
    "a": "text + audio",
    "v": "text + video",
    "av": "text + audio + video",
}
COLOURS = ("#4a9a5b", "#8d5ba8", "#c9a227", "#5c6770")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2733; max-width: 1150px; margin: 2em auto;
  padding: 0 1em; }
h1 { font-size: 1.7em; margin-bottom: 0; } h2 { margin-top: 2em; border-bottom: 1px solid #d6dde4; }
table { border-collapse: collapse; margin: .6em 0; font-size: 13.5px; display: block;
  overflow-x: auto; }
th, td { padding: .28em .7em; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 2px solid #8496a8; } tbody tr:nth-child(even) { background: #f4f7fa; }
tr.group td { background: #e6edf4; font-weight: 600; text-align: left; }
.note { color: #58687a; font-size: 13.5px; } img { max-width: 100%; }
.talk { border-left: 3px solid #b9c7d6; padding: .2em 1em; margin: 1em 0; }
.talk p { margin: .15em 0; } .who { font-weight: 600; } .right { color: #17743b; }
.wrong { color: #b3261e; }
"""


def number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def table(header: Sequence[str], rows: Iterable[Sequence[str] | str]) -> str:
    """An HTML table; a row that is one string becomes a group heading."""
    body = []
    for row in rows:
        if isinstance(row, str):
            body.append(
                f'<tr class="group"><td colspan="{len(header)}">{html.escape(row)}</td></tr>'
            )
        else:
            body.append("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>")
    head = "".join(f"<th>{html.escape(h)}</th>" for h in header)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def figure(fig) -> str:
    """A matplotlib figure as an inline PNG."""
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    plt.close(fig)
    return f'<img src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def system_name(entry: dict) -> str:
    modality = MODALITY_NAMES[entry["modality"]]
    return f"this model: {modality}, history labels {entry['history_labels']}"


def main_table(metrics: dict, column: str) -> str:
    """Every system in one table: ours, trivial systems, the paper's."""
    tasks = [t for t in TASK_NAMES if t in metrics["systems"][0][column]]
    with_response = "response" in metrics["systems"][0][column]
    standard = column == "standard"
    header = ["system", "n"]
    for task in tasks:
        short = TASK_NAMES[task].split()[0]
        header += [f"{short} acc", f"{short} w-F1"]
        if standard:
            header += [f"{short} 95 %", f"{short} UAR", f"{short} parsed"]
    if with_response:
        header += ["BLEU-2", "ROUGE-L"]
        if standard:
            header += ["sacreBLEU", "dist-1", "dist-2", "words", "empty %", "refused %"]

    def cells(name: str, entry: dict) -> list[str]:
        own = entry[column]
        row = [name, str(entry["n"])]
        for task in tasks:
            m = own.get(task)
            row += [number(m and m["accuracy"]), number(m and m["weighted_f1"])]
            if standard:
                span = f"{m['interval'][0]:.1f}–{m['interval'][1]:.1f}" if m else "–"
                row += [span, number(m and m["uar"]), number(m and m["parse_rate"], 1)]
        if with_response:
            m = own.get("response")
            row += [number(m and m["bleu2"]), number(m and m["rouge_l"])]
            if standard:
                row += [
                    number(m and m[k], 1)
                    for k in (
                        "sacrebleu",
                        "distinct_1",
                        "distinct_2",
                        "length",
                        "empty_rate",
                        "refusal_rate",
                    )
                ]
        return row

    rows: list[Sequence[str] | str] = ["this model"]
    rows += [cells(system_name(e), e) for e in metrics["systems"]]
    if metrics["baselines"]:
        rows.append("trivial systems (measured on the same samples; they see gold history labels)")
        rows += [cells(name, e) for name, e in metrics["baselines"].items()]
    if metrics["label_space"] == "mesc" and metrics["dataset"].startswith("mesc"):
        rows.append("the paper, MESC test (its own evaluation: compare with paper_compat)")
        for name, (t1, t2, t3, bleu, rouge, _) in paper.MESC_TEST.items():
            row = [name, "–"]
            for pair in (t1, t2, t3):
                row += [number(pair[0] if pair else None), number(pair[1] if pair else None)]
                row += ["–"] * 3 if standard else []
            row += [number(bleu), number(rouge)] + (["–"] * 6 if standard else [])
            rows.append(row)
    if metrics["label_space"] == "dfew" and standard:
        rows.append("the paper, DFEW mean of 5 folds (WAR as accuracy)")
        for name, (_, uar, war) in paper.DFEW.items():
            rows.append([name, "–", number(war), "–", "–", number(uar), "–"])
    return table(header, rows)


def loss_curves(records: list[dict]) -> str:
    """Training and validation curves of every stage, from metrics.jsonl."""
    policy = {r["stage"] for r in records if "reward" in r}
    stages = [s for s in dict.fromkeys(r["stage"] for r in records) if s not in policy]
    if not stages:
        return "<p class='note'>No training record in this folder.</p>"
    fig, axes = plt.subplots(1, len(stages), figsize=(4.6 * len(stages), 3.2), squeeze=False)
    for ax, stage in zip(axes[0], stages, strict=True):
        own = [r for r in records if r["stage"] == stage]
        train = [(r["step"], r["loss"]) for r in own if "loss" in r]
        val = [(r["step"], r["val_loss"]) for r in own if "val_loss" in r]
        if train:
            ax.plot(*zip(*train, strict=True), color="#3b6ea5", lw=1.3, label="train")
        if val:
            ax.plot(*zip(*val, strict=True), "o-", color="#c4602d", ms=4, label="val")
        ax.set_title(stage)
        ax.set_xlabel("step")
        ax.set_ylabel("loss (nats a target token)")
        ax.grid(alpha=0.3)
        ax.legend()
    fig.tight_layout()
    return figure(fig)


def reward_note(rewards: dict[str, str]) -> str:
    if not rewards:
        return ""
    return "Rewards: " + "; ".join(f"{k} ({v})" if v else k for k, v in rewards.items()) + "."


def reward_curves(records: list[dict]) -> str:
    """Rewards with bands and the health of every reinforcement stage, from metrics.jsonl."""
    out = []
    for stage in dict.fromkeys(r["stage"] for r in records if "reward" in r):
        steps = [r for r in records if r["stage"] == stage and "reward" in r]
        val = [r for r in records if r["stage"] == stage and "val_reward" in r]
        failed = sorted({k for r in steps for k in r if re.fullmatch("reward/.*_failed", k)})
        components = [k.removesuffix("_failed") for k in failed]
        panels = {
            "reply, words": ["response_words"],
            "entropy, nats": ["entropy"],
            "KL to the reference": ["kl", "kl_sampled"],
            "share": ["clip_low", "clip_high", "zero_variance_groups", "truncated_share"],
            "failed scores, share": ["invalid_share", *failed],
        }
        fig, axes = plt.subplots(2, 3, figsize=(13, 6))
        x = np.array([r["step"] for r in steps])
        ax = axes[0, 0]
        for name, colour in [("reward", "#3b6ea5"), *zip(components, COLOURS, strict=False)]:
            spread = "reward_group_std" if name == "reward" else f"{name}_std"
            # A gap where every score of a step failed.
            mean, band = (np.array([r.get(k, np.nan) for r in steps]) for k in (name, spread))
            ax.plot(x, mean, color=colour, lw=1.3, label=name.removeprefix("reward/"))
            ax.fill_between(x, mean - band, mean + band, color=colour, alpha=0.12)
        if val:
            at = [r["step"] for r in val]
            middle = np.array([r["val_reward"] for r in val])
            low, high = (np.array([r[f"val_reward_{k}"] for r in val]) for k in ("low", "high"))
            ax.errorbar(
                at,
                middle,
                [middle - low, high - middle],
                fmt="o-",
                color="#c4602d",
                ms=4,
                capsize=3,
                label="val, 95 %",
            )
        ax.set_title(f"{stage}: rewards (band: standard deviation)")
        for ax, (title, names) in zip(axes.flat[1:], panels.items(), strict=True):
            for name in names:
                if name in steps[0]:
                    ax.plot(x, [r[name] for r in steps], lw=1.3, label=name.removeprefix("reward/"))
            ax.set_title(title)
        for ax in axes.flat:
            ax.set_xlabel("step")
            ax.grid(alpha=0.3)
            ax.legend(fontsize=8)
        fig.tight_layout()
        out.append(figure(fig))
    return "".join(out)


def confusion_figure(entry: dict) -> str:
    """Row-normalised confusion matrices of one system."""
    tasks = [t for t in TASK_NAMES if t in entry["standard"]]
    parts = []
    for task in tasks:
        m = entry["standard"][task]
        counts = np.array(m["confusion"], float)
        rows = counts.sum(axis=1) > 0
        columns = rows | (counts.sum(axis=0) > 0)
        labels = np.array(m["labels"])
        counts = counts[rows][:, columns]
        share = counts / counts.sum(axis=1, keepdims=True)
        size = 0.5 * max(counts.shape) + 2
        fig, ax = plt.subplots(figsize=(size + 1, 0.42 * counts.shape[0] + 1.8))
        ax.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        ax.set_xticks(range(counts.shape[1]), [_short(x) for x in labels[columns]], rotation=40)
        for tick in ax.get_xticklabels():
            tick.set_ha("right")
        ax.set_yticks(range(counts.shape[0]), [_short(x) for x in labels[rows]])
        for (i, j), value in np.ndenumerate(counts):
            if value:
                ax.text(
                    j,
                    i,
                    f"{value:.0f}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if share[i, j] > 0.55 else "black",
                )
        ax.set_xlabel("predicted")
        ax.set_ylabel("gold")
        ax.set_title(f"{TASK_NAMES[task]}: accuracy {m['accuracy']:.1f}")
        parts.append(figure(fig))
    return "".join(parts)


def _short(label: str) -> str:
    return label if len(label) <= 24 else label[:22] + "…"


def cue_table(metrics: dict) -> str:
    """T1 accuracy by the channel that holds the emotion (synthetic data)."""
    cues = sorted({cue for e in metrics["systems"] for cue in e.get("by_cue", {})})
    if not cues:
        return ""
    rows = [
        [system_name(e), *(number(e["by_cue"].get(c, {}).get("accuracy"), 1) for c in cues)]
        for e in metrics["systems"]
    ]
    counts = metrics["systems"][0]["by_cue"]
    header = ["T1 accuracy where the emotion is in", *(f"{c} (n={counts[c]['n']})" for c in cues)]
    return "<h2>What each modality is worth</h2>" + table(header, rows)


def recall_table(metrics: dict) -> str:
    out = []
    for task, name in TASK_NAMES.items():
        own = [e for e in metrics["systems"] if task in e["standard"]]
        if not own:
            continue
        labels = [k for k, v in own[0]["standard"][task]["recall"].items() if v is not None]
        rows = [
            [system_name(e), *(number(e["standard"][task]["recall"][k], 1) for k in labels)]
            for e in own
        ]
        out.append(f"<h3>{name}: recall of every label</h3>" + table(["system", *labels], rows))
    return "".join(out)


def conversations(rows: list[dict], samples: dict[str, Sample], count: int = 6) -> str:
    """Sample conversations with gold and predicted fields."""
    chosen = [r for r in rows if r["id"] in samples]
    chosen = [chosen[i * len(chosen) // count] for i in range(count)] if chosen else []
    out = []
    for row in {r["id"]: r for r in chosen}.values():
        sample = samples[row["id"]]
        lines = []
        for u in sample.history[-4:]:
            lines.append((u.speaker.capitalize(), u.text, ""))
        lines.append(("Client", sample.client_text or "(no words)", "now"))
        talk = "".join(
            f'<p><span class="who">{html.escape(w)}{" (now)" if n else ""}:</span> '
            f"{html.escape(t)}</p>"
            for w, t, n in lines
        )
        fields = []
        for task, name in TASK_NAMES.items():
            gold, got = row["gold"].get(task), row["predicted"].get(task, "")
            if not gold:
                continue
            kind = "right" if gold == got else "wrong"
            fields.append(
                f'<p>{name}: <span class="{kind}">{html.escape(got or "(unparseable)")}</span> '
                f"(gold: {html.escape(gold)})</p>"
            )
        if "response" in row["gold"]:
            fields.append(
                f"<p>Reply: <i>{html.escape(row['predicted'].get('response', ''))}</i></p>"
                f'<p class="note">Gold reply: {html.escape(row["gold"]["response"])}</p>'
            )
        cue = f", emotion told by {row['cue']}" if row.get("cue") else ""
        out.append(
            f'<div class="talk"><p class="note">sample {html.escape(row["id"])}, '
            f"{MODALITY_NAMES[row['modality']]}{cue}</p>{talk}{''.join(fields)}</div>"
        )
    return "".join(out)


def best_system(metrics: dict) -> dict:
    """The system with the most modalities (the first of them)."""
    return max(metrics["systems"], key=lambda e: len(e["modality"].replace("text", "")))


def write_report(
    path: pathlib.Path,
    metrics: dict,
    training: list[dict],
    rows: list[dict],
    samples: dict[str, Sample],
) -> None:
    """Writes the report as one HTML file without outside references."""
    shown = best_system(metrics)
    own = [
        r
        for r in rows
        if r["modality_asked"] == shown["modality"]
        and r["history_labels"] == shown["history_labels"]
    ]
    notes = []
    response = shown["standard"].get("response")
    if response:
        notes.append(f"sacreBLEU signature {response['sacrebleu_signature']}.")
        bert = response["bertscore"]
        notes.append(
            f"BERTScore raw {bert['raw']:.2f}, rescaled {bert['rescaled']:.2f} ({bert['hash']})."
            if bert["status"] == "ok"
            else f"BERTScore {bert['status']}."
        )
    notes.append(f"Prediction status: {json.dumps(shown['status'])}.")
    if metrics.get("media"):
        notes.append(f"Media of this split: {json.dumps(metrics['media'])}.")
    body = f"""
<h1>Evaluation of {html.escape(metrics["run"])}</h1>
<p class="note">{html.escape(metrics["dataset"])}, split {html.escape(metrics["split"])},
mm_jax {html.escape(metrics["version"])}. Accuracy, F1, UAR and recall in percent; intervals are
bootstrap 95 % intervals of the accuracy. An unparseable label counts as wrong and an empty reply as
0 in the standard column; nothing is dropped there.</p>
{cue_table(metrics)}
<h2>Results: standard</h2>
{main_table(metrics, "standard")}
<p class="note">{html.escape(" ".join(notes))}</p>
<h2>Results: paper_compat</h2>
<p class="note">As the released evaluation computes them: rows with an unparseable field are dropped
for that field, sentence BLEU with weights (0.99, 0.01), replies cut to their first line.</p>
{main_table(metrics, "paper_compat")}
{recall_table(metrics)}
<h2>Training</h2>
{loss_curves(training)}
{reward_curves(training)}
<p class="note">{html.escape(reward_note(metrics["rewards"]))}</p>
<h2>Confusion: {html.escape(system_name(shown))}</h2>
{confusion_figure(shown)}
<h2>Conversations</h2>
{conversations(own, samples)}
"""
    text = (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>mm_jax report</title>"
        f"<style>{STYLE}</style></head><body>{body}</body></html>"
    )
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.rename(path)
