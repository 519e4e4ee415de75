"""Models without values: building, initialising and adapting them on a mesh."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
from flax import nnx
from jax.sharding import Mesh

from mm_jax.models.sharding import param_shardings


@dataclasses.dataclass(frozen=True)
class AbstractModel:
    """A model without values: its graph, abstract parameters and their shardings."""

    graph: nnx.GraphDef
    params: nnx.State
    shardings: nnx.State
    mesh: Mesh


def abstract_model(create: Callable[[nnx.Rngs], nnx.Module], mesh: Mesh) -> AbstractModel:
    """Returns a model's graph, shapes and shardings; allocates nothing."""
    graph, params = nnx.split(nnx.eval_shape(lambda: create(nnx.Rngs(0))))
    return AbstractModel(graph, params, param_shardings(params, mesh), mesh)


def init_params(
    create: Callable[[nnx.Rngs], nnx.Module],
    abstract: AbstractModel,
    seed: int,
    keep: Callable[[tuple], bool] = lambda path: True,
) -> nnx.State:
    """Creates random parameters in place on the mesh, only those at paths that `keep` accepts."""

    def kept(state: nnx.State) -> nnx.State:
        return nnx.from_flat_state([(p, v) for p, v in nnx.to_flat_state(state) if keep(p)])

    # It runs once: on a CPU, optimising its hundreds of small kernels takes longer than they do.
    on_cpu = abstract.mesh.devices.flat[0].platform == "cpu"
    make = jax.jit(
        lambda: kept(nnx.split(create(nnx.Rngs(seed)))[1]),
        out_shardings=kept(abstract.shardings),
        compiler_options={"xla_backend_optimization_level": 0} if on_cpu else None,
    )
    with jax.set_mesh(abstract.mesh):
        return make()


# Adds parameters to a model: LoRA adapters or a value head.
Adapt = Callable[[nnx.Module, nnx.Rngs], nnx.Module]


def adapted_model(plain: AbstractModel, adapt: Adapt) -> AbstractModel:
    """Returns the abstract model with the parameters that `adapt` adds."""

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
    """Returns the parameters of the adapted model; with `donate` it consumes the plain ones.

    (Quantised kernels cannot reuse the memory of the plain ones.)
    """

    def make(params):
        return nnx.split(adapt(nnx.merge(plain.graph, params), nnx.Rngs(seed)))[1]

    jitted = jax.jit(make, out_shardings=adapted.shardings, donate_argnums=(0,) if donate else ())
    with jax.set_mesh(plain.mesh):
        return jitted(params)
