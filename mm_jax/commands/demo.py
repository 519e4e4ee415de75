"""demo: synthetic data, compressor, SFT, GRPO, prediction for every modality, report."""

from __future__ import annotations

import argparse
import itertools
import json
import pathlib
import shutil
import time

from mm_jax.__main__ import parse
from mm_jax.commands import evaluate, predict, prepare, train
from mm_jax.config.errors import require
from mm_jax.config.load import load_config
from mm_jax.data.prompts import MODALITIES
from mm_jax.rewards.stub import StubJudge
from mm_jax.run.folder import record_command

CONFIG = "configs/demo.py"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("demo"), help="folder (default: demo)"
    )
    parser.add_argument("--overwrite", action="store_true", help="delete an earlier demo there")
    parser.add_argument("--size", type=int, default=360, help="dialogues (default 360)")
    parser.set_defaults(config=CONFIG)


def main(args: argparse.Namespace, overrides: list[str]) -> None:
    """Every step is the command a user would type; each is printed before it runs."""
    out, run = args.out, args.out / "run"
    if args.overwrite and out.exists():
        require((out / "data").is_dir(), f"--overwrite: {out} holds no demo; not deleted")
        shutil.rmtree(out)
    require(not run.exists(), f"{run} exists; pass --overwrite to start anew")
    clock, times = time.perf_counter(), {}

    def step(name: str, command: str, *arguments: str) -> argparse.Namespace:
        times[name] = time.perf_counter()
        print(f"\n$ python -m mm_jax {' '.join((command, *arguments))}", flush=True)
        return parse([command, *arguments])[0]

    image = load_config(CONFIG).model.vision.image_size
    parsed = step(
        "data",
        "prepare",
        "--dataset=synthetic",
        f"--data_dir={out / 'data'}",
        f"--size={args.size}",
        "--num_frames=4",
        f"--image_size={image}",
    )
    folder = prepare.target_folder(parsed)
    if not folder.exists():
        prepare.prepare(parsed)
    parsed = step("training", "train", f"--config={CONFIG}", f"--workdir={run}")
    with StubJudge() as judge:
        print(f"trust rewards come from a stub judge with fixed rules at {judge.url}", flush=True)
        settings = [f"data.folder={folder}", f"reward.judge.base_url={judge.url}"]
        train.train(load_config(CONFIG, [*settings, *overrides]), parsed.workdir)
        record_command(run, parsed.argv)
    parsed = step("prediction", "predict", f"--checkpoint={run}", "--modality", *MODALITIES)
    predict.main(parsed, [])
    parsed = step("evaluation", "evaluate", f"--checkpoint={run}")
    evaluate.main(parsed, [])
    times["end"] = time.perf_counter()
    names = list(times)
    spent = {a: times[b] - times[a] for a, b in itertools.pairwise(names)}
    print("seconds: " + ", ".join(f"{k} {v:.0f}" for k, v in spent.items()))
    metrics = json.loads((run / "metrics.json").read_text())
    accuracy = {
        e["modality"]: e["standard"]["client_emotion"]["accuracy"] for e in metrics["systems"]
    }
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
    print(f"done in {(time.perf_counter() - clock) / 60:.1f} minutes; open {run / 'report.html'}")
