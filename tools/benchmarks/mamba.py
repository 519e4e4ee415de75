"""Runs a Mamba of 4 layers (width 512, 16 states, expand 2), forward and forward + backward.

Batch 1. The peer is transformers' MambaModel on its plain or its mambapy path, whichever is faster.
"""

from __future__ import annotations

import resource
import time

PEER = "transformers MambaModel, 2 threads, the faster of plain and mambapy 1.2"
TRAINING = False
STEPS = 1
SIZE = dict(vocab_size=1024, hidden_size=512, state_size=16, num_hidden_layers=4, expand=2)
SHAPE = dict(batch=1, **SIZE)


def memory_gb() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 3)


def timed(run) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def ours(length: int):
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from mm_jax.models.mamba import Mamba, MambaConfig

    base = memory_gb()
    config = MambaConfig(**SIZE)
    graph, params = nnx.split(jax.jit(lambda: Mamba(config, rngs=nnx.Rngs(0)))())
    ids = np.random.default_rng(0).integers(0, SIZE["vocab_size"], (1, length)).astype(np.int32)

    def loss(params, ids):
        return jnp.sum(nnx.merge(graph, params)(ids) ** 2)

    forward = jax.jit(lambda p, i: nnx.merge(graph, p)(i)).lower(params, ids).compile()
    both = jax.jit(jax.value_and_grad(loss)).lower(params, ids).compile()

    def run() -> dict:
        return {
            "seconds/forward": timed(lambda: jax.block_until_ready(forward(params, ids))),
            "seconds/both": timed(lambda: jax.block_until_ready(both(params, ids))),
            "peak_rss_gb": round(memory_gb() - base, 3),
            "scratch_gb": round(both.memory_analysis().temp_size_in_bytes / 1e9, 3),
        }

    return run


def peer(length: int):
    import torch
    import transformers

    torch.set_num_threads(2)
    torch.manual_seed(0)
    base = memory_gb()
    models = {
        name: transformers.MambaModel(
            transformers.MambaConfig(**SIZE, use_mambapy=name == "mambapy", use_cache=False)
        )
        for name in ("plain", "mambapy")
    }
    ids = torch.randint(0, SIZE["vocab_size"], (1, length))

    def forward(model) -> None:
        with torch.no_grad():
            model.eval()(ids)

    def both(model) -> None:
        model.train()(ids).last_hidden_state.square().sum().backward()
        model.zero_grad()

    def run() -> dict:
        out = {}
        for name, model in models.items():
            out[f"seconds/forward_{name}"] = timed(lambda m=model: forward(m))
            # The plain path's backward pass takes 10 times as long, a minute at 1,024 tokens.
            if name == "mambapy" or length <= 256:
                out[f"seconds/both_{name}"] = timed(lambda m=model: both(m))
        fastest = lambda what: min(v for k, v in out.items() if k.startswith(f"seconds/{what}"))  # noqa: E731
        out["seconds/forward"], out["seconds/both"] = fastest("forward"), fastest("both")
        out["peak_rss_gb"] = round(memory_gb() - base, 3)
        return out

    return run
