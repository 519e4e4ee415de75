"""Runs a benchmark against a named peer and prints one JSON line.

    python tools/bench.py BENCHMARK [--rounds 5]

Ours and the peer run in turn; the peer has its own process, the only one with torch. Both are
warmed up alike, and medians over rounds are compared; "ratio" is the peer's time divided by ours.
Run it on otherwise idle cores: a busy second core slows torch down so much that the ratio means
nothing.

train_step         AdamW steps, against transformers + torch
grpo               whole GRPO steps, against TRL's GRPOTrainer
grpo_long_prompt   the same with prompts of 512 tokens and 8 samples each
generate           nucleus sampling, against transformers' generate
generate_mixed     prompts and replies of mixed lengths: the engine, against transformers' generate
                   in sorted batches; generate_mixed_continuous: against its continuous batching
mamba_LENGTH       Mamba forward and backward, against transformers (`pip install mambapy`)

Weights are random; all but mamba run a 12M-parameter Qwen2 (tools/benchmarks/).
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from mm_jax.run.host_memory import give_back_compiler_memory, keep_freed_memory

# Name -> (module of tools.benchmarks, keyword arguments of its `ours` and `peer`).
BENCHMARKS = {
    "train_step": ("train_step", {}),
    "grpo": ("grpo", dict(prompt=96, new=64, group=4)),
    "grpo_long_prompt": ("grpo", dict(prompt=512, new=32, group=8)),
    "generate": ("generate", {}),
    "generate_mixed": ("generate_mixed", dict(peer="static")),
    "generate_mixed_continuous": ("generate_mixed", dict(peer="continuous")),
    "mamba_256": ("mamba", dict(length=256)),
    "mamba_1024": ("mamba", dict(length=1024)),
    "mamba_4096": ("mamba", dict(length=4096)),
}


def serve_peer(name: str) -> None:
    """Runs one round of the peer per line on stdin, and prints what it returns."""
    answers, sys.stdout = sys.stdout, sys.stderr
    module, arguments = load(name)
    run = module.peer(**arguments)
    for _ in sys.stdin:
        print(json.dumps(run()), file=answers, flush=True)
    os._exit(0)  # TRL's thread still waits for its next step


def load(name: str):
    module, arguments = BENCHMARKS[name]
    return importlib.import_module(f"tools.benchmarks.{module}"), arguments


class Peer:
    """Runs rounds of the peer in another process."""

    def __init__(self, name: str):
        self.process = subprocess.Popen(
            [sys.executable, __file__, name, "--peer"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"},
        )

    def __call__(self) -> dict:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("the peer's process died; its messages are above")
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def compare(name: str, rounds: int) -> dict:
    """Runs both sides in turn; a run returns numbers about its round, such as "seconds/..."."""
    module, arguments = load(name)
    if module.TRAINING:
        keep_freed_memory()  # as the commands that train do
    give_back_compiler_memory()  # as all commands do
    peer, ours = Peer(name), module.ours(**arguments)
    for _ in range(2):
        peer(), ours()
    seconds, said = {"peer": [], "ours": []}, {"peer": [], "ours": []}
    for _ in range(rounds):
        for side, run in (("peer", peer), ("ours", ours)):
            start = time.perf_counter()
            said[side].append(run())
            seconds[side].append((time.perf_counter() - start) / module.STEPS)
    peer.close()
    import jax

    median = {side: statistics.median(t) for side, t in seconds.items()}
    return {
        "benchmark": name,
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "cores": len(os.sched_getaffinity(0)),
        "dtype": "float32",
        "shape": {**module.SHAPE, **arguments},
        "peer": module.PEER,
        "peer_seconds": [round(t, 4) for t in seconds["peer"]],
        "seconds": [round(t, 4) for t in seconds["ours"]],
        "peer_median": round(median["peer"], 4),
        "median": round(median["ours"], 4),
        "ratio": round(median["peer"] / median["ours"], 3),
        "medians": {
            side: {k: round(statistics.median(r[k] for r in rows), 4) for k in rows[0]}
            for side, rows in said.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("benchmark", choices=BENCHMARKS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        serve_peer(args.benchmark)
    else:
        print(json.dumps(compare(args.benchmark, args.rounds)))


if __name__ == "__main__":
    main()
