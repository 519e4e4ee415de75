"""What a stage needs, found by compiling its functions ahead of time on virtual devices.

Nothing is allocated: parameters, optimiser state and batches are shapes with shardings.
"""

from __future__ import annotations

import dataclasses
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mm_jax.config.errors import one_of
from mm_jax.data import tokenizer
from mm_jax.data.batch import Batch, Responses
from mm_jax.models import abstract, lora
from mm_jax.models.sharding import batch_parallelism, batch_sharding, make_mesh, replicated
from mm_jax.rl import policy, reward_model
from mm_jax.run import build
from mm_jax.run.start import apply_sources
from mm_jax.stages import check_batch_size
from mm_jax.training import flops, optimizer, state, step
from mm_jax.training.step import TOKENS


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
    decoded: int  # bytes of the memory that a step's decoding reads: weights and cache, every token
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


@dataclasses.dataclass(frozen=True)
class Longest:
    """An example at its longest, as the command line gives it."""

    text_tokens: int
    frames: int
    audio_seconds: float
    utterances: int
    history_tokens: int


def make_plan(
    config, name: str | None, mesh_sizes: dict[str, int], example: Longest, vocab_size: int | None
) -> Plan:
    """The plan of stage `name` (None: the last). Raises ConfigError."""
    apply_sources(config)
    build.validate(config)
    name = name or config.stages[-1]
    one_of("--stage", name, list(config.stages))
    stage = config.stage[name]
    with config.unlocked():
        config.precision = "bfloat16" if config.precision == "auto" else config.precision
        config.model.attention = "xla"
    words = Vocabulary(vocab_size or vocabulary_size(config))
    model_config = build.model_config(config, words)
    mesh = make_mesh(mesh_sizes)
    ways = batch_parallelism(mesh)
    check_batch_size(stage, name, ways)
    plain = abstract.abstract_model(build.create_model(config, model_config), mesh)
    batch = rows(abstract_batch(config, example, stage, model_config), mesh)
    adapters = build.lora_config(stage)
    began = time.perf_counter()
    plan_stage = plan_policy if stage.objective in ("grpo", "ppo") else plan_supervised
    found = plan_stage(config, stage, model_config, plain, batch, adapters)
    kernels = [
        v
        for path, v in nnx.to_flat_state(plain.params)
        if path[:2] == ("language_model", "layers") and path[-1] == "kernel"
    ]
    shards = mesh_sizes["fsdp"] * mesh_sizes["tensor"]
    held, micro = found.pop("held"), found.pop("micro")
    return Plan(
        trainable=size(held.trainable),
        frozen=size(held.frozen),
        optimizer=size(held.opt_state),
        gradients=size(held.trainable),
        batch=size(batch),
        seconds_to_compile=time.perf_counter() - began,
        matrices=sum(math.prod(v.shape) for v in kernels) * 2 // shards,
        adapters=adapters is not None,
        quantised=adapters is not None and adapters.base != "none",
        micro_batches=stage.accumulation,
        rows_per_device=stage.batch_size // (ways * micro),
        shards=shards,
        **found,
    )


def plan_supervised(config, stage, model_config, plain, batch, adapters) -> dict:
    abstract, objective = plain, TOKENS
    if stage.objective == "preference":
        abstract, objective = reward_model.with_head(plain), reward_model.PAIRS
        length = stage.rl.max_new_tokens
        tokens = jax.ShapeDtypeStruct((stage.batch_size, 2, length), jnp.int32)
        mask = jax.ShapeDtypeStruct(tokens.shape, bool)
        batch = rows(Responses(batch, None, tokens, mask), plain.mesh)
    if adapters:
        add = lambda model, rngs: lora.add_adapters(model, adapters, rngs)  # noqa: E731
        abstract = abstract.adapted_model(abstract, add)
    tx, _ = optimizer.make_optimizer(stage, 1000)
    parts = (*stage.trainable, *objective.parts)
    where = state.state_shardings(abstract, parts, tx, adapters is not None)
    held = abstract_state(config, abstract, parts, tx, where, adapters)
    train_step = step.jit_train_step(
        abstract, tx, where, 0, stage.accumulation, stage.token_dropout, objective
    )
    arguments = (held.trainable, held.opt_state, held.step, held.frozen, batch)
    shapes = flops.batch_shapes(batch)
    return dict(
        held=held,
        phases={"update": Phase(0, scratch(train_step, plain.mesh, *arguments))},
        reference=0,
        cache=0,
        decoded=0,
        flops=flops.train_flops(model_config, shapes, tuple(stage.trainable), adapters is not None),
        shapes=shapes,
        tokens=math.prod(shapes["tokens"]),
        micro=stage.accumulation,
    )


def plan_policy(config, stage, model_config, plain, batch, adapters) -> dict:
    rl, mesh = stage.rl, plain.mesh
    compute = build.dtypes(config).compute
    options = build.policy_options(config, stage, build.Stops(0, 0))
    program = policy.Program(plain, stage, options, adapters, compute, 0, 1000)
    held = abstract_state(
        config, program.abstract, program.parts, program.tx, program.shardings, adapters
    )
    phases = {}
    # One chunk is sampled at a time.
    weights = placed(cast(program.sampling.params, compute), program.sampling.shardings)
    chunk = stage.batch_size // rl.chunks
    part = rows(jax.tree.map(lambda a: resized(a, chunk), batch), mesh)
    seeds = rows(jax.ShapeDtypeStruct((chunk, rl.group), jnp.uint32), mesh)
    number = jax.ShapeDtypeStruct((), jnp.uint32, sharding=replicated(mesh))
    with jax.set_mesh(mesh):
        features, out = jax.eval_shape(program.rollout, weights, part, number, seeds)
    phases["sampling"] = Phase(
        size(weights), scratch(program.rollout, mesh, weights, part, number, seeds)
    )
    features, drawn = jax.tree.map(lambda a: resized(a, stage.batch_size), (features, out.tokens))
    each = jax.ShapeDtypeStruct(drawn.shape, jnp.float32)
    used = jax.ShapeDtypeStruct(drawn.shape, bool)
    responses = rows(Responses(batch, features, drawn, used), mesh)
    recompute = options.critic != "none" or rl.inner_epochs * rl.minibatches > 1
    reference = None
    if rl.beta > 0:
        reference = placed(cast(held.trainable, compute), program.shardings.trainable)
    scored = [reference] * (reference is not None) + [held.trainable] * recompute
    if scored:
        found = [scratch(program.score, mesh, s, held.frozen, responses) for s in scored]
        phases["scoring"] = Phase(0, max(found))
    critic = options.critic != "none"
    lesson = policy.Lesson(
        responses,
        used=used,
        advantages=each,
        sampler_logps=each,
        old_logps=each if recompute else None,
        ref_logps=each if options.beta > 0 else None,
        old_values=each if critic else None,
        returns=each if critic else None,
    )
    lesson = rows(lesson, mesh)
    index = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh))
    arguments = (held.trainable, held.opt_state, held.step, held.frozen, lesson, index)
    phases["update"] = Phase(size(lesson) - size(batch), scratch(program.update, mesh, *arguments))
    shapes = flops.batch_shapes(responses)
    c, length = model_config.llm, shapes["tokens"][1]
    slots = chunk // batch_parallelism(mesh) * (length + rl.group * rl.max_new_tokens)
    cache = 2 * c.num_hidden_layers * slots * c.num_key_value_heads * c.head_dim * compute.itemsize
    read = size(weights["language_model"]) + cache
    return dict(
        held=held,
        phases=phases,
        reference=size(reference),
        cache=cache,
        decoded=read * rl.max_new_tokens * rl.chunks,
        flops=flops.policy_flops(
            model_config,
            shapes,
            tuple(stage.trainable),
            adapters is not None,
            len(scored),
            rl.inner_epochs,
        ),
        shapes=shapes,
        tokens=math.prod(shapes["tokens"]) + math.prod(drawn.shape),
        micro=stage.accumulation * rl.minibatches,
    )


def abstract_state(config, abstract, parts, tx, where, adapters) -> state.TrainState:
    """The state of a stage as shapes with shardings."""
    trainable, frozen = state.split_trainable(abstract.params, parts, adapters is not None)
    return state.TrainState(
        placed(trainable, where.trainable),
        placed(cast(frozen, build.dtypes(config).compute), where.frozen),
        placed(jax.eval_shape(tx.init, trainable), where.opt_state),
        jax.ShapeDtypeStruct((), jnp.int32, sharding=where.step),
    )


def cast(params, dtype):
    return jax.eval_shape(lambda s: state.cast(s, dtype), params)


def placed(tree, shardings):
    return jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, shardings
    )


def rows(tree, mesh):
    """Shapes whose first axis lies over the mesh as the rows of a batch do."""
    where = batch_sharding(mesh)
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where), tree)


def resized(a, count: int):
    return jax.ShapeDtypeStruct((count, *a.shape[1:]), a.dtype)


def size(tree) -> int:
    """Bytes a device."""
    return sum(
        math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree)
    )


def scratch(jitted, mesh, *arguments) -> int:
    """Bytes a device that a function takes while it runs, with its results."""
    with jax.set_mesh(mesh):
        memory = jitted.lower(*arguments).compile().memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.temp_size_in_bytes + max(0, results)


class Vocabulary:
    """The size of a tokenizer and ids for its placeholders, where only shapes matter."""

    def __init__(self, size: int):
        self.size = size
        self.video_id, self.audio_id, self.history_id = range(size - 3, size)
        self.text_rows = size - 3

    def __len__(self) -> int:
        return self.size


def vocabulary_size(config) -> int:
    if not config.data.tokenizer:
        return config.data.vocab_size
    return len(tokenizer.load(config.data.tokenizer))


def abstract_batch(config, example: Longest, stage, model_config) -> Batch:
    """A global batch at its longest, as shapes, padded to the config's buckets."""
    plan = build.sequence_plan(model_config)
    media = stage.objective != "compressor"
    frames = example.frames if model_config.vision and media else 0
    fbank = int(example.audio_seconds * 100) if model_config.audio and media else 0
    budget = build.memory_budget(config)
    memories = budget.count(example.utterances) if model_config.compressor else 0
    history = example.history_tokens if memories else 0
    tokens = example.text_tokens + memories
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
