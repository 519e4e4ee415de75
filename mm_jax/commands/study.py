"""Measures what each modality and the history's labels are worth to a model (command `study`).

Predicts the labels of a split under every modality the model has and every regime of history
labels, and tests whether media are used by swapping them between samples. Writes study.json for the
report.
"""

from __future__ import annotations

import argparse
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
from mm_jax.data.answers import answer_tasks
from mm_jax.data.history import HISTORY_REGIMES
from mm_jax.data.records import Sample
from mm_jax.evaluation.analysis import row_scores, swap_test
from mm_jax.evaluation.metrics import percent
from mm_jax.evaluation.predictions import PredictionRow, predict_rows
from mm_jax.evaluation.report.findings import study as study_section
from mm_jax.evaluation.report.page import Page, as_text
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
    add("--swaps", type=int, default=3, help="other samples' media a sample is tried with; 0: none")


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
    tasks = answer_tasks(config.data.label_space)
    swappable = {
        "audio": [i for i, s in enumerate(samples) if audio and len(s.fbank)],
        "video": [i for i, s in enumerate(samples) if vision and len(s.frames)],
    }
    swappable = {name: index for name, index in swappable.items() if len(index) > 1}
    total = len(samples) * len(modalities) * len(regimes)
    total += args.swaps * sum(map(len, swappable.values()))
    matrix, full = [], None
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
                if modality == modalities[-1] and regime == regimes[0]:
                    full = rows
        swaps = {}
        if args.swaps:
            for name, index in swappable.items():
                own = [full[i] for i in index]
                chosen = [samples[i] for i in index]
                others = [
                    predict(swapped(chosen, name, step), modalities[-1], regimes[0])
                    for step in range(1, min(args.swaps, len(chosen) - 1) + 1)
                ]
                swaps[name] = {t: swap_tests(own, others, t) for t in tasks}
    refused = sum(r.outcome == "refused" for r in full)
    if refused:
        print(f"note: {refused} of {len(full)} samples are refused; they count as wrong")
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


def swapped(samples: Sequence[Sample], name: str, step: int) -> list[Sample]:
    """Gives every sample the sound or the video of another one, `step` places further in a random
    order; different steps (below the number of samples) give different ones."""
    order = np.random.default_rng(0).permutation(len(samples))
    giver = dict(zip(order, np.roll(order, step), strict=True))
    fields = ("fbank", "audio_status") if name == "audio" else ("frames", "video_status")
    return [
        dataclasses.replace(s, **{f: vars(samples[giver[i]])[f] for f in fields})
        for i, s in enumerate(samples)
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
