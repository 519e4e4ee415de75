"""Measures what each modality and the history's labels are worth to a model (command `study`).

Predicts the labels of a split under every modality the model has and every regime of history
labels, and tests whether media and histories are used by swapping them between dialogues. Writes
study.json for the report.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import pathlib
from collections.abc import Sequence

import numpy as np
import tqdm

from mm_jax.commands.arguments import (
    SPLITS,
    add_run_arguments,
    open_run,
    split_samples,
)
from mm_jax.config.errors import require
from mm_jax.config.files import write_whole
from mm_jax.data.history import HISTORY_REGIMES
from mm_jax.data.records import Sample
from mm_jax.evaluation.analysis import row_scores, swap_test
from mm_jax.evaluation.predictions import PredictionRow, predict_rows
from mm_jax.evaluation.report.findings import study as study_section
from mm_jax.evaluation.report.page import Page, as_text
from mm_jax.evaluation.scores import percent
from mm_jax.generation.predictor import predictor_of
from mm_jax.run.folder import record_command

SCHEMA = "mm_jax.study/1"
SMALLEST = 1e-6  # predictions hold six digits of a probability


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_run_arguments(parser)
    add("--split", choices=SPLITS, default="test")
    add("--data", type=pathlib.Path, help="data set folder (default: the run's)")
    add("--limit", type=int, help="only the first N samples")
    add(
        "--swaps",
        type=int,
        default=3,
        help="other dialogues' inputs a sample is tried with; 0: none",
    )


def main(args: argparse.Namespace, overrides: list[str]) -> None:
    require(args.limit is None or args.limit > 1, "--limit: expected at least 2")
    require(args.swaps >= 0, f"--swaps: expected at least 0, got {args.swaps}")
    run, _, params = open_run(args.checkpoint, args.stage, args.step, overrides)
    config = run.config
    samples = split_samples(run, args.data, args.split, args.limit)
    predictor = predictor_of(run)
    parts = set(config.model.parts)
    audio, vision = "audio" in parts, "vision" in parts
    modalities = ["text", *["a"] * audio, *["v"] * vision, *["av"] * (audio and vision)]
    reads_history = "compressor" in parts or config.data.history == "text"
    reads_history = reads_history and any(s.history for s in samples)
    regimes = HISTORY_REGIMES if reads_history else ("none",)
    tasks = run.prompter.label_space.names
    every = range(len(samples))
    swappable = {  # what is swapped -> where there is one, and the regime it is seen in
        "audio": ([i for i in every if audio and len(samples[i].fbank)], regimes[0]),
        "video": ([i for i in every if vision and len(samples[i].frames)], regimes[0]),
    }
    if reads_history:
        index = [i for i in every if samples[i].history]
        swappable |= {"history": (index, "gold"), "history without labels": (index, "none")}
    givers = {name: other_dialogues(samples, i, args.swaps) for name, (i, _) in swappable.items()}
    total = len(samples) * len(modalities) * len(regimes) + sum(g.size for g in givers.values())
    matrix, full = [], {}
    with tqdm.tqdm(total=total, desc="study") as bar:

        def predict(chosen: Sequence[Sample], modality: str, regime: str) -> list[PredictionRow]:
            return predict_rows(
                predictor, params, chosen, modality, regime, respond=False, progress=bar.update
            )

        for modality in modalities:
            for regime in regimes:
                rows = predict(samples, modality, regime)
                scores = row_scores(rows)
                cell = {"modality": modality, "history_labels": regime}
                matrix.append(cell | {task: percent(scores[task]) for task in tasks})
                if modality == modalities[-1]:
                    full[regime] = rows
        swaps = {}
        for name, (index, regime) in swappable.items():
            others = [
                predict(swapped(samples, name.split()[0], index, row), modalities[-1], regime)
                for row in givers[name]
            ]
            if others:
                own = [full[regime][i] for i in index]
                swaps[name] = {t: swap_tests(own, others, t) for t in tasks}
    for name, rows in givers.items():
        if swappable[name][0] and len(rows) < args.swaps:
            print(f"note: {name}: swapped {len(rows)} times, too few dialogues for {args.swaps}")
    refused = sum(r.outcome == "refused" for r in full[regimes[0]])
    if refused:
        print(f"note: {refused} of {len(samples)} samples are refused; they count as wrong")
    found = {
        "schema": SCHEMA,
        "split": args.split,
        "n": len(samples),
        "tasks": list(tasks),
        "matrix": matrix,
        "swaps": swaps,
    }
    out = args.checkpoint / "study.json"
    write_whole(out, json.dumps(found, indent=1, allow_nan=False))
    record_command(args.checkpoint, args.argv)
    print(as_text(Page("", [], [study_section(found)])))
    print(f"study in {out}; `evaluate` puts it into the report")


FIELDS = {
    "audio": ("fbank", "audio_status"),
    "video": ("frames", "video_status"),
    "history": ("history",),
}


def other_dialogues(samples: Sequence[Sample], index: Sequence[int], swaps: int) -> np.ndarray:
    """Chooses who gives each of the samples `index` its swapped input: int[R, N], R <= swaps.

    Dialogues stand in a random order, the samples of each together; a giver stands further by a
    multiple of the longest dialogue, so that it is of another one. No two rows name the same giver
    for a sample, and every sample gives once in each. R is 0 where all is one dialogue.
    """
    names = [samples[i].dialogue_id for i in index]
    longest = max(collections.Counter(names).values(), default=1)
    rank = {name: n for n, name in enumerate(dict.fromkeys(names))}
    place = np.random.default_rng(0).permutation(len(rank))
    order = sorted(range(len(names)), key=lambda i: place[rank[names[i]]])
    rows = np.empty((max(0, min(swaps, len(names) // longest - 1)), len(names)), int)
    for step, row in enumerate(rows, 1):
        row[order] = np.asarray(index)[np.roll(order, -step * longest)]
    return rows


def swapped(
    samples: Sequence[Sample], name: str, index: Sequence[int], givers: Sequence[int]
) -> list[Sample]:
    """Gives the samples `index` the sound, video or history (`name`) of others."""
    return [
        dataclasses.replace(samples[i], **{f: vars(samples[g])[f] for f in FIELDS[name]})
        for i, g in zip(index, givers, strict=True)
    ]


def swap_tests(
    own: Sequence[PredictionRow], others: Sequence[Sequence[PredictionRow]], task: str
) -> dict[str, dict]:
    """Runs `swap_test` on the log-probability of the gold label and on the accuracy."""

    def log_probability(row: PredictionRow) -> float:
        # Refused rows have no probability.
        return np.log(max(row.distribution(task).get(row.gold[task], 0.0), SMALLEST))

    def scores(rows: Sequence[PredictionRow], score) -> np.ndarray:
        return np.array([score(r) for r in rows if r.gold[task]])

    kinds = {"log-probability": log_probability, "accuracy": lambda row: row.right(task)}
    return {
        what: swap_test(scores(own, score), np.stack([scores(rows, score) for rows in others]))
        for what, score in kinds.items()
    }
