"""Parameters, optimiser state and the jitted training step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from mm_jax.models import lora
from mm_jax.models.abstract import Abstract
from mm_jax.models.lora import LoraConfig
from mm_jax.models.sharding import replicated


class TrainState(NamedTuple):
    """trainable: float32 master weights; frozen: weights that get neither gradients nor state."""

    trainable: nnx.State
    frozen: nnx.State
    opt_state: Any
    step: jax.Array


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
