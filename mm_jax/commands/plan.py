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
class Phase:
    """One jitted function of a step. Bytes a device: `weights` that only it holds, and XLA's
    scratch memory with its results."""

    weights: int
    scratch: int

    @property
    def own(self) -> int:
        return self.weights + self.scratch


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes a device. `phases` run one after the other beside all the rest ("update" is the step
    of a supervised stage)."""

    trainable: int
    frozen: int
    optimizer: int
    reference: int
    gradients: int
    batch: int
    phases: dict[str, Phase]
    cache: int  # keys and values of a rollout, in the scratch of sampling
    flops: float
    seconds_to_compile: float
    shapes: dict[str, tuple[int, ...]]
    tokens: int  # that the language model reads in an update
    matrices: int  # bytes of the language model's dense kernels in bfloat16, a device
    adapters: bool
    quantised: bool
    micro_batches: int
    rows_per_device: int
    shards: int

    @property
    def activations(self) -> int:
        return max(0, self.phases["update"].scratch - self.gradients)

    @property
    def resident(self) -> int:
        return self.trainable + self.frozen + self.optimizer + self.reference + self.batch

    @property
    def total(self) -> int:
        return self.resident + max(phase.own for phase in self.phases.values())


def make_plan(config, args, mesh_sizes) -> Plan:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from mm_jax import build
    from mm_jax.commands.train import check_batch_size
    from mm_jax.models import lora
    from mm_jax.training import flops, state
    from mm_jax.training.sharding import batch_parallelism, batch_sharding, make_mesh

    build.validate(config)
    name = args.stage or config.stages[-1]
    require(name in config.stages, f"--stage: expected one of {list(config.stages)}, got {name!r}")
    stage = config.stage[name]
    with config.unlocked():
        config.precision = "bfloat16" if config.precision == "auto" else config.precision
        config.model.attention = "xla"
    tokenizer = Vocabulary(args.vocab_size or vocabulary_size(config))
    model_config = build.model_config(config, tokenizer)
    mesh = make_mesh(mesh_sizes)
    check_batch_size(stage, name, batch_parallelism(mesh))
    plain = state.abstract_model(build.create_model(config, model_config), mesh)
    compute = build.dtypes(config).compute
    adapters = build.lora_config(stage)
    batch = abstract_batch(config, args, stage, model_config)
    everywhere = state.replicated(mesh)

    def scalar(dtype):
        return jax.ShapeDtypeStruct((), dtype, sharding=everywhere)

    def placed(tree, shardings):
        return jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, shardings
        )

    def rows(tree):
        where = batch_sharding(mesh)
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where), tree)

    def size(tree) -> int:
        return sum(
            math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize
            for a in jax.tree.leaves(tree)
        )

    def state_of(abstract, parts, tx, where):
        trainable, frozen = state.split_trainable(abstract.params, parts, adapters is not None)
        frozen = jax.eval_shape(lambda s: state.cast(s, compute), frozen)
        return state.TrainState(
            placed(trainable, where.trainable),
            placed(frozen, where.frozen),
            placed(jax.eval_shape(tx.init, trainable), where.opt_state),
            jax.ShapeDtypeStruct((), jnp.int32, sharding=where.step),
        )

    def scratch(jitted, *arguments) -> int:
        with jax.set_mesh(mesh):
            memory = jitted.lower(*arguments).compile().memory_analysis()
        results = memory.output_size_in_bytes - memory.alias_size_in_bytes
        return memory.temp_size_in_bytes + max(0, results)

    began = time.perf_counter()
    batch = rows(batch)
    shapes = flops.batch_shapes(batch)
    reference, cache, phases = 0, 0, {}
    if stage.objective in ("grpo", "ppo"):
        from mm_jax.rl import policy

        rl = stage.rl
        options = build.policy_options(config, stage, build.Stops(0, 0))
        program = policy.Program(plain, stage, options, adapters, compute, 0, 1000)
        held = state_of(program.abstract, program.parts, program.tx, program.shardings)
        weights = jax.eval_shape(lambda s: state.cast(s, compute), program.sampling.params)
        weights = placed(weights, program.sampling.shardings)
        # One chunk is sampled at a time.
        part = jax.tree.map(lambda a: jax.ShapeDtypeStruct(
            (a.shape[0] // rl.chunks, *a.shape[1:]), a.dtype, sharding=a.sharding), batch)  # fmt: skip
        seeds = rows(jax.ShapeDtypeStruct((len(part.tokens), rl.group), jnp.uint32))
        sampling = (weights, part, scalar(jnp.uint32), seeds)
        with jax.set_mesh(mesh):
            features, out = jax.eval_shape(program.rollout, *sampling)
        phases["sampling"] = Phase(size(weights), scratch(program.rollout, *sampling))
        whole = lambda a: jax.ShapeDtypeStruct((stage.batch_size, *a.shape[1:]), a.dtype)  # noqa: E731
        each = jax.ShapeDtypeStruct((stage.batch_size, *out.tokens.shape[1:]), jnp.float32)
        mask = jax.ShapeDtypeStruct(each.shape, bool)
        features, drawn = jax.tree.map(whole, (features, out.tokens))
        responses = rows(policy.Responses(batch, features, drawn, mask))
        recompute = options.critic != "none" or rl.inner_epochs * rl.minibatches > 1
        if rl.beta > 0:
            frozen_copy = jax.eval_shape(lambda s: state.cast(s, compute), held.trainable)
            frozen_copy = placed(frozen_copy, program.shardings.trainable)
            reference = size(frozen_copy)
            phases["scoring"] = Phase(
                0, scratch(program.score, frozen_copy, held.frozen, responses)
            )
        if recompute:
            own = Phase(0, scratch(program.score, held.trainable, held.frozen, responses))
            phases["scoring"] = max(phases.get("scoring", own), own, key=lambda phase: phase.own)
        critic = options.critic != "none"
        lesson = policy.Lesson(
            responses,
            used=mask,
            advantages=each,
            sampler_logps=each,
            old_logps=each if recompute else None,
            ref_logps=each if options.beta > 0 else None,
            old_values=each if critic else None,
            returns=each if critic else None,
        )
        lesson = rows(lesson)
        phases["update"] = Phase(
            size(lesson) - size(batch),
            scratch(
                program.update,
                held.trainable,
                held.opt_state,
                held.step,
                held.frozen,
                lesson,
                scalar(jnp.int32),
            ),
        )
        shapes = flops.batch_shapes(responses)
        scorings = int(rl.beta > 0) + int(recompute)
        total_flops = flops.policy_flops(
            model_config, shapes, tuple(stage.trainable), adapters is not None, scorings,
            rl.inner_epochs,
        )  # fmt: skip
        c = model_config.llm
        count, length = part.tokens.shape
        cache = 2 * c.num_hidden_layers * count * (length + rl.group * rl.max_new_tokens)
        cache *= c.num_key_value_heads * c.head_dim * compute.itemsize
        cache //= batch_parallelism(mesh)
        tokens = math.prod(shapes["tokens"]) + math.prod(drawn.shape)
        splits = stage.accumulation * rl.minibatches
    else:
        abstract = plain
        if adapters:
            add = lambda model, rngs: lora.add_adapters(model, adapters, rngs)  # noqa: E731
            abstract = state.adapted_model(plain, add)
        tx, _ = state.make_optimizer(stage, 1000)
        where = state.state_shardings(abstract, stage.trainable, tx, adapters is not None)
        held = state_of(abstract, stage.trainable, tx, where)
        step = state.jit_train_step(abstract, tx, where, 0, stage.accumulation, stage.token_dropout)
        arguments = (held.trainable, held.opt_state, held.step, held.frozen, batch)
        phases["update"] = Phase(0, scratch(step, *arguments))
        total_flops = flops.train_flops(
            model_config, shapes, tuple(stage.trainable), adapters is not None
        )
        tokens = math.prod(shapes["tokens"])
        splits = stage.accumulation
    kernels = [
        v
        for path, v in nnx.to_flat_state(plain.params)
        if path[:2] == ("language_model", "layers") and path[-1] == "kernel"
    ]
    shards = mesh_sizes["fsdp"] * mesh_sizes["tensor"]
    return Plan(
        trainable=size(held.trainable),
        frozen=size(held.frozen),
        optimizer=size(held.opt_state),
        reference=reference,
        gradients=size(held.trainable),
        batch=size(batch),
        phases=phases,
        cache=cache,
        flops=total_flops,
        seconds_to_compile=time.perf_counter() - began,
        shapes=shapes,
        tokens=tokens,
        matrices=sum(math.prod(v.shape) for v in kernels) * 2 // shards,
        adapters=adapters is not None,
        quantised=adapters is not None and adapters.base != "none",
        micro_batches=stage.accumulation,
        rows_per_device=stage.batch_size // (batch_parallelism(mesh) * splits),
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
    media = stage.objective != "compressor"
    frames = args.frames if model_config.vision and media else 0
    fbank = int(args.audio_seconds * 100) if model_config.audio and media else 0
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
    rows = [
        ("trained parameters", plan.trainable),
        ("frozen parameters", plan.frozen),
        ("optimiser state", plan.optimizer),
        ("reference", plan.reference),
        ("gradients", plan.gradients),
        ("activations and scratch", plan.activations),
        ("batch", plan.batch),
    ]
    lines = [f"mesh {mesh}, {plan.rows_per_device} rows a device and micro-batch"]
    lines += [f"  {name:<24} {size / GB:8.2f} GB" for name, size in rows if size]
    if len(plan.phases) > 1:
        sampling = plan.phases["sampling"]
        lines += [
            f"  {'weights for sampling':<24} {sampling.weights / GB:8.2f} GB",
            f"  {'rollout cache':<24} {plan.cache / GB:8.2f} GB",
        ]
        lines += [
            f"  {f'peak while {name}':<24} {(plan.resident + phase.own) / GB:8.2f} GB"
            for name, phase in plan.phases.items()
        ]
    lines += [
        f"  {'all, a device':<24} {plan.total / GB:8.2f} GB of {hbm / GB:.0f}",
        "shapes: " + ", ".join(f"{k}{list(v)}" for k, v in plan.shapes.items()),
        f"{plan.flops / 1e12:.1f} TFLOP a step; at {args.mfu:.0%} MFU on {devices} {args.device}: "
        f"{seconds:.2f} s, {plan.tokens / seconds:,.0f} tokens/s",
        f"compiled in {plan.seconds_to_compile:.0f} s",
    ]
    return "\n".join(lines)


def remedies(plan: Plan, usable: float) -> list[str]:
    """The first three changes, or combinations, that fit by this plan's sizes.

    Estimates: scratch memory is taken as proportional to the rows of a micro-batch (or of a chunk
    of rollouts), all else to the shards.
    """

    def total(
        rows=1.0, chunks=1.0, shards=1, trained=None, optimizer=1.0, frozen=None, reference=1.0,
        gathered=True,
    ) -> float:  # fmt: skip
        weights = plan.trainable if trained is None else trained
        share = weights / plan.trainable if plan.trainable else 1.0
        kept = plan.frozen if frozen is None else frozen
        own = weights + kept + share * (plan.optimizer * optimizer + plan.reference * reference)
        resident = own / shards + plan.batch
        gradients = plan.gradients * share / shards
        peaks = [gradients + plan.activations * rows]
        for name, phase in plan.phases.items():
            if name == "sampling":
                kept = phase.weights if gathered else phase.weights / plan.shards / shards
                peaks.append(kept + phase.scratch * chunks)
            elif name == "scoring":
                peaks.append(phase.own * rows)
        return resident + max(peaks)

    found = []
    halvings = [2.0**-i for i in range(1, 12) if 2.0**-i >= 1.0 / plan.rows_per_device]

    def offer(text: str, **changes) -> bool:
        fits = total(**changes) <= usable and len(found) < 3
        if fits:
            found.append(f"{text} (about {total(**changes) / GB:.1f} GB)")
        return fits

    def micro(rows: float) -> str:
        return f"accumulation={round(plan.micro_batches / rows)}"

    if "sampling" in plan.phases:
        offer("rl.rollout_weights=training", gathered=False)
        any(offer(f"{round(1 / c)} times rl.chunks", chunks=c) for c in halvings)
    any(offer(micro(rows), rows=rows) for rows in halvings)
    any(
        offer(f"fsdp and tensor over {plan.shards * more} devices", shards=more)
        for more in (2, 4, 8, 16, 32)
    )
    if not plan.adapters:
        lora = dict(trained=plan.matrices // 50, frozen=plan.frozen + plan.matrices)
        offer("lora.rank=64", **lora) or any(
            offer(f"lora.rank=64 and {micro(rows)}", rows=rows, **lora) for rows in halvings
        )
    elif not plan.quantised:
        offer("lora.base=nf4", frozen=plan.frozen - 0.72 * plan.matrices)
    if plan.reference:
        offer("rl.beta=0 (no reference)", reference=0.0)
    offer("momentum_dtype=bfloat16", optimizer=0.75)
    offer("optimizer=adafactor", optimizer=0.02)
    for rows in halvings:
        for more in (2, 4, 8, 16):
            offer(
                f"{micro(rows)} and {plan.shards * more} devices",
                rows=rows, chunks=rows, shards=more,
            )  # fmt: skip
    return found or ["nothing tried: fewer tokens, frames or a smaller model"]
