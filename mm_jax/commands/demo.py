"""Runs the whole chain on synthetic data: compressor, SFT, GRPO, predictions, report (`demo`)."""

from __future__ import annotations

import argparse
import itertools
import json
import pathlib
import shutil
import sys
import time

from mm_jax.config.errors import require
from mm_jax.config.load import load_config
from mm_jax.data.datasets.request import DataRequest
from mm_jax.data.prompts import MODALITIES
from mm_jax.data.records import CLIENT_EMOTION
from mm_jax.evaluation.scores import read_metrics
from mm_jax.rewards.stub import StubJudge

CONFIG = "configs/demo.py"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("demo"), help="folder (default: demo)"
    )
    parser.add_argument("--overwrite", action="store_true", help="delete an earlier demo there")
    parser.add_argument("--size", type=int, default=360, help="dialogues (default 360)")
    parser.set_defaults(config=CONFIG)


def main(args: argparse.Namespace, overrides: list[str]) -> None:
    """Runs the commands a user would type; each is printed before it runs."""
    out, run = args.out, args.out / "run"
    if args.overwrite and out.exists():
        require((out / "data").is_dir(), f"--overwrite: {out} holds no demo; not deleted")
        shutil.rmtree(out)
    require(not run.exists(), f"{run} exists; pass --overwrite to start again")
    times = {}

    def step(name: str, *command: str) -> None:
        times[name] = time.perf_counter()
        print(f"\n$ python -m mm_jax {' '.join(command)}", flush=True)
        args.run(list(command))

    image = load_config(CONFIG).model.vision.image_size
    data = DataRequest("synthetic", out / "data", num_frames=4, image_size=image, size=args.size)
    if not data.folder.exists():
        sizes = (f"--size={args.size}", "--num_frames=4", f"--image_size={image}")
        step("data", "prepare", "--dataset=synthetic", f"--data_dir={data.data_dir}", *sizes)
    with StubJudge() as judge:
        print(f"trust rewards come from a stub judge with fixed rules at {judge.url}", flush=True)
        settings = [f"data.folder={data.folder}", f"reward.judge.base_url={judge.url}", *overrides]
        more = [f"--config.{setting}" for setting in settings]
        step("training", "train", f"--config={CONFIG}", f"--workdir={run}", *more)
    step("prediction", "predict", f"--checkpoint={run}", "--modality", *MODALITIES)
    step("evaluation", "evaluate", f"--checkpoint={run}")
    times["end"] = time.perf_counter()
    spent = {a: times[b] - times[a] for a, b in itertools.pairwise(times)}
    print("seconds: " + ", ".join(f"{k} {v:.0f}" for k, v in spent.items()))
    summarise(run)
    minutes = sum(spent.values()) / 60
    print(f"done in {minutes:.1f} minutes; open {run / 'report.html'}")
    print("talk to it, in the terminal or in a browser (with camera and microphone):")
    for command in ("chat", "serve"):
        print(f"  {sys.executable} -m mm_jax {command} --checkpoint {run}")


def summarise(run: pathlib.Path) -> None:
    """Prints what the modalities and the reinforcement are worth."""
    systems = read_metrics(run / "metrics.json").systems
    accuracy = {s.modality: s.standard.tasks[CLIENT_EMOTION].accuracy for s in systems}
    print(
        f"T1 accuracy: text only {accuracy['text']:.1f}, with audio {accuracy['a']:.1f}, with "
        f"video {accuracy['v']:.1f}, with both {accuracy['av']:.1f}"
    )
    with open(run / "metrics.jsonl", encoding="utf-8") as file:
        val = [r for r in map(json.loads, file) if "val_reward" in r]
    last = val[-1]
    print(
        f"mean reward on val prompts: {val[0]['val_reward']:.3f} before GRPO, "
        f"{last['val_reward']:.3f} after it; gain {last['val_gain']:+.3f} (95 % interval "
        f"{last['val_gain_low']:+.3f} to {last['val_gain_high']:+.3f})"
    )
