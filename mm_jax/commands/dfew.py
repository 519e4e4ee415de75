"""Runs DFEW's five-fold protocol: prepares, trains, predicts and evaluates each fold (`dfew`).

Finished folds are kept, so it can be started again. Writes WORKDIR/foldN/ and a summary with UAR
and WAR of every fold, their means, and the recalls next to the paper's Table 3.
"""

from __future__ import annotations

import argparse
import json
import pathlib

import numpy as np

from mm_jax.config.errors import require
from mm_jax.config.files import write_whole
from mm_jax.config.load import load_config, resolve
from mm_jax.data.datasets.request import DataRequest
from mm_jax.data.labels import built_in
from mm_jax.evaluation import paper
from mm_jax.evaluation.predictions import read_predictions
from mm_jax.evaluation.report.page import Note, Page, write_pages
from mm_jax.evaluation.report.sections import PAPER_DFEW
from mm_jax.evaluation.report.tables import Table, number, spread
from mm_jax.evaluation.scores import read_metrics
from mm_jax.run.folder import read_stages

FOLDS = range(1, 6)
EMOTION = built_in("dfew").tasks[0]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--config", default="configs/dfew.py", help="default: configs/dfew.py")
    add("--raw", required=True, type=pathlib.Path, help="the data set's files (see `prepare`)")
    add("--data_dir", type=pathlib.Path, default=pathlib.Path("data"), help="default: data")
    add("--workdir", required=True, type=pathlib.Path, help="folder of the folds' runs")
    add("--folds", type=int, nargs="+", choices=FOLDS, default=list(FOLDS), help="default: all")
    add("--num_frames", type=int, default=8, help="frames per clip (default 8)")
    add("--modality", default="av", choices=("a", "v", "av"), help="default: av")


def main(args: argparse.Namespace, overrides: list[str]) -> None:
    config = resolve(load_config(args.config, overrides))
    require(
        config.data.label_space in ("", "dfew"),
        f"--config: expected data.label_space dfew or none, got {config.data.label_space!r}",
    )
    image = config.model.vision.image_size if "vision" in config.model.parts else 384
    folders = {}
    for fold in args.folds:  # all of them before anything is trained
        data = DataRequest(
            "dfew", args.data_dir, args.raw, fold=fold, num_frames=args.num_frames, image_size=image
        )
        folders[fold] = data.folder
        if not data.folder.exists():
            print(f"fold {fold}: {data.folder}", flush=True)
            sizes = (f"--num_frames={args.num_frames}", f"--image_size={image}")
            where = (f"--raw={args.raw}", f"--data_dir={args.data_dir}", f"--fold={fold}")
            args.run(["prepare", "--dataset=dfew", *where, *sizes])
    for fold, folder in folders.items():
        run = args.workdir / f"fold{fold}"
        print(f"fold {fold}: {run}", flush=True)
        training = bool(set(config.stages) - set(read_stages(run)))
        if training:
            more = [f"--config.{x}" for x in (*overrides, f"data.folder={folder}")]
            more += ["--resume"] if run.exists() else []
            args.run(["train", f"--config={args.config}", f"--workdir={run}", *more])
        if training or predicted_modality(run) != args.modality:
            args.run(["predict", f"--checkpoint={run}", f"--modality={args.modality}"])
        args.run(["evaluate", f"--checkpoint={run}"])
    summarise(args.workdir, args.folds)


def predicted_modality(run: pathlib.Path) -> str:
    """Returns the modality of the predictions in a fold's folder ("": there are none)."""
    path = run / "predictions.jsonl"
    return read_predictions(path)[0].modality_asked if path.is_file() else ""


def summarise(workdir: pathlib.Path, folds: list[int]) -> None:
    """Writes the folds' metrics to dfew.json, dfew.html and dfew.md."""
    found = {}
    for fold in folds:
        metrics = read_metrics(workdir / f"fold{fold}" / "metrics.json")
        own = metrics.main.standard.tasks[EMOTION.name]
        found[fold] = own.model_dump(include={"n", "accuracy", "interval", "uar", "recall"})
    mean = {
        "war": float(np.mean([f["accuracy"] for f in found.values()])),
        "uar": float(np.mean([f["uar"] for f in found.values()])),
        "recall": {
            label: mean_known([f["recall"][label] for f in found.values()])
            for label in EMOTION.labels
        },
    }

    def recalls(values: dict) -> list[str]:
        return [number(values[label], 1) for label in EMOTION.labels]

    rows: list[list[str] | str] = [
        [
            f"fold {fold}",
            str(f["n"]),
            number(f["uar"]),
            f"{f['accuracy']:.2f} ({spread(f['interval'])})",
            *recalls(f["recall"]),
        ]
        for fold, f in found.items()
    ]
    name = f"mean of {len(found)} folds"
    rows.append([name, "", number(mean["uar"]), number(mean["war"]), *recalls(mean["recall"])])
    best = [len(rows) - 1]
    rows.append(PAPER_DFEW)
    for system, (published, uar, war) in paper.DFEW.items():
        cells = map(number, published or [None] * len(EMOTION.labels))
        rows.append([system, "–", number(uar), number(war), *cells])
    parts = [
        Table(["", "n", "UAR", "WAR", *EMOTION.labels], rows, best),
        "UAR: mean recall over the labels that occur in a fold; WAR: accuracy (bootstrap 95 % "
        "interval); recall of every label. An unparseable answer is wrong.",
    ]
    if len(found) < len(FOLDS):
        parts.append(Note(f"Only folds {', '.join(map(str, found))}.", "warning"))
    write_whole(
        workdir / "dfew.json",
        json.dumps({"schema": "mm_jax.dfew/1", "folds": found, "mean": mean}, indent=1),
    )
    print(write_pages(workdir / "dfew", Page("DFEW, five-fold protocol", parts, [])))


def mean_known(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else None
