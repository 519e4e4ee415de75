"""Benchmarks against a named peer: one command, one JSON line.

    python tools/bench.py train_step [--rounds 5]

train_step: AdamW steps of a 12M-parameter Qwen2 (vocabulary 8192, hidden 256, 8 layers, 4/2 heads,
MLP 1024; batch 4 x 512, float32, clipping at 1.0) against transformers + torch on two threads.
Ours is the step of `train`, with its metrics. Peer and ours alternate, torch lives in the peer's
process alone, both are warmed up alike; the medians over rounds are compared. Run it on otherwise
idle cores.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SIZE = dict(
    vocab_size=8192,
    hidden_size=256,
    intermediate_size=1024,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=2048,
    tie_word_embeddings=False,
)
BATCH, LENGTH, STEPS = 4, 512, 3  # STEPS of a round


def tokens():
    import numpy as np

    return np.random.default_rng(0).integers(0, SIZE["vocab_size"], (BATCH, LENGTH))


def our_step():
    """A function that runs STEPS training steps and returns their last loss."""
    import jax
    import numpy as np

    from configs.base import stage
    from mm_jax.data.batch import Batch
    from mm_jax.models.multimood import MultiMood, MultiMoodConfig
    from mm_jax.models.qwen2 import Qwen2Config
    from mm_jax.training import state
    from mm_jax.training.sharding import make_mesh, put_batch

    none = np.zeros((BATCH, 0), np.int32)
    ids = tokens().astype(np.int32)
    weights = np.ones((BATCH, LENGTH), np.float32)
    weights[:, 0] = 0
    batch = Batch(
        tokens=ids,
        mask=np.ones((BATCH, LENGTH), bool),
        loss_weights=weights,
        frames=np.zeros((BATCH, 0, 1, 1, 3), np.uint8),
        fbank=np.zeros((BATCH, 0, 128), np.float32),
        fbank_frames=np.zeros(BATCH, np.int32),
        history_tokens=none,
        memory_index=none,
    )
    config = MultiMoodConfig(
        llm=Qwen2Config(**SIZE), vision=None, audio=None, compressor=None,
        video_token_id=-1, audio_token_id=-2, history_token_id=-3,
    )  # fmt: skip
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1})
    create = lambda rngs: MultiMood(config, rngs=rngs)  # noqa: E731
    abstract = state.abstract_model(create, mesh)
    parts = ("language_model",)
    tx, _ = state.make_optimizer(stage(learning_rate=1e-4, weight_decay=0.01), 1000)
    where = state.state_shardings(abstract, parts, tx)
    params = state.init_params(create, abstract, 0)
    current = state.start_state(params, parts, tx, where, "float32")
    step = state.make_train_step(abstract, tx, where, 0, 1)
    batch = put_batch(batch, mesh)

    def run() -> float:
        nonlocal current
        for _ in range(STEPS):
            current, metrics = step(current, batch)
        return float(jax.device_get(metrics["loss"]))

    return run


def peer_step():
    import torch
    import transformers

    torch.set_num_threads(2)
    torch.manual_seed(0)
    config = transformers.Qwen2Config(**SIZE, rope_theta=1e6, use_cache=False)
    model = transformers.Qwen2ForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01)
    ids = torch.as_tensor(tokens())

    def run() -> float:
        for _ in range(STEPS):
            loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        return float(loss.detach())

    return run


def serve_peer() -> None:
    """Runs a round for every line on stdin and answers with its loss."""
    answers, sys.stdout = sys.stdout, sys.stderr
    run = peer_step()
    for _ in sys.stdin:
        print(run(), file=answers, flush=True)


class Peer:
    def __init__(self, benchmark: str):
        command = [sys.executable, __file__, benchmark, "--peer"]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"},
        )

    def __call__(self) -> float:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("the peer's process died; its messages are above")
        return float(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def compare(benchmark: str, rounds: int) -> dict:
    peer, ours = Peer(benchmark), our_step()
    for _ in range(2):
        peer(), ours()
    seconds, losses = {"peer": [], "ours": []}, {}
    for _ in range(rounds):
        for name, run in (("peer", peer), ("ours", ours)):
            start = time.perf_counter()
            losses[name] = run()
            seconds[name].append((time.perf_counter() - start) / STEPS)
    peer.close()
    import jax

    median = {name: statistics.median(t) for name, t in seconds.items()}
    return {
        "benchmark": benchmark,
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "cores": len(os.sched_getaffinity(0)),
        "dtype": "float32",
        "shape": [BATCH, LENGTH],
        "peer": "transformers + torch AdamW, 2 threads",
        "peer_seconds": [round(t, 4) for t in seconds["peer"]],
        "seconds": [round(t, 4) for t in seconds["ours"]],
        "peer_median": round(median["peer"], 4),
        "median": round(median["ours"], 4),
        "ratio": round(median["peer"] / median["ours"], 3),
        "losses": {name: round(loss, 4) for name, loss in losses.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("benchmark", choices=["train_step"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        serve_peer()
    else:
        print(json.dumps(compare(args.benchmark, args.rounds)))


if __name__ == "__main__":
    main()
