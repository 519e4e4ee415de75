"""Draws the plots of a report as inline PNGs, each for light and for dark pages."""

from __future__ import annotations

import base64
import functools
import io
import re
from collections.abc import Callable, Mapping, Sequence

import matplotlib
from markupsafe import Markup

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from PIL import Image

from mm_jax.evaluation.scores import Standard, TaskMetrics


def scheme(page: str, ink: str, soft: str, colours: str) -> dict:
    """Returns matplotlib settings for a page's colours; lines and bars take C0, C1, ..."""
    inks = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.titlecolor")
    pages = ("figure.facecolor", "axes.facecolor", "legend.facecolor")
    softs = ("legend.edgecolor", "axes.edgecolor", "grid.color")
    off = ("axes.spines.top", "axes.spines.right", "text.parse_math")  # names may hold a $
    colour = {
        **dict.fromkeys(pages, page),
        **dict.fromkeys(inks, ink),
        **dict.fromkeys(softs, soft),
    }
    form = {"grid.alpha": 0.3, "axes.axisbelow": True, **dict.fromkeys(off, False)}
    return {**colour, **form, "axes.prop_cycle": plt.cycler(color=colours.split())}


# Blue, orange, green, violet, yellow, grey; page, ink and soft are those of page.html.
LIGHT = scheme("#ffffff", "#1c2733", "#8496a8", "#3b6ea5 #c4602d #4a9a5b #8d5ba8 #c9a227 #7d8893")
DARK = scheme("#12181f", "#dfe6ee", "#5d6f82", "#7fb2e5 #f0935f #7fcf92 #c79be0 #e6c65a #8b98a5")
GREY = "C5"
MOST_COLUMNS = 3  # panels next to each other


def data_url(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def for_both_schemes(
    draw: Callable[..., tuple[plt.Figure, str] | None],
) -> Callable[..., Markup | None]:
    """Wraps a function that returns (figure, alt text), or None, into one that returns HTML."""

    @functools.wraps(draw)
    def drawn(*args) -> Markup | None:
        sources = []
        for settings in (LIGHT, DARK):
            with plt.rc_context(settings):
                if (found := draw(*args)) is None:
                    return None
                fig, alt = found
                image = io.BytesIO()
                fig.savefig(image, dpi=110, bbox_inches="tight")
                plt.close(fig)
            small = io.BytesIO()  # 128 colours are a third of the bytes
            Image.open(image).convert("RGB").quantize(128).save(small, "PNG", optimize=True)
            sources.append(data_url(small.getvalue(), "png"))
        return Markup(
            '<picture><source media="screen and (prefers-color-scheme: dark)" srcset="{dark}">'
            '<img alt="{alt}" src="{light}"></picture>'
        ).format(light=sources[0], dark=sources[1], alt=alt)

    return drawn


def thumbnails(frames: np.ndarray, count: int = 4) -> list[str]:
    """Encodes up to `count` frames of uint8[F, S, S, 3] as the sources of small images."""
    if not len(frames):
        return []
    out = []
    for i in np.unique(np.linspace(0, len(frames) - 1, count).round().astype(int)):
        buffer = io.BytesIO()
        Image.fromarray(frames[i]).resize((96, 96)).save(buffer, "JPEG", quality=80)
        out.append(data_url(buffer.getvalue(), "jpeg"))
    return out


@for_both_schemes
def overview_figure(
    systems: Mapping[str, tuple[str, Mapping[str, TaskMetrics]]], titles: Mapping[str, str]
):
    """Plots the accuracy of every task: system -> (colour, task -> metrics)."""
    tasks = [t for t in titles if any(t in own for _, own in systems.values())]
    columns = min(len(tasks), MOST_COLUMNS)
    lines = -(-len(tasks) // columns)
    size = (2.2 + 2.6 * columns, 0.4 + (0.4 + 0.36 * len(systems)) * lines)
    shape = dict(figsize=size, squeeze=False, sharey=True, layout="constrained")
    fig, axes = plt.subplots(lines, columns, **shape)
    for ax in axes.flat[len(tasks) :]:
        ax.set_visible(False)
    for ax, task in zip(axes.flat, tasks, strict=False):
        for place, (colour, own) in enumerate(systems.values()):
            if task in own:
                mean, (low, high) = own[task].accuracy, own[task].interval
                ax.barh(place, mean, color=colour, height=0.72)
                ax.plot([low, high], [place, place], "|-", color=plt.rcParams["text.color"], lw=1)
                ax.text(high + 2, place, f"{mean:.1f}", va="center", fontsize=9)
        ax.set(xlim=(0, 118), xticks=[0, 50, 100])
        ax.set_title(titles[task], fontsize=11)
        ax.grid(axis="x")
    axes[0][0].set_yticks(range(len(systems)), list(systems))
    axes[0][0].invert_yaxis()  # of all, which share it
    fig.supxlabel("accuracy, %, with 95 % interval", fontsize=9)
    return fig, "Accuracy of the systems with 95 % intervals"


@for_both_schemes
def loss_curves(records: Sequence[dict]):
    """Plots training and validation loss of every supervised stage, from metrics.jsonl."""
    policy = {r["stage"] for r in records if "invalid_share" in r}
    stages = [s for s in dict.fromkeys(r["stage"] for r in records) if s not in policy]
    if not stages:
        return None
    fig, axes = plt.subplots(1, len(stages), figsize=(4.6 * len(stages), 3.2), squeeze=False)
    for ax, stage in zip(axes[0], stages, strict=True):
        for name, key, form in (("train", "loss", "C0-"), ("val", "val_loss", "C1o-")):
            own = [(r["step"], r[key]) for r in records if r["stage"] == stage and key in r]
            if own:
                ax.plot(*zip(*own, strict=True), form, lw=1.3, ms=4, label=name)
        ax.set(title=stage, xlabel="step", ylabel="loss (nats per target token)")
        ax.grid()
        ax.legend()
    fig.tight_layout()
    return fig, "Training and validation loss by step, one panel per stage"


def reward_curves(records: Sequence[dict]) -> list[Markup]:
    """Plots rewards with bands and the health of every reinforcement stage, from metrics.jsonl."""
    stages = dict.fromkeys(r["stage"] for r in records if "invalid_share" in r)
    return [_reward_curves([r for r in records if r["stage"] == s], s) for s in stages]


@for_both_schemes
def _reward_curves(records: Sequence[dict], stage: str):
    steps = [r for r in records if "invalid_share" in r]
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
    for name, colour in zip(["reward", *components], ["C0", "C2", "C3", "C4", GREY], strict=False):
        spread = "reward_group_std" if name == "reward" else f"{name}_std"
        # A step whose scores all failed leaves a gap.
        mean, band = (np.array([r.get(k, np.nan) for r in steps]) for k in (name, spread))
        label = name.removeprefix("reward/")
        ax.plot(x, mean, ".-", color=colour, lw=1.3, ms=3, label=label)
        ax.fill_between(x, mean - band, mean + band, color=colour, alpha=0.12)
    val = [r for r in records if "val_reward" in r]
    if val:
        at, mean, low, high = (
            np.array([r[k] for r in val])
            for k in ("step", "val_reward", "val_reward_low", "val_reward_high")
        )
        style = dict(fmt="o-", color="C1", ms=4, capsize=3, label="val, 95 %")
        ax.errorbar(at, mean, [mean - low, high - mean], **style)
    ax.set_title(f"{stage}: rewards (band: standard deviation)")
    for ax, (title, names) in zip(axes.flat[1:], panels.items(), strict=True):
        for name in names:
            if any(name in r for r in steps):  # a step without a value leaves a gap
                values = [r.get(name, np.nan) for r in steps]
                ax.plot(x, values, ".-", lw=1.3, ms=3, label=name.removeprefix("reward/"))
        if "share" in title:
            ax.set_ylim(0, max(0.1, ax.get_ylim()[1]))
        ax.set_title(title)
    for ax in axes.flat:
        ax.set_xlabel("step")
        ax.grid()
        if ax.lines:
            ax.legend(fontsize=8)
    fig.tight_layout()
    return fig, f"{stage}: rewards, reply length, entropy, KL and failures by step"


def confusion_figures(scores: Standard, titles: Mapping[str, str]) -> list[Markup]:
    """Plots the row-normalised confusion matrices of one system."""
    return [_confusion_figure(m, titles[t]) for t, m in scores.tasks.items()]


@for_both_schemes
def _confusion_figure(m: TaskMetrics, title: str):
    counts = np.array(m.confusion, float)
    rows = counts.sum(axis=1) > 0
    columns = rows | (counts.sum(axis=0) > 0)
    labels = np.array([x if len(x) <= 24 else x[:22] + "…" for x in m.labels])
    counts = counts[rows][:, columns]
    share = counts / counts.sum(axis=1, keepdims=True)
    size = (0.5 * max(counts.shape) + 3, 0.42 * counts.shape[0] + 1.8)
    fig, ax = plt.subplots(figsize=size)
    page, ink = plt.rcParams["axes.facecolor"], plt.rcParams["text.color"]
    shades = LinearSegmentedColormap.from_list("shades", [page, "C0"])
    ax.imshow(share, cmap=shades, vmin=0, vmax=1, aspect="auto")
    ax.set_xticks(range(counts.shape[1]), labels[columns], rotation=40, ha="right")
    ax.set_yticks(range(counts.shape[0]), labels[rows])
    for (i, j), value in np.ndenumerate(counts):
        if value:
            style = dict(ha="center", va="center", fontsize=8)
            ax.text(j, i, f"{value:.0f}", color=page if share[i, j] > 0.55 else ink, **style)
    ax.set(xlabel="predicted", ylabel="gold")
    ax.set_title(f"{title}: accuracy {m.accuracy:.1f}")
    return fig, f"Confusion matrix of {title}"


@for_both_schemes
def reliability_figure(found: Mapping[str, dict], titles: Mapping[str, str]):
    """Plots accuracy against confidence, one panel per task; a dot's size is its share of rows."""
    columns = min(len(found), MOST_COLUMNS)
    lines = -(-len(found) // columns)
    size = (3.4 * columns, 3.4 * lines)
    fig, axes = plt.subplots(lines, columns, figsize=size, squeeze=False)
    for ax in axes.flat[len(found) :]:
        ax.set_visible(False)
    for ax, (task, c) in zip(axes.flat, found.items(), strict=False):
        x = [b["confidence"] for b in c["bins"]]
        y = [b["accuracy"] for b in c["bins"]]
        ax.plot([0, 100], [0, 100], color=GREY, lw=1, ls="--")
        ax.plot(x, y, color="C0", lw=1)
        ax.scatter(x, y, s=[8 + 300 * b["n"] / c["n"] for b in c["bins"]], color="C0")
        ax.set(xlim=(0, 103), ylim=(-3, 103), xlabel="confidence, %", ylabel="accuracy, %")
        ax.set_title(f"{titles[task]}: ECE {c['ece']:.1f}")
        ax.grid()
    fig.tight_layout()
    return fig, "Reliability: accuracy by confidence"


@for_both_schemes
def ratings_figure(values: Mapping[str, Mapping[str, dict]], title: str):
    """Plots bars with intervals: system -> dimension -> {"mean", "interval"}."""
    groups = list(dict.fromkeys(g for own in values.values() for g in own))
    fig, ax = plt.subplots(figsize=(1.2 + 1.35 * len(groups), 3.4))
    width = 0.8 / len(values)
    for i, (system, own) in enumerate(values.items()):
        shown = [g for g in groups if own[g]["mean"] is not None]
        if shown:
            at = [groups.index(g) + (i + 0.5) * width - 0.4 for g in shown]
            mean = np.array([own[g]["mean"] for g in shown])
            ends = np.array([own[g]["interval"] for g in shown]).T
            error = np.maximum([mean - ends[0], ends[1] - mean], 0)
            style = dict(color=f"C{i % 6}", ecolor=plt.rcParams["text.color"], capsize=2)
            ax.bar(at, mean, width * 0.92, yerr=error, label=system, **style)
    ax.set_xticks(range(len(groups)), groups)
    ax.set_ylim(1, 10)
    ax.set(title=title, ylabel="rating, 1 to 10")
    ax.grid(axis="y")
    if len(values) > 1:
        ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return fig, title
