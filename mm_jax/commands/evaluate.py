"""Evaluates predictions: writes metrics.json, report.html and report.md (command `evaluate`)."""

from __future__ import annotations

import argparse
import pathlib

from mm_jax.evaluation.evaluate import evaluate
from mm_jax.evaluation.report import summary
from mm_jax.run.folder import recorded


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--checkpoint", required=True, type=pathlib.Path, help="run folder with predictions.jsonl")
    add("--predictions", type=pathlib.Path, help="default: CHECKPOINT/predictions.jsonl")
    add(
        "--others",
        type=pathlib.Path,
        nargs="*",
        help="predictions of other models, one row per file, named after it (default: "
        "CHECKPOINT/baselines/*.jsonl)",
    )
    add("--split", choices=("train", "val", "test"), default="test", help="what was predicted")
    add("--partial", action="store_true", help="allow predictions of a part of the split")
    add("--data", type=pathlib.Path, help="data set folder (default: the run's)")
    add(
        "--out",
        type=pathlib.Path,
        help="folder of metrics.json, report.html and report.md (default: CHECKPOINT, and "
        "CHECKPOINT/partial for a part of the split)",
    )
    add(
        "--probe",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="a linear probe of the run's released language model among the trivial systems "
        "(default: where the weights are local; its states are computed once and kept in "
        "CHECKPOINT)",
    )
    add(
        "--bertscore_model",
        default="",
        help="folder of BERTScore's model, named as bert-score knows it, such as .../roberta-large",
    )


def main(args: argparse.Namespace, overrides: list[str]) -> None:
    del overrides
    with recorded(args.checkpoint, args.argv):
        metrics, out = evaluate(
            args.checkpoint,
            args.predictions,
            args.split,
            args.data,
            args.out,
            args.bertscore_model,
            args.others,
            args.partial,
            args.probe,
        )
    print(summary(metrics))
    print(f"report: {out / 'report.html'}")
