"""Plans a stage's memory, FLOPs, traffic and time by compiling its functions for virtual devices.

Nothing is allocated: parameters, optimiser state and batches are shapes with shardings, taken from
the stage's own model and functions.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mm_jax.config.errors import ConfigError, one_of
from mm_jax.config.schema import Config
from mm_jax.config.stage import Stage
from mm_jax.data import tokenizer
from mm_jax.data.batch import Batch, Responses, Shape
from mm_jax.data.datasets.common import BUILD_REPORT
from mm_jax.data.shapes import rounded
from mm_jax.models.abstract import AbstractModel, abstract_model
from mm_jax.models.multimood import MultiMoodConfig
from mm_jax.models.sharding import abstract_rows, batch_parallelism, make_mesh
from mm_jax.rl import reward_model
from mm_jax.rl.policy import Policy
from mm_jax.run import build, flops
from mm_jax.run.start import apply_sources
from mm_jax.training.runner import check_batch_size
from mm_jax.training.state import StageModel, TrainState
from mm_jax.training.supervised import TOKENS, make_train_step
from mm_jax.training.traffic import (
    Collective,
    collectives,
    compiled_mesh,
    joined,
    partitioned,
    widened,
)


@dataclasses.dataclass(frozen=True)
class Phase:
    """Holds the bytes per device of one jitted function of a step: `weights` that only it needs,
    and XLA's scratch memory with its results; and what its calls in a step move."""

    weights: int
    scratch: int
    traffic: list[Collective]

    @property
    def own(self) -> int:
        return self.weights + self.scratch


@dataclasses.dataclass(frozen=True)
class Plan:
    """Holds a stage's needs, in bytes per device. `phases` run one after the other, next to all the
    rest ("update" is the step of a supervised stage)."""

    trainable: int
    frozen: int
    optimizer: int
    reference: int
    gradients: int
    batch: int
    phases: dict[str, Phase]
    cache: int  # the running batch of a rollout, in the scratch of sampling
    slots: tuple[int, int]  # of all devices together, and the places of a prompt in one
    decoded: int  # bytes that decoding reads in a step: weights and cache for every token
    flops: float
    seconds_to_compile: float
    shapes: dict[str, tuple[int, ...]]
    tokens: int  # tokens that the language model reads in an update
    matrices: int  # bytes of the language model's dense kernels in bfloat16, per device
    adapters: bool
    quantised: bool
    micro_batches: int
    rows_per_device: int
    shards: int

    @property
    def traffic(self) -> list[Collective]:
        return joined((phase.traffic, 1) for phase in self.phases.values())

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
    """Describes the longest example to plan for, as given on the command line."""

    text_tokens: int
    frames: int
    audio_seconds: float
    utterances: int
    history_tokens: int


@dataclasses.dataclass(frozen=True)
class Measured:
    """Holds what one stage's functions need, in bytes per device."""

    state: TrainState
    phases: dict[str, Phase]
    flops: float
    shapes: dict[str, tuple[int, ...]]
    tokens: int
    micro_batches: int
    reference: int = 0
    cache: int = 0
    slots: tuple[int, int] = (0, 0)
    decoded: int = 0


def make_plan(
    config: Config,
    name: str | None,
    mesh_sizes: dict[str, int],
    example: Longest,
    vocab_size: int | None,
) -> Plan:
    """Plans stage `name` (None: the last). Raises ConfigError."""
    config = apply_sources(config)
    if config.data.label_space or (pathlib.Path(config.data.folder) / BUILD_REPORT).is_file():
        build.check_label_space(config, build.label_space(config))
    name = name or config.stages[-1]
    one_of("--stage", name, list(config.stages))
    precision = "bfloat16" if config.precision == "auto" else config.precision
    config = config.replace(precision=precision, model__attention="xla")
    network = build.model_config(config, Vocabulary(vocab_size or vocabulary_size(config)))
    check_batch_size(config, name, mesh_sizes["data"] * mesh_sizes["fsdp"])
    compiled_sizes = compiled_mesh(mesh_sizes)
    growth = mesh_sizes["data"] // compiled_sizes["data"]
    rows = config.stage[name].batch_size // growth
    stage = config.replace(**{f"stage__{name}__batch_size": rows}).stage[name]
    mesh = make_mesh(compiled_sizes)
    ways = batch_parallelism(mesh)
    plain = abstract_model(build.create_model(config, network), mesh)
    batch = abstract_rows(abstract_batch(config, example, stage, network), mesh)
    began = time.perf_counter()
    measure = measure_reinforcement if stage.reinforces else measure_supervised
    found = measure(config, stage, network, plain, batch)
    seconds = time.perf_counter() - began
    kernels = [
        v
        for path, v in nnx.to_flat_state(plain.params)
        if path[:2] == ("language_model", "layers") and path[-1] == "kernel"
    ]
    shards = mesh_sizes["fsdp"] * mesh_sizes["tensor"]
    return Plan(
        trainable=size(found.state.trainable),
        frozen=size(found.state.frozen),
        optimizer=size(found.state.opt_state),
        reference=found.reference,
        gradients=size(found.state.trainable),
        batch=size(batch),
        phases={
            name: dataclasses.replace(phase, traffic=widened(phase.traffic, growth))
            for name, phase in found.phases.items()
        },
        cache=found.cache,
        slots=(found.slots[0] * growth, found.slots[1]),
        decoded=found.decoded,
        flops=found.flops * growth,
        seconds_to_compile=seconds,
        shapes={k: (n * growth, *rest) for k, (n, *rest) in found.shapes.items()},
        tokens=found.tokens * growth,
        matrices=sum(math.prod(v.shape) for v in kernels) * 2 // shards,
        adapters=stage.lora.rank > 0,
        quantised=stage.lora.rank > 0 and stage.lora.base != "none",
        micro_batches=stage.accumulation,
        rows_per_device=stage.batch_size // (ways * found.micro_batches),
        shards=shards,
    )


# What makes a stage smaller, each step next to all before it, the least first.
LADDER = (
    {"accumulation": "most"},
    {"lora.rank": 16},
    {"lora.base": "int8"},
    {"lora.base": "nf4"},
    {"trainable": ("language_model", "mm_projector")},
    {"inputs": 2},
    {"inputs": 4},
)


def least_change(
    config: Config,
    name: str | None,
    mesh_sizes: dict[str, int],
    example: Longest,
    vocab_size: int | None,
    usable: float,
) -> tuple[str, Plan] | None:
    """Finds the first rung of LADDER with which a stage fits into `usable` bytes per device.

    Every rung that is tried is planned like the stage itself. Returns the options to pass, and the
    plan; None where even the last does not fit.
    """
    name = name or config.stages[-1]
    stage, ways = config.stage[name], mesh_sizes["data"] * mesh_sizes["fsdp"]
    changes: dict = {}
    found, rungs = None, list(range(len(LADDER)))
    while rungs:  # each needs less than those before it
        middle = rungs[len(rungs) // 2]
        changes = {k: v for rung in LADDER[: middle + 1] for k, v in rung.items()}
        inputs = changes.pop("inputs", 1)
        if changes.pop("accumulation"):
            each = max(1, stage.batch_size // ways)
            if stage.reinforces:
                changes |= {"rl.chunks": each}
                each //= stage.rl.minibatches
            changes["accumulation"] = max(stage.accumulation, each)
        if "lora.rank" in changes and stage.lora.rank:
            changes["lora.rank"] = min(stage.lora.rank, 16)
        kept = tuple(m for m in stage.trainable if m in changes.get("trainable", ()))
        if "trainable" in changes:
            changes["trainable"] = kept or stage.trainable[:1]
        smaller = dataclasses.replace(
            example,
            text_tokens=example.text_tokens // inputs,
            frames=max(1, example.frames // inputs),
            history_tokens=example.history_tokens // inputs,
        )
        fields = {f"stage.{name}.{k}".replace(".", "__"): v for k, v in changes.items()}
        try:
            plan = make_plan(config.replace(**fields), name, mesh_sizes, smaller, vocab_size)
        except ConfigError:  # this stage cannot take it
            rungs.remove(middle)
            continue
        if plan.total <= usable:
            words = [f"--config.stage.{name}.{k}={_written(v)}" for k, v in changes.items()]
            if inputs > 1:
                words += [
                    f"--{k}={vars(smaller)[k]}" for k in ("text_tokens", "frames", "history_tokens")
                ]
            found = " ".join(words), plan
            rungs = [rung for rung in rungs if rung < middle]
        else:
            rungs = [rung for rung in rungs if rung > middle]
    return found


def _written(value: object) -> str:
    return f'"{value}"' if isinstance(value, tuple) else str(value)


def measure_supervised(
    config: Config, stage: Stage, network: MultiMoodConfig, plain: AbstractModel, batch: Batch
) -> Measured:
    objective, modules, mesh = TOKENS, (), plain.mesh
    if stage.objective == "preference":
        plain, objective = reward_model.with_head(plain), reward_model.PAIRS
        modules = ("value_head",)
        shape = (stage.batch_size, 2, stage.rl.max_new_tokens)
        answers = [jax.ShapeDtypeStruct(shape, kind) for kind in (jnp.int32, bool)]
        batch = Responses(batch, None, *abstract_rows(answers, mesh))
    compute = build.dtypes(config).compute
    model = StageModel(plain, stage, 1000, compute, head_modules=modules)
    state = model.abstract_state()
    shapes = flops.batch_shapes(batch)
    return Measured(
        state,
        {"update": Phase(0, *compiled(make_train_step(model, 0, objective), mesh, *state, batch))},
        flops.train_flops(network, shapes, stage.trainable, model.lora, head="responses" in shapes),
        shapes,
        math.prod(shapes["tokens"]),
        stage.accumulation,
    )


def measure_reinforcement(
    config: Config, stage: Stage, network: MultiMoodConfig, plain: AbstractModel, batch: Batch
) -> Measured:
    rl, mesh, compute = stage.rl, plain.mesh, build.dtypes(config).compute
    policy = Policy(plain, stage, Vocabulary(8), compute, 0, 1000)
    arguments = policy.abstract_arguments(batch)
    weights, experience = arguments["read"][0], arguments["update"][-2]
    state = TrainState(*arguments["update"][:4])
    scratch, moved = compiled(policy.read.jitted, mesh, *arguments["read"])
    with jax.set_mesh(mesh):
        _, at = jax.eval_shape(policy.read.jitted, *arguments["read"])
        running, block, limits = policy.engine.programs.abstract_arguments(
            at, policy.engine.sizes[-1]
        )
    decoding, decoded = compiled(policy.engine.programs.decode, mesh, weights, running, limits)
    calls = rl.chunks * -(-rl.max_new_tokens // policy.engine.steps)  # at most
    # A chunk that was read waits while the one before it is decoded.
    held = size(running) + size(block)
    scratch = held + max(scratch, decoding)
    moved = [(moved, rl.chunks), (decoded, calls)]
    if rl.rollout_weights == "gathered":
        merged = nnx.merge_state(state.trainable, state.frozen)
        moved.append((compiled(policy.to_rollout.jitted, mesh, merged)[1], 1))
    phases = {"sampling": Phase(size(weights), scratch, joined(moved))}
    scored = ["score_reference"] * (rl.beta > 0) + ["score"] * stage.rescores
    if scored:
        found = [compiled(policy.score.jitted, mesh, *arguments[name]) for name in scored]
        moved = joined((each, 1) for _, each in found)
        phases["scoring"] = Phase(0, max(scratch for scratch, _ in found), moved)
    scratch, moved = compiled(policy.update.jitted, mesh, *arguments["update"])
    moved = joined([(moved, rl.inner_epochs * rl.minibatches)])
    phases["update"] = Phase(size(experience) - size(batch), scratch, moved)
    shapes = flops.batch_shapes(experience.responses)
    cache = size(running)
    read = size(weights["language_model"]) + cache
    return Measured(
        state,
        phases,
        flops.policy_flops(
            network,
            shapes,
            stage.trainable,
            stage.lora.rank > 0,
            len(scored),
            rl.inner_epochs,
        ),
        shapes,
        math.prod(shapes["tokens"]) + math.prod(experience.used.shape),
        stage.accumulation * rl.minibatches,
        reference=size(arguments["score_reference"][0]) if rl.beta > 0 else 0,
        cache=cache,
        slots=running.prefix.mask.shape,
        decoded=read * rl.max_new_tokens * rl.chunks,
    )


def size(tree: Any) -> int:
    """Adds up the bytes per device."""
    return sum(
        math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree)
    )


def compiled(jitted: Any, mesh: jax.sharding.Mesh, *arguments: Any) -> tuple[int, list[Collective]]:
    """Returns the bytes per device that a function takes while it runs, with its results, and what
    a call of it moves."""
    with jax.set_mesh(mesh):
        lowered = jitted.lower(*arguments)
    if mesh.size == 1:  # nothing is partitioned
        program, moved = lowered.compile(), []
    else:
        program, text = partitioned(lowered)
        moved = collectives(text, dict(mesh.shape))
    memory = program.memory_analysis()
    # Results written into donated arguments ("alias") take no memory of their own.
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.temp_size_in_bytes + max(0, results), moved


class Vocabulary:
    """Stands in for a tokenizer where only its size and ids matter."""

    stop_ids, pad_id = (0,), 0

    def __init__(self, size: int):
        self.size = size
        self.video_id, self.audio_id, self.history_id = range(size - 3, size)
        self.text_rows = size - 3

    def __len__(self) -> int:
        return self.size


def vocabulary_size(config: Config) -> int:
    if not config.data.tokenizer:
        return config.data.vocab_size
    return len(tokenizer.load(config.data.tokenizer))


def abstract_batch(
    config: Config, example: Longest, stage: Stage, network: MultiMoodConfig
) -> Batch:
    """Returns the shapes of a global batch of the longest examples, rounded up."""
    lengths = build.span_lengths(network)
    media = stage.objective != "compressor"
    frames = example.frames if network.vision and media else 0
    fbank = int(example.audio_seconds * 100) if network.audio and media else 0
    memories = build.memory_budget(config).count(example.utterances) if network.compressor else 0
    history = example.history_tokens if memories else 0
    tokens = example.text_tokens + memories
    tokens += lengths.video_tokens(frames) if frames else 0
    tokens += lengths.audio_tokens(fbank)
    t, _, a, h, u = rounded(Shape(tokens, frames, fbank, history, memories))
    b = stage.batch_size
    side = network.vision.image_size if frames else 1
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
