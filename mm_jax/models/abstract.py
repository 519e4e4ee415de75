"""A model without values: its graph, the shapes of its parameters, and where they live."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
from flax import nnx
from jax.sharding import Mesh

from mm_jax.models.sharding import param_shardings


@dataclasses.dataclass(frozen=True)
class AbstractModel:
    """The model without values: graph, abstract parameters, and where they live."""

    graph: nnx.GraphDef
    params: nnx.State
    shardings: nnx.State
    mesh: Mesh


def abstract_model(create: Callable[[nnx.Rngs], nnx.Module], mesh: Mesh) -> AbstractModel:
    """Shapes and shardings of a model; nothing is allocated."""
    graph, params = nnx.split(nnx.eval_shape(lambda: create(nnx.Rngs(0))))
    return AbstractModel(graph, params, param_shardings(params, mesh), mesh)


def init_params(
    create: Callable[[nnx.Rngs], nnx.Module],
    abstract: AbstractModel,
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


def adapted_model(plain: AbstractModel, adapt: Adapt) -> AbstractModel:
    """The model with further parameters, from the one without."""

    def create(params):
        return adapt(nnx.merge(plain.graph, params), nnx.Rngs(0))

    graph, params = nnx.split(nnx.eval_shape(create, plain.params))
    return AbstractModel(graph, params, param_shardings(params, plain.mesh), plain.mesh)


def adapt_params(
    plain: AbstractModel,
    adapted: AbstractModel,
    adapt: Adapt,
    params: nnx.State,
    seed: int,
    donate: bool,
) -> nnx.State:
    """Parameters of the adapted model; with `donate` those of the plain one are given up (where
    kernels are quantised they cannot live in the memory of the plain ones)."""

    def make(params):
        return nnx.split(adapt(nnx.merge(plain.graph, params), nnx.Rngs(seed)))[1]

    jitted = jax.jit(make, out_shardings=adapted.shardings, donate_argnums=(0,) if donate else ())
    with jax.set_mesh(plain.mesh):
        return jitted(params)
