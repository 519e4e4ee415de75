"""The plots of a report, as inline PNGs on white ground (they stay readable in a dark page)."""

from __future__ import annotations

import base64
import html
import io
import re

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from mm_jax.data.records import CLIENT_EMOTION, STRATEGY, THERAPIST_EMOTION

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
plt.rcParams["text.parse_math"] = False  # names of systems may hold a $
COLOURS = ("#4a9a5b", "#8d5ba8", "#c9a227", "#5c6770")


def inline(data: bytes, kind: str, alt: str) -> str:
    """An image without an outside reference; `alt` says what it shows."""
    text = base64.b64encode(data).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/{kind};base64,{text}">'


def figure(fig, alt: str) -> str:
    """A matplotlib figure as an inline PNG."""
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    plt.close(fig)
    return inline(buffer.getvalue(), "png", alt)


def loss_curves(records: list[dict]) -> str:
    """Training and validation curves of every stage, from metrics.jsonl."""
    policy = {r["stage"] for r in records if "invalid_share" in r}
    stages = [s for s in dict.fromkeys(r["stage"] for r in records) if s not in policy]
    if not stages:
        return ""
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
    return figure(fig, "Training and validation loss by step, a panel a stage")


def reward_curves(records: list[dict]) -> str:
    """Rewards with bands and the health of every reinforcement stage, from metrics.jsonl."""
    out = []
    for stage in dict.fromkeys(r["stage"] for r in records if "invalid_share" in r):
        steps = [r for r in records if r["stage"] == stage and "invalid_share" in r]
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
            label = name.removeprefix("reward/")
            ax.plot(x, mean, ".-", color=colour, lw=1.3, ms=3, label=label)
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
                if any(name in r for r in steps):  # a gap where a step had none
                    values = [r.get(name, np.nan) for r in steps]
                    ax.plot(x, values, ".-", lw=1.3, ms=3, label=name.removeprefix("reward/"))
            if "share" in title:
                ax.set_ylim(0, max(0.1, ax.get_ylim()[1]))
            ax.set_title(title)
        for ax in axes.flat:
            ax.set_xlabel("step")
            ax.grid(alpha=0.3)
            if ax.lines:
                ax.legend(fontsize=8)
        fig.tight_layout()
        out.append(figure(fig, f"{stage}: rewards, reply length, entropy, KL and failures by step"))
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
        parts.append(figure(fig, f"Confusion matrix of {TASK_NAMES[task]}"))
    return "".join(parts)


def _short(label: str) -> str:
    return label if len(label) <= 24 else label[:22] + "…"


def reliability_figure(found: dict[str, dict]) -> str:
    """Accuracy against confidence, a panel a task; the size of a dot is the share of rows."""
    fig, axes = plt.subplots(1, len(found), figsize=(3.4 * len(found), 3.4), squeeze=False)
    for ax, (task, c) in zip(axes[0], found.items(), strict=True):
        x = [b["confidence"] for b in c["bins"]]
        y = [b["accuracy"] for b in c["bins"]]
        ax.plot([0, 100], [0, 100], color="#8496a8", lw=1, ls="--")
        ax.plot(x, y, color="#3b6ea5", lw=1)
        ax.scatter(x, y, s=[8 + 300 * b["n"] / c["n"] for b in c["bins"]], color="#3b6ea5")
        ax.set(xlim=(0, 103), ylim=(-3, 103), xlabel="confidence, %", ylabel="accuracy, %")
        ax.set_title(f"{TASK_NAMES[task]}: ECE {c['ece']:.1f}")
        ax.grid(alpha=0.3)
    fig.tight_layout()
    return figure(fig, "Reliability: accuracy by confidence")


def bars_figure(values: dict[str, dict[str, dict]], title: str, unit: str) -> str:
    """Bars with intervals: system -> group -> {"mean", "interval"}."""
    groups = list(dict.fromkeys(g for own in values.values() for g in own))
    fig, ax = plt.subplots(figsize=(1.2 + 1.35 * len(groups), 3.4))
    width = 0.8 / len(values)
    palette = ("#3b6ea5", "#c4602d", *COLOURS)
    for i, (system, own) in enumerate(values.items()):
        shown = [g for g in groups if own.get(g, {}).get("mean") is not None]
        if not shown:
            continue
        at = [groups.index(g) + (i + 0.5) * width - 0.4 for g in shown]
        mean = np.array([own[g]["mean"] for g in shown])
        ends = np.array([own[g]["interval"] for g in shown]).T
        spread = np.maximum([mean - ends[0], ends[1] - mean], 0)
        colour = palette[i % len(palette)]
        ax.bar(at, mean, width * 0.92, yerr=spread, capsize=2, color=colour, label=system)
    ax.set_xticks(range(len(groups)), groups)
    ax.set_ylim(1, 10)
    ax.set_ylabel(unit)
    ax.set_title(title)
    ax.grid(alpha=0.3, axis="y")
    if len(values) > 1:
        ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure(fig, title)
