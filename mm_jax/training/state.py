"""Defines what a stage trains: its model with adapters and heads, the state, and its shardings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from mm_jax.config.stage import Stage
from mm_jax.models import lora
from mm_jax.models.abstract import AbstractModel, Adapt, adapt_params, adapted_model
from mm_jax.models.sharding import OnMesh, replicated
from mm_jax.run.start import start_adapters
from mm_jax.training.optimizer import make_optimizer


class TrainState(NamedTuple):
    """Holds a stage's float32 master weights (`trainable`), optimiser state, step and `frozen`
    weights, which get neither gradients nor optimiser state.

    A jitted update takes `*state` and returns the first three anew: they are donated, while frozen
    weights stay where they are.
    """

    trainable: nnx.State
    opt_state: Any
    step: jax.Array
    frozen: nnx.State


class Remainder(NamedTuple):
    """Completes trained parameters to a model: its graph and the frozen parameters."""

    graph: nnx.GraphDef
    frozen: nnx.State

    def model(self, trainable: nnx.State) -> nnx.Module:
        return nnx.merge(self.graph, trainable, self.frozen)


class StageModel:
    """Describes a stage's model without values, and turns parameters into a state and back.

    plain: the model without LoRA adapters and heads, as checkpoints for prediction hold it;
    abstract: with both. `add_head(model, rngs)` adds further modules (`head_modules`, trained too).
    """

    def __init__(
        self,
        plain: AbstractModel,
        stage: Stage,
        steps: int,
        frozen_dtype: Any,
        add_head: Adapt | None = None,
        head_modules: tuple[str, ...] = (),
    ):
        self.plain, self.stage, self.frozen_dtype, self.add_head = (
            plain, stage, frozen_dtype, add_head
        )  # fmt: skip
        self.mesh, self.lora = plain.mesh, stage.lora.rank > 0
        self.adapted = self.lora or add_head is not None
        self.abstract = adapted_model(plain, self._adapt) if self.adapted else plain
        self.modules = (*stage.trainable, *head_modules)
        self.tx, self.schedule = make_optimizer(stage, steps)
        self.shardings = state_shardings(self.abstract, self.modules, self.tx, self.lora)
        self._to_plain = OnMesh(
            jax.jit(self.plain_params, out_shardings=plain.shardings), self.mesh
        )

    def _adapt(self, model: nnx.Module, rngs: nnx.Rngs) -> nnx.Module:
        if self.add_head is not None:
            model = self.add_head(model, rngs)
        return lora.add_adapters(model, self.stage.lora, rngs) if self.lora else model

    def start(self, params: nnx.State, seed: int) -> TrainState:
        """Builds the state before the first step from the plain model's parameters, and donates
        them where their memory can be reused."""
        if self.adapted:
            # Quantised kernels cannot live in the memory of the plain ones.
            donate = not self.lora or self.stage.lora.base == "none"
            params = adapt_params(self.plain, self.abstract, self._adapt, params, seed, donate)
        if self.stage.lora.init_from:
            params = start_adapters(self.stage.lora.init_from, params, self.abstract.shardings)
        return start_state(
            params, self.modules, self.tx, self.shardings, self.frozen_dtype, self.lora
        )

    def plain_params(self, params: nnx.State) -> nnx.State:
        """Returns the plain model's parameters: adapters merged, heads left out."""
        like = self.plain.params
        if self.lora:
            return lora.plain(params, like, self.stage.lora, self.frozen_dtype)
        if not self.adapted:
            return params
        flat = dict(nnx.to_flat_state(params))
        return nnx.from_flat_state([(path, flat[path]) for path, _ in nnx.to_flat_state(like)])

    def inference_params(self, state: TrainState) -> nnx.State:
        """Returns the plain model's parameters as prediction and later stages load them."""
        params = merged_params(state)
        return self._to_plain(params) if self.adapted else params

    def abstract_params(self) -> nnx.State:
        """Returns `inference_params` as shapes with shardings."""

        def view(state):
            params = merged_params(state)
            return self.plain_params(params) if self.adapted else params

        return placed(jax.eval_shape(view, self.abstract_state()), self.plain.shardings)

    def abstract_state(self) -> TrainState:
        """Returns the state as shapes with shardings, for the memory plan."""
        trainable, frozen = split_trainable(self.abstract.params, self.modules, self.lora)
        where = self.shardings
        frozen = jax.eval_shape(lambda s: cast(s, self.frozen_dtype), frozen)
        return TrainState(
            placed(trainable, where.trainable),
            placed(jax.eval_shape(self.tx.init, trainable), where.opt_state),
            jax.ShapeDtypeStruct((), jnp.int32, sharding=where.step),
            placed(frozen, where.frozen),
        )


def placed(tree: Any, shardings: Any) -> Any:
    """Gives abstract arrays their shardings."""
    return jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, shardings
    )


def split_trainable(
    params: nnx.State, modules: Sequence[str], adapters: bool = False
) -> tuple[nnx.State, nnx.State]:
    """Splits into (trainable, frozen) by the module a parameter belongs to; with `adapters`, of the
    language model only its adapters are trained."""

    def trained(path, _):
        if adapters and path[0] == "language_model":
            return path[0] in modules and lora.is_adapter(path)
        return path[0] in modules

    return nnx.split_state(params, trained, ...)


def cast(state: nnx.State, dtype: Any) -> nnx.State:
    """Casts floating-point parameters to `dtype`, except the scales of quantised kernels."""

    def one(path, variable):
        value = variable.get_value()
        keep = path[-1] == "kernel_scale" or not jnp.issubdtype(value.dtype, jnp.floating)
        return variable if keep else variable.replace(value.astype(dtype))

    return nnx.from_flat_state([(path, one(path, v)) for path, v in nnx.to_flat_state(state)])


def state_shardings(
    abstract: AbstractModel,
    modules: Sequence[str],
    tx: optax.GradientTransformation,
    adapters: bool = False,
) -> TrainState:
    """Returns the shardings of a whole state; optimiser moments live where their parameters do."""
    trainable, _ = split_trainable(abstract.params, modules, adapters)
    where, where_frozen = split_trainable(abstract.shardings, modules, adapters)
    opt = jax.eval_shape(tx.init, trainable)
    everywhere = replicated(abstract.mesh)

    def place(moment, parameter, sharding):
        # Adafactor's factored moments are vectors: small enough to be replicated.
        return sharding if moment.shape == parameter.shape else everywhere

    opt_where = optax.tree_utils.tree_map_params(
        tx, place, opt, trainable, where, transform_non_params=lambda _: everywhere
    )
    return TrainState(where, opt_where, everywhere, where_frozen)


def start_state(
    params: nnx.State,
    modules: Sequence[str],
    tx: optax.GradientTransformation,
    shardings: TrainState,
    frozen_dtype: Any,
    adapters: bool = False,
) -> TrainState:
    """Builds the state before the first step; frozen weights are cast to the compute dtype."""
    trainable, frozen = split_trainable(params, modules, adapters)
    opt_state = jax.jit(tx.init, out_shardings=shardings.opt_state)(trainable)
    step = jax.device_put(jnp.int32(0), shardings.step)
    return TrainState(trainable, opt_state, step, cast(frozen, frozen_dtype))


def merged_params(state: TrainState) -> nnx.State:
    """Returns all parameters as inference sees them: the moving average where there is one."""
    average = optax.tree_utils.tree_get(state.opt_state, "average", state.trainable)
    return nnx.merge_state(average, state.frozen)
