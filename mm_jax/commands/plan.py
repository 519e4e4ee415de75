"""plan: memory, FLOPs and time of a training step, before anything is paid for.

python -m mm_jax plan --config=configs/base.py --mesh=data:1,fsdp:4,tensor:1 --hbm=80GB

Compiles the real step of a stage on virtual devices; no weight is allocated and no data is read.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import re
import time

from mm_jax.config import ConfigError, load_config, require

GB = 1e9
# Peak bfloat16 FLOP/s is `training.flops.PEAK_BF16`; these are its names on the command line.
DEVICES = {"H100": "NVIDIA H100", "H200": "NVIDIA H200", "A100": "NVIDIA A100"}
HEADROOM = 0.92  # of the device's memory; the rest is the runtime's, NCCL's and fragmentation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--config", required=True, help="configs/NAME.py[:arg]")
    add("--stage", help="stage to plan (default: the last)")
    add("--mesh", help="data:1,fsdp:4,tensor:1 (default: the config's; then no -1 in it)")
    add("--hbm", default="80GB", help="memory of a device (default 80GB)")
    add("--device", default="H100", choices=sorted(DEVICES), help="for the time (default H100)")
    add("--mfu", type=float, default=0.4, help="assumed for the time (default 0.4)")
    add("--vocab_size", type=int, help="tokens of the tokenizer (default: the config's)")
    shape = parser.add_argument_group("an example at its longest")
    shape.add_argument("--text_tokens", type=int, default=2048, help="default 2048")
    shape.add_argument("--frames", type=int, default=16, help="default 16")
    shape.add_argument("--audio_seconds", type=float, default=10.0, help="default 10")
    shape.add_argument("--utterances", type=int, default=64, help="of the history (default 64)")
    shape.add_argument("--history_tokens", type=int, default=2048, help="default 2048")


def main(args: argparse.Namespace, overrides: list[str]) -> None:
    config = load_config(args.config, overrides)
    mesh = parse_mesh(args.mesh) if args.mesh else config.mesh.to_dict()
    require(all(n >= 1 for n in mesh.values()), f"--mesh: expected sizes >= 1, got {mesh}")
    hbm = parse_bytes(args.hbm)
    require(0 < args.mfu <= 1, f"--mfu: expected 0 < mfu <= 1, got {args.mfu}")
    # Before the first use of a device: as many virtual ones as the mesh has places.
    os.environ["JAX_PLATFORMS"] = "cpu"
    count = math.prod(mesh.values())
    os.environ["XLA_FLAGS"] = (
        f"--xla_force_host_platform_device_count={count} "
        # XLA's CPU compiler computes bfloat16 products in float32; without this it would convert
        # the stacked weights of all layers at once, which no GPU does.
        "--xla_disable_hlo_passes=while-loop-invariant-code-motion,"
        "while-loop-expensive-invariant-code-motion"
    )
    plan = make_plan(config, args, mesh)
    print(report(plan, args, mesh, hbm))
    if plan.total > hbm * HEADROOM:
        raise ConfigError(
            f"does not fit: {plan.total / GB:.1f} GB a device, usable are "
            f"{hbm * HEADROOM / GB:.1f} of {hbm / GB:.0f} GB; what would fit:\n"
            + "\n".join(f"  {line}" for line in remedies(plan, hbm * HEADROOM))
        )


def parse_mesh(text: str) -> dict[str, int]:
    sizes = {"data": 1, "fsdp": 1, "tensor": 1}
    for part in text.split(","):
        name, _, size = part.partition(":")
        if name not in sizes or not size.isdigit():
            raise ConfigError(f"--mesh: expected data:1,fsdp:4,tensor:1, got {text!r}")
        sizes[name] = int(size)
    return sizes


def parse_bytes(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(GB|GiB)?", text)
    if not found:
        raise ConfigError(f"--hbm: expected bytes such as 80GB, got {text!r}")
    return float(found[1]) * (2**30 if found[2] == "GiB" else GB)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes a device. `parts` are what each of `remedies` changes."""

    trainable: int
    frozen: int
    optimizer: int
    gradients: int
    batch: int
    temporary: int  # XLA's scratch memory: gradients, activations, gathered weights
    cache: int  # keys and values of a rollout of the stage's batch, not part of the step
    flops: float
    seconds_to_compile: float
    shapes: dict[str, tuple[int, ...]]
    matrices: int  # bytes of the language model's dense kernels in bfloat16, a device
    adapters: bool
    quantised: bool
    micro_batches: int
    rows_per_device: int
    shards: int

    @property
    def activations(self) -> int:
        return max(0, self.temporary - self.gradients)

    @property
    def total(self) -> int:
        return self.trainable + self.frozen + self.optimizer + self.batch + self.temporary


def make_plan(config, args, mesh_sizes) -> Plan:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from mm_jax import build
    from mm_jax.models import lora
    from mm_jax.training import flops, state
    from mm_jax.training.sharding import batch_parallelism, batch_sharding, make_mesh

    build.validate(config)
    name = args.stage or config.stages[-1]
    require(name in config.stages, f"--stage: expected one of {list(config.stages)}, got {name!r}")
    stage = config.stage[name]
    require(
        stage.objective in ("sft", "compressor"),
        f"--stage: {name} has objective {stage.objective}; plan knows sft and compressor",
    )
    with config.unlocked():
        config.precision = "bfloat16" if config.precision == "auto" else config.precision
        config.model.attention = "xla"
    tokenizer = Vocabulary(args.vocab_size or vocabulary_size(config))
    model_config = build.model_config(config, tokenizer)
    mesh = make_mesh(mesh_sizes)
    abstract = state.abstract_model(build.create_model(config, model_config), mesh)
    adapters = build.lora_config(stage)
    if adapters:
        add = lambda model, rngs: lora.add_adapters(model, adapters, rngs)  # noqa: E731
        abstract = state.adapted_model(abstract, add)
    tx, _ = state.make_optimizer(stage, 1000)
    where = state.state_shardings(abstract, stage.trainable, tx, adapters is not None)
    trainable, frozen = state.split_trainable(
        abstract.params, stage.trainable, adapters is not None
    )
    compute = build.dtypes(config).compute
    frozen = jax.eval_shape(lambda s: state.cast(s, compute), frozen)
    optimizer = jax.eval_shape(tx.init, trainable)

    def placed(tree, shardings):
        return jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, shardings
        )

    ways = batch_parallelism(mesh) * stage.accumulation
    require(
        stage.batch_size % ways == 0,
        f"stage.{name}.batch_size: {stage.batch_size} is not a multiple of {ways} (data x fsdp "
        "devices x accumulation)",
    )
    batch = abstract_batch(config, args, stage, model_config)
    shapes = flops.batch_shapes(batch)
    arguments = (
        placed(trainable, where.trainable),
        placed(optimizer, where.opt_state),
        jax.ShapeDtypeStruct((), jnp.int32, sharding=where.step),
        placed(frozen, where.frozen),
        jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=batch_sharding(mesh)), batch
        ),
    )
    step = state.jit_train_step(abstract, tx, where, 0, stage.accumulation, stage.token_dropout)
    began = time.perf_counter()
    with jax.set_mesh(mesh):
        compiled = step.lower(*arguments).compile()
    memory = compiled.memory_analysis()

    def size(tree) -> int:
        return sum(
            math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize
            for a in jax.tree.leaves(tree)
        )

    kernels = [
        v
        for path, v in nnx.to_flat_state(abstract.params)
        if path[:2] == ("language_model", "layers") and path[-1] == "kernel"
    ]
    shards = mesh_sizes["fsdp"] * mesh_sizes["tensor"]
    c = model_config.llm
    rows, length = shapes["tokens"]
    cache = 2 * c.num_hidden_layers * rows * (length + config.predict.max_new_tokens)
    cache *= c.num_key_value_heads * c.head_dim * compute.itemsize
    return Plan(
        trainable=size(arguments[0]),
        frozen=size(arguments[3]),
        optimizer=size(arguments[1]),
        gradients=size(arguments[0]),
        batch=size(arguments[4]),
        temporary=memory.temp_size_in_bytes,
        cache=cache // batch_parallelism(mesh),
        flops=flops.train_flops(model_config, shapes, tuple(stage.trainable), adapters is not None),
        seconds_to_compile=time.perf_counter() - began,
        shapes=shapes,
        matrices=sum(math.prod(v.shape) for v in kernels) * 2 // shards,
        adapters=adapters is not None,
        quantised=adapters is not None and adapters.base != "none",
        micro_batches=stage.accumulation,
        rows_per_device=stage.batch_size // ways,
        shards=shards,
    )


class Vocabulary:
    """The size of a tokenizer and ids for its placeholders, where only shapes matter."""

    def __init__(self, size: int):
        self.size = size
        self.video_id, self.audio_id, self.history_id = size - 3, size - 2, size - 1

    def __len__(self) -> int:
        return self.size


def vocabulary_size(config) -> int:
    if not config.data.tokenizer:
        return config.data.vocab_size
    from mm_jax.data import tokenizer

    return len(tokenizer.load(config.data.tokenizer))


def abstract_batch(config, args, stage, model_config):
    """A global batch at its longest, as shapes, padded to the config's buckets."""
    import jax
    import numpy as np

    from mm_jax import build
    from mm_jax.data.batch import Batch

    plan = build.sequence_plan(model_config)
    supervised = stage.objective == "sft"
    frames = args.frames if model_config.vision and supervised else 0
    fbank = int(args.audio_seconds * 100) if model_config.audio and supervised else 0
    memories = args.utterances if model_config.compressor else 0
    history = args.history_tokens if memories else 0
    tokens = args.text_tokens + memories
    tokens += plan.video_tokens(frames) if frames else 0
    tokens += plan.audio_tokens(fbank)
    t, a, h, u = build.buckets(config).padded((tokens, fbank, history, memories))
    b = stage.batch_size
    side = model_config.vision.image_size if frames else 1
    shape = jax.ShapeDtypeStruct
    return Batch(
        tokens=shape((b, t), np.int32),
        mask=shape((b, t), np.bool_),
        loss_weights=shape((b, t), np.float32),
        frames=shape((b, frames, side, side, 3), np.uint8),
        fbank=shape((b, a, 128), np.float32),
        fbank_frames=shape((b,), np.int32),
        history_tokens=shape((b, h), np.int32),
        memory_index=shape((b, u), np.int32),
    )


def report(plan: Plan, args, mesh, hbm: float) -> str:
    from mm_jax.training.flops import PEAK_BF16

    devices = math.prod(mesh.values())
    seconds = plan.flops / (devices * PEAK_BF16[DEVICES[args.device]] * args.mfu)
    tokens = math.prod(plan.shapes["tokens"])
    rows = [
        ("trained parameters", plan.trainable),
        ("frozen parameters", plan.frozen),
        ("optimiser state", plan.optimizer),
        ("gradients", plan.gradients),
        ("activations and scratch", plan.activations),
        ("batch", plan.batch),
    ]
    lines = [f"mesh {mesh}, {plan.rows_per_device} rows a device and micro-batch"]
    lines += [f"  {name:<24} {size / GB:8.2f} GB" for name, size in rows]
    lines += [
        f"  {'all, a device':<24} {plan.total / GB:8.2f} GB of {hbm / GB:.0f}",
        f"  {'(cache of a rollout)':<24} {plan.cache / GB:8.2f} GB",
        "shapes: " + ", ".join(f"{k}{list(v)}" for k, v in plan.shapes.items()),
        f"{plan.flops / 1e12:.1f} TFLOP a step; at {args.mfu:.0%} MFU on {devices} {args.device}: "
        f"{seconds:.2f} s, {tokens / seconds:,.0f} tokens/s",
        f"compiled in {plan.seconds_to_compile:.0f} s",
    ]
    return "\n".join(lines)


def remedies(plan: Plan, usable: float) -> list[str]:
    """The first three changes, or combinations, that fit by this plan's sizes.

    Activations are taken as proportional to the rows of a micro-batch, all else to the shards.
    """

    def total(rows=1.0, shards=1, trained=None, optimizer=1.0, frozen=None) -> float:
        weights = plan.trainable if trained is None else trained
        share = weights / plan.trainable if plan.trainable else 1.0
        kept = plan.frozen if frozen is None else frozen
        own = weights + kept + plan.optimizer * share * optimizer + plan.gradients * share
        return own / shards + (plan.activations + plan.batch) * rows

    found = []
    smallest = 1.0 / plan.rows_per_device
    halvings = [2.0**-i for i in range(1, 12) if 2.0**-i >= smallest]
    for rows in halvings:
        if total(rows=rows) <= usable:
            n = round(plan.micro_batches / rows)
            found.append(f"accumulation={n} ({total(rows=rows) / GB:.1f} GB)")
            break
    for more in (2, 4, 8, 16, 32):
        if total(shards=more, rows=1.0) <= usable:
            size = total(shards=more)
            found.append(f"fsdp and tensor over {plan.shards * more} devices ({size / GB:.1f} GB)")
            break
    if not plan.adapters:
        trained, frozen = plan.matrices // 50, plan.matrices
        for rows in (1.0, *halvings):
            size = total(trained=trained, frozen=plan.frozen + frozen, rows=rows)
            if size <= usable:
                n = round(plan.micro_batches / rows)
                extra = "" if rows == 1.0 else f" and accumulation={n}"
                found.append(f"lora.rank=64{extra} ({size / GB:.1f} GB)")
                break
    elif not plan.quantised:
        size = total(frozen=plan.frozen - 0.72 * plan.matrices)
        if size <= usable:
            found.append(f"lora.base=nf4 ({size / GB:.1f} GB)")
    if total(optimizer=0.75) <= usable:
        found.append(f"momentum_dtype=bfloat16 ({total(optimizer=0.75) / GB:.1f} GB)")
    if total(optimizer=0.02) <= usable:
        found.append(f"optimizer=adafactor ({total(optimizer=0.02) / GB:.1f} GB)")
    for rows in halvings:
        for more in (2, 4, 8, 16):
            if len(found) < 3 and total(rows=rows, shards=more) <= usable:
                size = total(rows=rows, shards=more)
                n = round(plan.micro_batches / rows)
                found.append(
                    f"accumulation={n} and {plan.shards * more} devices ({size / GB:.1f} GB)"
                )
    return found[:3] or ["nothing tried: fewer tokens, frames or a smaller model"]
