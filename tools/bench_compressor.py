"""Measures how the compressor's cost grows with a scan's length, or over a conversation's turns.

    python tools/bench_compressor.py scan     # B 2, d_inner 2048, N 16, L up to 16,384, float32
    python tools/bench_compressor.py turns    # cost of the 10th and the 1,000th turn

Prints one JSON line. scan: seconds (median of 3) and temporary bytes of the compiled program,
forward and forward + backward, with the slope of log(cost) over log(L) (1: linear). turns:
ConversationMemory extended by 24 tokens per turn, with the model of configs/mesc_text.py and random
weights.
"""

from __future__ import annotations

import argparse
import datetime
import json
import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

LENGTHS = (1024, 2048, 4096, 8192, 16384)
TURN_TOKENS = 24


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("scan", "turns"))
    what = parser.parse_args().what
    import jax

    found = {"scan": scan, "turns": turns}[what]()
    device = jax.devices()[0].device_kind
    print(json.dumps({"bench": what, "date": str(datetime.date.today()), "device": device} | found))


def scan() -> dict:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from mm_jax.ops.selective_scan import selective_scan

    batch, width, states = 2, 2048, 16
    rng = np.random.default_rng(0)
    a = -jnp.asarray(rng.uniform(0.5, 4, (width, states)), jnp.float32)
    d = jnp.ones(width)

    def forward(x, dt, b, c):
        return jnp.sum(selective_scan(x, dt, a, b, c, d)[0])

    programs = {
        "forward": jax.jit(forward),
        "forward_backward": jax.jit(jax.grad(forward, argnums=(0, 1, 2, 3))),
    }
    out = {"shape": {"batch": batch, "d_inner": width, "states": states}, "lengths": LENGTHS}
    inputs = []
    for length in LENGTHS:
        x, dt = (jnp.asarray(rng.random((batch, length, width)), jnp.float32) for _ in range(2))
        b, c = (jnp.asarray(rng.random((batch, length, states)), jnp.float32) for _ in range(2))
        inputs.append((x, 0.1 * dt, b, c))
    for name, program in programs.items():
        seconds, memory = [], []
        for arguments in inputs:
            compiled = program.lower(*arguments).compile()
            memory.append(compiled.memory_analysis().temp_size_in_bytes)
            jax.block_until_ready(compiled(*arguments))
            times = []
            for _ in range(3):
                began = time.perf_counter()
                jax.block_until_ready(compiled(*arguments))
                times.append(time.perf_counter() - began)
            seconds.append(statistics.median(times))
        out[name] = {
            "seconds": [round(t, 4) for t in seconds],
            "temporary_mib": [round(m / 2**20, 1) for m in memory],
            "slope_seconds": slope(seconds),
            "slope_memory": slope(memory),
        }
    return out


def slope(costs) -> float:
    import numpy as np

    return round(float(np.polyfit(np.log(LENGTHS), np.log(costs), 1)[0]), 3)


def turns() -> dict:
    import numpy as np

    from configs import mesc_text
    from mm_jax.config.load import resolve
    from mm_jax.data import tokenizer
    from mm_jax.generation.memory import MemoryWriter
    from mm_jax.models.abstract import abstract_model, init_params
    from mm_jax.models.sharding import make_mesh
    from mm_jax.run import build

    config = resolve(mesc_text.get_config())
    words = ["so how does it make you feel when she says that to you"] * 3

    tok = tokenizer.train(words, 400)
    create = build.create_model(config, build.model_config(config, tok))
    abstract = abstract_model(create, make_mesh({"data": 1, "fsdp": 1, "tensor": 1}))
    params = init_params(create, abstract, 0)
    writer = MemoryWriter(abstract, 1)
    rng, memory = np.random.default_rng(0), writer.empty()
    at = np.array([TURN_TOKENS - 1], np.int32)
    seconds = []
    for _ in range(1010):
        tokens = rng.integers(5, 300, TURN_TOKENS).astype(np.int32)
        tokens[-1] = tok.memory_id
        began = time.perf_counter()
        (memory,) = writer.extend(params, [memory], [tokens], [at])
        seconds.append(time.perf_counter() - began)

    def around(turn: int) -> float:
        """Returns the median of the ten turns from this one on, in milliseconds."""
        return round(1e3 * statistics.median(seconds[turn - 1 : turn + 9]), 3)

    return {
        "tokens_a_turn": TURN_TOKENS,
        "history_tokens_at_the_end": len(memory.tokens),
        "milliseconds": {f"turn {n}": around(n) for n in (10, 100, 1000)},
        "ratio_1000th_to_10th": round(around(1000) / around(10), 3),
    }


if __name__ == "__main__":
    main()
