"""Analyses scores further: calibration, slices, paired differences, swapped inputs."""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mm_jax.data.records import Sample
from mm_jax.evaluation.metrics import words
from mm_jax.evaluation.predictions import PredictionRow
from mm_jax.evaluation.scores import mean_interval, percent
from mm_jax.rewards.similarity import rouge_l

BINS = 10
FLIPS = 2000  # draws of the permutation test of a paired difference
SLICES_SHOWN = 12  # groups per dimension; the others are merged into one


def label_tasks(rows: Sequence[PredictionRow]) -> list[str]:
    return [task for task in rows[0].gold if task != "response"]


def row_scores(rows: Sequence[PredictionRow]) -> dict[str, np.ndarray]:
    """Scores every row: label task (right or wrong) and "rouge_l" -> float64[N] in [0, 1], NaN
    where a row has no gold value."""
    out = {
        task: np.array([r.right(task) for r in rows])
        for task in label_tasks(rows)
        if any(r.gold.get(task) for r in rows)
    }
    if any(r.gold.get("response") for r in rows):
        out["rouge_l"] = np.array([rouge_l(r.gold["response"], r.response) for r in rows])
    return out


def calibration(rows: Sequence[PredictionRow], task: str) -> dict | None:
    """Measures calibration; None where no row has label probabilities.

    ece: expected calibration error over 10 bins of equal width, percent (Naeini et al. 2015);
    brier: mean squared error of the whole distribution, 0 to 2; bins: n, confidence and accuracy in
    percent of every bin that holds rows.
    """
    scored = [r for r in rows if r.distribution(task) and r.gold.get(task)]
    if not scored:
        return None
    confidence = np.array([max(r.distribution(task).values()) for r in scored])
    right = np.array([r.right(task) for r in scored])
    brier = [
        sum((p - (label == r.gold[task])) ** 2 for label, p in r.distribution(task).items())
        for r in scored
    ]
    place = np.minimum((confidence * BINS).astype(int), BINS - 1)
    bins, ece = [], 0.0
    for i in range(BINS):
        inside = place == i
        if inside.any():
            sure, hit = confidence[inside].mean(), right[inside].mean()
            ece += inside.mean() * abs(sure - hit)
            bins.append(
                {"n": int(inside.sum()), "confidence": 100 * float(sure), "accuracy": 100 * hit}
            )
    return {"n": len(scored), "ece": 100 * ece, "brier": float(np.mean(brier)), "bins": bins}


def length_group(count: int, edges: Sequence[int]) -> str:
    """Names the range between two edges that holds `count`, such as "0-5"."""
    low = 0
    for edge in edges:
        if count <= edge:
            return f"{low}-{edge}" if low < edge else str(edge)
        low = edge + 1
    return f"{low} or more"


# Dimension -> the group of a row; "" leaves the row out. A row's labels are dimensions too.
SLICES: dict[str, Callable[[PredictionRow, Sample], str]] = {
    "problem type": lambda row, sample: sample.problem_type,
    "history, utterances": lambda row, sample: length_group(len(sample.history), (0, 10, 20, 30)),
    "gold reply, words": lambda row, sample: (
        length_group(len(words(sample.response)), (5, 15, 30)) if sample.response else ""
    ),
    "what reached the model": lambda row, sample: row.modality,
}


def slices(
    rows: Sequence[PredictionRow], samples: Mapping[str, Sample]
) -> dict[str, dict[str, dict]]:
    """Averages scores by group: dimension -> group -> {"n", score name -> `percent`}.

    Dimensions in which all rows are alike are left out; groups beyond the largest 12 are merged
    into "(others)".
    """
    scores = row_scores(rows)
    out: dict[str, dict[str, dict]] = {}
    tasks = {task.replace("_", " "): task for task in label_tasks(rows)}
    for dimension in (*tasks, *SLICES):
        if dimension in tasks:
            groups = [r.gold.get(tasks[dimension], "") for r in rows]
        else:
            groups = [SLICES[dimension](r, samples[r.id]) for r in rows]
        counts = collections.Counter(g for g in groups if g)
        if len(counts) < 2:
            continue
        kept = [g for g, _ in counts.most_common(SLICES_SHOWN)]
        names = np.array([g if g in kept or not g else "(others)" for g in groups])
        order = kept if dimension in tasks else sorted(kept, key=_natural)
        out[dimension] = {
            g: {
                "n": int((names == g).sum()),
                **{name: percent(values[names == g]) for name, values in scores.items()},
            }
            for g in [*order, "(others)"]
            if (names == g).any()
        }
    return out


def _natural(group: str) -> tuple[int, str]:
    head = group.split("-")[0].split(" ")[0]
    return (int(head) if head.isdigit() else 0, group)


def paired_difference(a: np.ndarray, b: np.ndarray, seed: int = 0) -> dict | None:
    """Averages a - b over the same rows: "n", "difference", its bootstrap 95 % "interval", and "p".

    p is two-sided, of a permutation test (the signs of 2,000 draws flipped at random; exact for few
    rows). None where no row has both.
    """
    d = a - b
    d = d[~np.isnan(d)]
    if not len(d):
        return None
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(FLIPS, len(d)))
    as_large = np.abs(signs @ d) >= abs(d.sum()) - 1e-9
    return {
        "n": len(d),
        "difference": float(d.mean()),
        "interval": list(mean_interval(d, seed)),
        "p": float((as_large.sum() + 1) / (FLIPS + 1)),
    }


def compare_systems(
    main: Sequence[PredictionRow], others: Mapping[str, Sequence[PredictionRow]]
) -> dict[str, dict[str, dict]]:
    """Compares `main` with every other system on the rows both have: system -> score name ->
    `paired_difference` in points. Scores that a system does not predict are left out."""
    own = row_scores(main)
    place = {row.id: i for i, row in enumerate(main)}
    out = {}
    for name, rows in others.items():
        both = [(place[r.id], i) for i, r in enumerate(rows) if r.id in place]
        if not both:
            continue
        mine, theirs = np.array(both).T
        found = {
            score: paired_difference(own[score][mine], values[theirs])
            for score, values in row_scores(rows).items()
            if score in own
        }
        out[name] = {score: _points(value) for score, value in found.items() if value}
    return out


def _points(found: dict) -> dict:
    """Turns a `paired_difference` of shares into percentage points."""
    points = {
        "difference": 100 * found["difference"],
        "interval": [100 * x for x in found["interval"]],
    }
    return {**found, **points}


def swap_test(own: np.ndarray, swapped: np.ndarray, seed: int = 0, draws: int = 10_000) -> dict:
    """Tests whether a sample's own input scores better than other samples' (permutation test).

    own float[N], swapped float[R, N]: a score of every sample with its own input, and with the
    inputs of R other samples. If the input is not used, all R + 1 scores of a sample are
    exchangeable; "p" is the share of draws (choosing which score counts as its own) whose mean gain
    is at least the observed one. "gain": mean of own minus mean of swapped.
    """
    values = np.concatenate([own[None], swapped])  # [R + 1, N]
    ways, n = values.shape
    gains = (values * ways - values.sum(axis=0)) / (ways - 1)  # with each as its own
    observed = float(gains[0].mean())
    rng, at_least = np.random.default_rng(seed), 0
    for _ in range(draws):
        at_least += gains[rng.integers(ways, size=n), np.arange(n)].mean() >= observed - 1e-12
    return {"n": n, "gain": observed, "p": (at_least + 1) / (draws + 1), "swaps": ways - 1}
