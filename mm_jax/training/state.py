"""Parameters, optimiser state and the jitted training step."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from mm_jax.models import lora
from mm_jax.models.lora import LoraConfig
from mm_jax.ops.partition import BATCH_AXES
from mm_jax.training.objectives import TOKENS, Objective
from mm_jax.training.sharding import param_shardings, replicated


class TrainState(NamedTuple):
    """trainable: float32 master weights; frozen: weights that get neither gradients nor state."""

    trainable: nnx.State
    frozen: nnx.State
    opt_state: Any
    step: jax.Array


@dataclasses.dataclass(frozen=True)
class Abstract:
    """The model without values: graph, abstract parameters, and where they live."""

    graph: nnx.GraphDef
    params: nnx.State
    shardings: nnx.State
    mesh: Mesh


def abstract_model(create: Callable[[nnx.Rngs], nnx.Module], mesh: Mesh) -> Abstract:
    """Shapes and shardings of a model; nothing is allocated."""
    graph, params = nnx.split(nnx.eval_shape(lambda: create(nnx.Rngs(0))))
    return Abstract(graph, params, param_shardings(params, mesh), mesh)


def init_params(
    create: Callable[[nnx.Rngs], nnx.Module],
    abstract: Abstract,
    seed: int,
    keep: Callable[[tuple], bool] = lambda path: True,
) -> nnx.State:
    """Random parameters, created in place on the mesh; only those at the paths to `keep`."""

    def kept(state: nnx.State) -> nnx.State:
        return nnx.from_flat_state([(p, v) for p, v in nnx.to_flat_state(state) if keep(p)])

    make = jax.jit(
        lambda: kept(nnx.split(create(nnx.Rngs(seed)))[1]), out_shardings=kept(abstract.shardings)
    )
    with jax.set_mesh(abstract.mesh):
        return make()


# Adds parameters to a model in place of nothing: LoRA adapters, a value head.
Adapt = Callable[[nnx.Module, nnx.Rngs], nnx.Module]


def adapted_model(plain: Abstract, adapt: Adapt) -> Abstract:
    """The model with further parameters, from the one without."""

    def create(params):
        return adapt(nnx.merge(plain.graph, params), nnx.Rngs(0))

    graph, params = nnx.split(nnx.eval_shape(create, plain.params))
    return Abstract(graph, params, param_shardings(params, plain.mesh), plain.mesh)


def adapt_params(
    plain: Abstract, adapted: Abstract, adapt: Adapt, params: nnx.State, seed: int, donate: bool
) -> nnx.State:
    """Parameters of the adapted model; with `donate` those of the plain one are given up (where
    kernels are quantised they cannot live in the memory of the plain ones)."""

    def make(params):
        return nnx.split(adapt(nnx.merge(plain.graph, params), nnx.Rngs(seed)))[1]

    jitted = jax.jit(make, out_shardings=adapted.shardings, donate_argnums=(0,) if donate else ())
    with jax.set_mesh(plain.mesh):
        return jitted(params)


def split_trainable(
    params: nnx.State, parts: Sequence[str], adapters: bool = False
) -> tuple[nnx.State, nnx.State]:
    """(trainable, frozen) by the name of the part a parameter belongs to; with `adapters` the
    language model's adapters alone stand for it."""

    def trained(path, _):
        if adapters and path[0] == "language_model":
            return path[0] in parts and lora.is_adapter(path)
        return path[0] in parts

    return nnx.split_state(params, trained, ...)


def cast(state: nnx.State, dtype) -> nnx.State:
    """Kernels and the like in `dtype`; quantised codes and their scales as they are."""

    def one(path, variable):
        value = variable.get_value()
        keep = path[-1] == "kernel_scale" or not jnp.issubdtype(value.dtype, jnp.floating)
        return variable if keep else variable.replace(value.astype(dtype))

    return nnx.from_flat_state([(path, one(path, v)) for path, v in nnx.to_flat_state(state)])


def decayed(params: nnx.State) -> nnx.State:
    """Which parameters weight decay applies to: matrices, by name (stacked biases are 2-D too)."""
    flat = [
        (path, v.replace(str(path[-1]) in ("kernel", "embedding", "lora_a", "lora_b")))
        for path, v in nnx.to_flat_state(params)
    ]
    return nnx.from_flat_state(flat)


class AverageState(NamedTuple):
    """count int32[]: updates so far; average: the running mean of the parameters."""

    count: jax.Array
    average: Any


def average_params(decay: float) -> optax.GradientTransformation:
    """Keeps an exponential moving average of the parameters; updates pass unchanged.

    The last transformation of a chain. The decay of update t is min(decay, (1 + t) / (10 + t)), so
    that random starting weights are soon forgotten.
    """

    def init(params):
        return AverageState(jnp.int32(0), jax.tree.map(jnp.copy, params))

    def update(updates, state, params):
        d = jnp.minimum(decay, (1 + state.count) / (10 + state.count))
        new = optax.apply_updates(params, updates)
        average = jax.tree.map(lambda a, p: d * a + (1 - d) * p, state.average, new)
        return updates, AverageState(state.count + 1, average)

    return optax.GradientTransformation(init, update)


def scale_part(part: str, ratio: float, updates: nnx.State, params) -> nnx.State:
    """The updates with those of one part of the model multiplied by `ratio`."""
    del params
    flat = [
        (path, v.replace(v.get_value() * ratio) if path[0] == part else v)
        for path, v in nnx.to_flat_state(updates)
    ]
    return nnx.from_flat_state(flat)


def make_optimizer(stage, steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Global-norm clipping, AdamW or Adafactor with linear warm-up and cosine decay, and, where the
    stage asks for it, the moving average of the parameters.

    Second moments stay in float32: bfloat16 cannot hold their small steps (1 - b2 = 0.001).
    """
    warmup = max(1, round(stage.warmup * steps)) if stage.warmup else 0
    schedule = optax.warmup_cosine_decay_schedule(
        0.0 if warmup else stage.learning_rate,
        stage.learning_rate,
        warmup,
        max(steps, warmup + 1),
        stage.learning_rate * stage.final_learning_rate,
    )
    decay = dict(weight_decay=stage.weight_decay, mask=decayed)
    if stage.optimizer == "adafactor":
        rule = optax.chain(
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(1.0),
            optax.add_decayed_weights(**decay),
            optax.scale_by_learning_rate(schedule),
        )
    else:
        rule = optax.adamw(schedule, b2=stage.b2, mu_dtype=stage.momentum_dtype, **decay)
    tx = [optax.clip_by_global_norm(stage.clip_norm), rule]
    if stage.compressor_learning_rate:
        ratio = stage.compressor_learning_rate / stage.learning_rate
        tx.append(optax.stateless(functools.partial(scale_part, "mamba_compressor", ratio)))
    if stage.ema_decay:
        tx.append(average_params(stage.ema_decay))
    return optax.chain(*tx), schedule


def state_shardings(
    abstract: Abstract, trainable_parts: Sequence[str], tx, adapters: bool = False
) -> TrainState:
    """Shardings of a whole TrainState; optimiser moments live where their parameters do."""
    trainable, _ = split_trainable(abstract.params, trainable_parts, adapters)
    where, where_frozen = split_trainable(abstract.shardings, trainable_parts, adapters)
    opt = jax.eval_shape(tx.init, trainable)
    everywhere = replicated(abstract.mesh)

    def place(moment, parameter, sharding):
        # Factored moments are vectors; they are small enough to be everywhere.
        return sharding if moment.shape == parameter.shape else everywhere

    opt_where = optax.tree_utils.tree_map_params(
        tx, place, opt, trainable, where, transform_non_params=lambda _: everywhere
    )
    return TrainState(where, where_frozen, opt_where, everywhere)


def start_state(
    params: nnx.State,
    trainable_parts: Sequence[str],
    tx,
    shardings: TrainState,
    frozen_dtype,
    adapters: bool = False,
) -> TrainState:
    """The state before the first step; frozen weights are cast to the compute dtype."""
    trainable, frozen = split_trainable(params, trainable_parts, adapters)
    opt_state = jax.jit(tx.init, out_shardings=shardings.opt_state)(trainable)
    step = jax.device_put(jnp.int32(0), shardings.step)
    return TrainState(trainable, cast(frozen, frozen_dtype), opt_state, step)


def merged_params(state: TrainState) -> nnx.State:
    """All parameters of the model as inference sees them: averaged where the optimiser averages."""
    average = optax.tree_utils.tree_get(state.opt_state, "average", state.trainable)
    return nnx.merge_state(average, state.frozen)


def make_plain_params(plain: Abstract, config: LoraConfig, dtype):
    """`params of the adapted model -> params of the plain one`, adapters merged, jitted."""
    merge = jax.jit(
        lambda params: lora.plain(params, plain.params, config, dtype),
        out_shardings=plain.shardings,
    )

    def run(params):
        with jax.set_mesh(plain.mesh):
            return merge(params)

    return run


def micro_batches(batch, count: int):
    """[B, ...] -> [count, B / count, ...] of every leaf; every device keeps its own rows, so a
    micro-batch takes each count-th row."""
    rows = PartitionSpec(None, BATCH_AXES)

    def split(a):
        a = a.reshape(a.shape[0] // count, count, *a.shape[1:])
        return jax.lax.with_sharding_constraint(jnp.moveaxis(a, 1, 0), rows)

    return jax.tree.map(split, batch)


def jit_train_step(
    abstract: Abstract,
    tx: optax.GradientTransformation,
    shardings: TrainState,
    seed: int,
    accumulation: int,
    token_dropout: float = 0.0,
    objective: Objective = TOKENS,
) -> Callable:
    """The jitted step `(trainable, opt_state, step, frozen, batch) -> ((trainable, opt_state,
    step), metrics)`, to be called or lowered inside `jax.set_mesh`; the first three are donated.

    The loss is the weighted mean over all target tokens (or pairs) of the whole batch, whatever the
    number of micro-batches. Dropout keys are fold_in(seed, step, micro-batch).
    """

    def loss_sum(trainable, frozen, batch, key):
        model = nnx.merge(abstract.graph, trainable, frozen)
        return objective.loss(model, batch, key, token_dropout)

    grad = jax.value_and_grad(loss_sum, has_aux=True)

    def step(state: TrainState, batch):
        key = jax.random.fold_in(jax.random.key(seed), state.step)

        def one(carry, xs):
            index, micro = xs
            (loss, sums), grads = grad(
                state.trainable, state.frozen, micro, jax.random.fold_in(key, index)
            )
            return jax.tree.map(jnp.add, carry, ((loss, sums), grads)), None

        if accumulation == 1:
            (loss, sums), grads = grad(
                state.trainable, state.frozen, batch, jax.random.fold_in(key, 0)
            )
        else:
            micro = micro_batches(batch, accumulation)
            shapes = jax.eval_shape(
                grad, state.trainable, state.frozen, jax.tree.map(lambda a: a[0], micro), key
            )
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            ((loss, sums), grads), _ = jax.lax.scan(one, zeros, (jnp.arange(accumulation), micro))
        scale = 1.0 / jnp.maximum(sums["weight"], 1e-6)
        grads = jax.tree.map(lambda g: g * scale, grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        metrics = {
            "loss": loss * scale,
            **objective.metrics(sums),
            "grad_norm": optax.global_norm(grads),
            "update_norm": optax.global_norm(updates),
            "param_norm": optax.global_norm(trainable),
            **{f"grad_norm/{part}": optax.global_norm(g) for part, g in grads.items()},
        }
        return TrainState(trainable, state.frozen, opt_state, state.step + 1), metrics

    # Frozen weights are an argument of their own, so that only the rest is donated.
    def split_step(trainable, opt_state, step_number, frozen, batch):
        new, metrics = step(TrainState(trainable, frozen, opt_state, step_number), batch)
        return (new.trainable, new.opt_state, new.step), metrics

    return jax.jit(
        split_step,
        donate_argnums=(0, 1, 2),
        out_shardings=(
            (shardings.trainable, shardings.opt_state, shardings.step),
            replicated(abstract.mesh),
        ),
    )


def make_train_step(
    abstract: Abstract,
    tx: optax.GradientTransformation,
    shardings: TrainState,
    seed: int,
    accumulation: int,
    token_dropout: float = 0.0,
    objective: Objective = TOKENS,
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]:
    """`(state, batch) -> (state, metrics)` of `jit_train_step`; the old state is given up."""
    jitted = jit_train_step(abstract, tx, shardings, seed, accumulation, token_dropout, objective)

    def run(state: TrainState, batch):
        with jax.set_mesh(abstract.mesh):
            (trainable, opt_state, number), metrics = jitted(
                state.trainable, state.opt_state, state.step, state.frozen, batch
            )
        return TrainState(trainable, state.frozen, opt_state, number), metrics

    return run


def make_eval_step(abstract: Abstract, objective: Objective = TOKENS):
    """The jitted `(params, batch) -> sums` (scalars) of a loss without dropout."""

    def step(params, batch):
        loss, sums = objective.loss(nnx.merge(abstract.graph, params), batch)
        return {"loss": loss, **{k: v for k, v in sums.items() if v.ndim == 0}}

    jitted = jax.jit(step, out_shardings=replicated(abstract.mesh))

    def run(params, batch):
        with jax.set_mesh(abstract.mesh):
            return jitted(params, batch)

    return run
