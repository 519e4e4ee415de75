"""Runs benchmarks on one GPU with random weights, batches and media; prints one JSON line each.

    python tools/bench_gpu.py ceilings scan attention sft grpo

ceilings   what the device reaches: bytes/s of a copy, FLOP/s of a bfloat16 matrix product
scan       the selective scan at mamba-370m's shapes: the kernel against the recurrence (error),
           XLA's chunked scan (time), and the time in which a copy moves its inputs and outputs
attention  cuDNN against XLA at the 7B model's shapes, with padded rows: error and time
sft        training steps of a supervised stage: seconds, MFU (run/flops.py), memory
grpo       the phases of a GRPO step; decoding against the time in which a copy moves the weights
           and caches that it reads

sft and grpo run what a config says (--config, --config.FIELD=VALUE), by default the 7B network with
LoRA, training adapters, connectors and compressor. To try it out on a CPU, pass
--config=configs/demo.py and small sizes of the example and the scan.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import math
import os
import pathlib
import statistics
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94")

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mm_jax import planning
from mm_jax.config.load import load_config, resolve
from mm_jax.data.batch import Batch, Responses
from mm_jax.generation.engine import Request, Result
from mm_jax.models.abstract import abstract_model
from mm_jax.models.sharding import make_mesh, put_whole_batch
from mm_jax.ops.attention import causal_attention
from mm_jax.ops.selective_scan import selective_scan
from mm_jax.rl.policy import TOWERS, Experience, Policy
from mm_jax.run import build, flops
from mm_jax.run.start import training_dtype
from mm_jax.training.state import StageModel, TrainState, merged_params
from mm_jax.training.supervised import make_train_step

VOCABULARY = 151_650  # Qwen2's tokens with the placeholders


def seconds(run, repeats: int = 1, rounds: int = 5) -> float:
    """Returns the median time of a call over rounds of `repeats` calls without waits in between."""
    jax.block_until_ready(run())
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(repeats):
            out = run()
        jax.block_until_ready(out)
        times.append((time.perf_counter() - began) / repeats)
        del out
    return statistics.median(times)


def measured(run, rounds: int) -> dict[str, float]:
    """Returns medians of what `run` returns, over rounds after a first call that compiles."""
    note("first call, with compiling", run())
    each = [run() for _ in range(rounds)]
    return {key: statistics.median(one[key] for one in each) for key in each[0]}


def note(*words) -> None:
    """Prints a benchmark's progress to stderr: a rented device is paid for by the second."""
    print(f"{time.strftime('%H:%M:%S')}", *words, file=sys.stderr, flush=True)


@jax.jit
def relative_error(got: jax.Array, want: jax.Array, where: jax.Array | bool = True) -> jax.Array:
    """Computes |got - want| / |want| (2-norms, in float32) over the entries that `where` marks."""
    got, want = (jnp.where(where, a.astype(jnp.float32), 0) for a in (got, want))
    norm = lambda a: jnp.sqrt(jnp.sum(a * a))  # noqa: E731
    return norm(got - want) / norm(want)


def tree_bytes(tree) -> int:
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))


def peak_memory() -> float | None:
    """Returns the most memory in use since the process began, in GB."""
    stats = jax.devices()[0].memory_stats() or {}
    return round(stats["peak_bytes_in_use"] / 1e9, 2) if "peak_bytes_in_use" in stats else None


@functools.cache
def copy_bandwidth() -> float:
    """Measures the bytes per second that a large element-wise function reads and writes."""
    on_gpu = jax.default_backend() == "gpu"
    x = jax.random.normal(jax.random.key(0), (2**29 if on_gpu else 2**24,))
    return 2 * x.nbytes / seconds(functools.partial(jax.jit(jnp.negative), x), repeats=5)


def ceilings(args) -> dict:
    size = 8192 if jax.default_backend() == "gpu" else 512
    a, b = jax.random.normal(jax.random.key(0), (2, size, size), jnp.bfloat16)
    product = seconds(functools.partial(jax.jit(jnp.matmul), a, b), repeats=10)
    return {
        "copy_bytes_per_second": copy_bandwidth(),
        "matmul_flops_per_second": 2 * size**3 / product,
    }


def scan_inputs(batch: int, length: int, width: int, states: int, seed: int = 0):
    k = jax.random.split(jax.random.key(seed), 7)
    return (
        jax.random.normal(k[0], (batch, length, width)),
        jax.nn.softplus(jax.random.normal(k[1], (batch, length, width)) - 3),
        -jnp.exp(jax.random.normal(k[2], (width, states))),
        jax.random.normal(k[3], (batch, length, states)),
        jax.random.normal(k[4], (batch, length, states)),
        jax.random.normal(k[5], (width,)),
        jax.random.normal(k[6], (batch, width, states)),
    )


def scan_functions(implementation: str):
    """Returns two jitted functions: the scan, and the scan with the gradients of all its inputs."""

    def forward(inputs, resets=None):
        return selective_scan(*inputs, resets, implementation=implementation)

    def both(inputs, cotangents, resets=None):
        out, pull = jax.vjp(lambda *a: forward(a, resets), *inputs)
        return out, pull(cotangents)

    return jax.jit(forward), jax.jit(both)


def scan(args) -> dict:
    batch, length, width, states = args.scan
    inputs = scan_inputs(2, min(length, 500), width, states)
    resets = jax.random.bernoulli(jax.random.key(1), 0.01, inputs[0].shape[:2])
    like = (inputs[0], inputs[6])
    cotangents = tuple(jax.random.normal(jax.random.key(2), a.shape) for a in like)
    with jax.default_matmul_precision("highest"):
        want = scan_functions("sequential")[1](inputs, cotangents, resets)
    got = scan_functions("pallas")[1](inputs, cotangents, resets)
    names = ("y", "h", "gx", "gdt", "ga", "gb", "gc", "gd", "gh0")
    pairs = zip(names, jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    errors = {name: float(relative_error(g, w)) for name, g, w in pairs}
    note("errors", errors)
    inputs = scan_inputs(batch, length, width, states)
    cotangents = (jax.random.normal(jax.random.key(2), inputs[0].shape), jnp.zeros(inputs[6].shape))
    (forward, both), (xla_forward, xla_both) = map(scan_functions, ("pallas", "chunked"))
    found = {
        "pallas_forward": seconds(lambda: forward(inputs), 20),
        "pallas_both": seconds(lambda: both(inputs, cotangents), 20),
        "chunked_forward": seconds(lambda: xla_forward(inputs), rounds=2),
        "chunked_both": seconds(lambda: xla_both(inputs, cotangents), rounds=2),
    }
    once = tree_bytes(inputs) + tree_bytes((inputs[0], inputs[6]))
    bound = once / copy_bandwidth()
    backward = (2 * tree_bytes(inputs) + tree_bytes(cotangents)) / copy_bandwidth()
    return {
        "shape": dict(batch=batch, length=length, width=width, states=states),
        "errors": errors,
        "seconds": found,
        "bound_forward": bound,
        "bound_backward": backward,
        "forward_over_bound": found["pallas_forward"] / bound,
        "backward_over_bound": (found["pallas_both"] - found["pallas_forward"]) / backward,
        "chunked_over_pallas_forward": found["chunked_forward"] / found["pallas_forward"],
        "chunked_over_pallas_both": found["chunked_both"] / found["pallas_both"],
    }


def attention(args) -> dict:
    batch, length, heads, kv_heads, width = 4, args.tokens, 28, 4, 128
    keys = jax.random.split(jax.random.key(0), 4)
    shape = lambda n: (batch, length, n, width)  # noqa: E731
    q, g = (jax.random.normal(k, shape(heads), jnp.bfloat16) for k in keys[:2])
    k, v = (jax.random.normal(k, shape(kv_heads), jnp.bfloat16) for k in keys[2:])
    lengths = jnp.array([length, length - 1, length * 5 // 8, 17], jnp.int32)
    g = jnp.where((jnp.arange(length) < lengths[:, None])[..., None, None], g, 0)

    def both(choice):
        def run(q, k, v):
            out, pull = jax.vjp(lambda *a: causal_attention(*a, lengths, choice), q, k, v)
            return out, *pull(g.astype(out.dtype))

        return jax.jit(run)

    with jax.default_matmul_precision("highest"):
        want = both("xla")(*(a.astype(jnp.float32) for a in (q, k, v)))
    real = (jnp.arange(length) < lengths[:, None])[..., None, None]
    out = {"shape": dict(batch=batch, tokens=length, heads=heads, kv_heads=kv_heads, width=width)}
    for choice in ("cudnn", "xla"):
        run = both(choice)
        got = run(q, k, v)
        names = ("out", "gq", "gk", "gv")
        out[f"{choice}_errors"] = {
            name: float(relative_error(g, w, real))
            for name, g, w in zip(names, got, want, strict=True)
        }
        out[f"{choice}_seconds"] = seconds(lambda: run(q, k, v), 3)  # noqa: B023
    return out


def random_batch(config, example, stage, model_config, words) -> Batch:
    """Makes a batch of full length: media, then text; the last tenth of the tokens are targets."""
    like = planning.abstract_batch(config, example, stage, model_config)
    rng = np.random.default_rng(0)
    plan = build.span_lengths(model_config)
    b, t = like.tokens.shape
    tokens = rng.integers(0, words.text_rows, (b, t)).astype(np.int32)
    frames = like.frames.shape[1]
    # Real lengths, without padding.
    fbank = min(int(example.audio_seconds * 100), like.fbank.shape[1])
    memories = build.memory_budget(config).count(example.utterances)
    memories = min(memories, like.memory_index.shape[1])
    media = [words.video_id] * (plan.video_tokens(frames) if frames else 0)
    media += [words.audio_id] * plan.audio_tokens(fbank)
    media += [words.history_id] * memories
    tokens[:, : len(media)] = media
    weights = np.zeros((b, t), np.float32)
    weights[:, -t // 10 :] = 1
    history = like.history_tokens.shape[1]
    places = np.linspace(0, history - 1, like.memory_index.shape[1]).astype(np.int32)
    return Batch(
        tokens=tokens,
        mask=np.ones((b, t), bool),
        loss_weights=weights,
        frames=rng.integers(0, 256, like.frames.shape).astype(np.uint8),
        fbank=rng.normal(size=like.fbank.shape).astype(np.float32),
        fbank_frames=np.full(b, fbank, np.int32),
        history_tokens=rng.integers(0, words.text_rows, (b, history)).astype(np.int32),
        memory_index=np.tile(places, (b, 1)),
    )


class Setting:
    """A stage of a config on this device, with random weights and a random batch."""

    def __init__(self, args, name: str, defaults: dict):
        given = [] if args.config else [f"{key}={value}" for key, value in defaults.items()]
        config = load_config(args.config or "configs/base.py:grpo", given + args.overrides)
        config.stages = (name,)
        config = resolve(config)
        self.config, self.stage = config, config.stage[name]
        self.words = planning.Vocabulary(args.vocab_size)
        self.model_config = build.model_config(config, self.words)
        create = build.create_model(config, self.model_config)
        self.mesh = make_mesh(dict(data=1, fsdp=1, tensor=1), jax.devices()[:1])
        self.plain = abstract_model(create, self.mesh)
        dtype = training_dtype(config, self.stage)

        def start():
            flat = nnx.to_flat_state(nnx.split(create(nnx.Rngs(0)))[1])
            cast = [(p, v.replace(v.get_value().astype(dtype(p, None)))) for p, v in flat]
            return nnx.from_flat_state(cast)

        with jax.set_mesh(self.mesh):
            self.params = jax.jit(start, out_shardings=self.plain.shardings)()
        self.compute = build.dtypes(config).compute
        example = planning.Longest(
            args.text_tokens, args.frames, args.audio_seconds, args.utterances, args.history_tokens
        )
        batch = random_batch(config, example, self.stage, self.model_config, self.words)
        self.batch = put_whole_batch(batch, self.mesh)

    def start(self, model: StageModel) -> TrainState:
        """Makes the state before the first step; consumes `params`."""
        params, self.params = self.params, None
        return model.start(params, 0)

    def trained_flops(self, shapes) -> float:
        stage = self.stage
        return flops.train_flops(self.model_config, shapes, stage.trainable, stage.lora.rank > 0)

    def described(self) -> dict:
        return {
            "config": {
                "batch_size": self.stage.batch_size,
                "accumulation": self.stage.accumulation,
                "remat": self.config.model.remat,
                "lora_rank": self.stage.lora.rank,
                "optimizer": self.stage.optimizer,
                "momentum_dtype": self.stage.momentum_dtype,
                "attention": self.config.model.attention,
                "compute": str(self.compute),
            },
            "parameters": sum(math.prod(v.shape) for v in jax.tree.leaves(self.plain.params)),
            "shapes": {k: list(v) for k, v in flops.batch_shapes(self.batch).items()},
        }


def utilisation(work: float, took: float) -> float | None:
    found = flops.mfu(work, took, 1, jax.devices()[0].device_kind)
    return None if found is None else round(found, 4)


def sft(args) -> dict:
    at = Setting(args, "sft", {"stage.sft.lora.rank": 64, "stage.sft.batch_size": 2})
    model = StageModel(at.plain, at.stage, 1000, at.compute)
    held = [at.start(model)]
    train_step = make_train_step(model, 0)

    def once():
        began, state = time.perf_counter(), held.pop()
        with jax.set_mesh(at.mesh):
            new, metrics = train_step(*state, at.batch)
        held.append(TrainState(*new, state.frozen))
        loss = float(metrics["loss"])
        return {"seconds": time.perf_counter() - began, "loss": loss}

    found = measured(once, 5)
    shapes = flops.batch_shapes(at.batch)
    return {
        **at.described(),
        **found,
        "tokens_per_second": math.prod(shapes["tokens"]) / found["seconds"],
        "mfu": utilisation(at.trained_flops(shapes), found["seconds"]),
        "peak_memory_gb": peak_memory(),
    }


def grpo(args) -> dict:
    at = Setting(
        args,
        "grpo",
        {
            "stage.grpo.lora.rank": 64,
            "stage.grpo.batch_size": 8,
            "stage.grpo.accumulation": 8,
            "stage.grpo.rl.max_new_tokens": 256,
            "stage.grpo.rl.chunks": 1,
        },
    )
    stage, rl = at.stage, at.stage.rl
    at.words.stop_ids = (at.words.text_rows - 1,)
    policy = Policy(at.plain, stage, at.words, at.compute, 0, 1000)
    held = [at.start(policy.model)]

    rows, group, new = stage.batch_size, rl.group, rl.max_new_tokens
    seeds = np.arange(rows * group, dtype=np.uint32).reshape(rows, group)
    signs = jnp.where(jnp.arange(group) % 2, 1.0, -1.0)[:, None]

    cache_bytes = {}

    def once():
        """Takes a step as `rl.reinforce` does."""
        state, took, clock = held.pop(), {}, [time.perf_counter()]

        def phase(name, out):
            jax.block_until_ready(out)
            clock.append(time.perf_counter())
            took[name] = clock[-1] - clock[-2]
            note(name, round(took[name], 4))
            return out

        with jax.set_mesh(at.mesh):
            weights = phase("reshard", policy.to_rollout(merged_params(state)))
            features, cached = phase("prefill", policy.read(weights, at.batch))
            cache_bytes["prompts"] = tree_bytes((cached.cache.k, cached.cache.v))
            lm = weights["language_model"]
            tied = at.model_config.llm.tie_word_embeddings
            cache_bytes["weights"] = tree_bytes(lm) - (
                0 if tied else tree_bytes(lm["embed_tokens"])
            )
            blocks = [(cached, [Request(i, own) for i, own in enumerate(seeds)])]
            del cached, lm
            told = policy.engine.finished(weights, blocks)
            results = sorted((p.name, p.result) for p in told)
            drawn = Result(*map(np.stack, zip(*(result for _, result in results), strict=True)))
            mask = np.arange(drawn.tokens.shape[2]) < drawn.lengths[..., None]
            tokens, mask, logps = put_whole_batch((drawn.tokens, mask, drawn.logps), at.mesh)
            phase("rollout", logps)
            del weights, blocks
            responses = Responses(at.batch, features, tokens, mask)
            ref = phase("score", policy.score(state.trainable, state.frozen, responses))
            experience = Experience(
                responses,
                used=responses.mask,
                advantages=jnp.where(responses.mask, signs, 0.0),
                sampler_logps=logps,
                old_logps=None,
                ref_logps=ref.logps,
                old_values=None,
                returns=None,
            )
            new_state, metrics = policy.update(*state, experience, 0)
            phase("update", metrics)
        held.append(TrainState(*new_state, state.frozen))
        gap = float(metrics["sampler_gap"])
        return {**took, "tokens_decoded": int(drawn.lengths.sum()), "sampler_gap": gap}

    found = measured(once, 2)
    took = {k: found.pop(k) for k in ("reshard", "prefill", "rollout", "score", "update")}
    decode = took["rollout"] / (new - 1)
    # The filled part of the continuations' own caches: half of them on average.
    own = cache_bytes["prompts"] / at.batch.tokens.size * rows * group * new / 2
    needed = cache_bytes["weights"] + cache_bytes["prompts"] + own
    shapes = {**flops.batch_shapes(at.batch), "responses": (rows, group, new)}
    forward = flops.forward_flops(at.model_config, shapes)
    towers = sum(forward.get(name, 0) for name in TOWERS)  # they ran in the rollout
    step = sum(took.values())
    bound = needed / copy_bandwidth()
    return {
        **at.described(),
        **found,
        "group": group,
        "new_tokens": new,
        "seconds": took,
        "share": {name: t / step for name, t in took.items()},
        "decode_seconds_a_token": decode,
        "decode_bytes_needed": needed,
        "decode_share_of_bound": bound / decode,
        "decode_tokens_per_second": rows * group / decode,
        "update_mfu": utilisation(at.trained_flops(shapes) - towers, took["update"]),
        "peak_memory_gb": peak_memory(),
    }


BENCHMARKS = {f.__name__: f for f in (ceilings, scan, attention, sft, grpo)}


def sizes(text: str) -> list[int]:
    return [int(n) for n in text.split("x")]


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("benchmark", nargs="+", choices=BENCHMARKS)
    add("--config", help="config of sft and grpo (default: configs/base.py:grpo with LoRA)")
    add("--tokens", type=int, default=4096, help="per row, for attention (default %(default)s)")
    add("--scan", type=sizes, default=[8, 2048, 2048, 16], help="batch x length x width x states")
    add("--vocab_size", type=int, default=VOCABULARY, help="tokens (default %(default)s)")
    add("--text_tokens", type=int, default=2048)
    add("--frames", type=int, default=16)
    add("--audio_seconds", type=float, default=10.0)
    add("--utterances", type=int, default=64)
    add("--history_tokens", type=int, default=2048)
    return parser


def main(argv: list[str] | None = None) -> None:
    args, rest = parser().parse_known_args(argv)
    unknown = [r for r in rest if not r.startswith("--config.")]
    if unknown:
        parser().error(f"unrecognized arguments: {' '.join(unknown)}")
    args.overrides = [r.removeprefix("--config.") for r in rest]
    for name in args.benchmark:
        found = BENCHMARKS[name](args)
        line = {
            "benchmark": name,
            "date": datetime.date.today().isoformat(),
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            **found,
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
