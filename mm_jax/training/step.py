"""Builds jitted updates: micro-batches, gradient accumulation, the optimiser step, its norms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import PartitionSpec

from mm_jax.data.pipeline import EvalBatch
from mm_jax.models.abstract import AbstractModel
from mm_jax.models.sharding import put_whole_batch, replicated
from mm_jax.ops.partition import BATCH_AXES
from mm_jax.run.ahead import compile_for, shapes_of
from mm_jax.training.state import Remainder, StageModel


def micro_batches(batch: Any, count: int) -> Any:
    """Splits [B, ...] into [count, B / count, ...] in every leaf; micro-batch i takes the rows
    i, i + count, i + 2 count, ..."""
    # A device holds consecutive rows. Strided micro-batches have rows on every device and move
    # none; consecutive ones would lie on a few devices and have to be sent to the others.
    rows = PartitionSpec(None, BATCH_AXES)

    def split(a):
        a = a.reshape(a.shape[0] // count, count, *a.shape[1:])
        return jax.lax.with_sharding_constraint(jnp.moveaxis(a, 1, 0), rows)

    return jax.tree.map(split, batch)


def accumulated(grad: Callable, count: int, join: Callable[[Any], Any]) -> Callable:
    """Wraps `grad(trainable, rest, batch, key, ...) -> ((loss, aux), gradients)` to run over
    `count` micro-batches: sums losses and gradients, joins the stacked aux by `join`.

    The key of micro-batch i is fold_in(key, i); with `count` 1, `grad` is returned as it is.
    """
    if count == 1:  # neither a loop nor a second buffer for the gradients
        return grad

    def over_micro_batches(trainable, rest, batch, key, *settings):
        def one(grads, xs):
            index, part = xs
            part_key = jax.random.fold_in(key, index)
            out, new = grad(trainable, rest, part, part_key, *settings)
            return jax.tree.map(jnp.add, grads, new), out

        # Sums are kept in the parameters' float32: bfloat16 would lose the later micro-batches.
        zeros = jax.tree.map(jnp.zeros_like, trainable)
        parts = (jnp.arange(count), micro_batches(batch, count))
        grads, (losses, aux) = jax.lax.scan(one, zeros, parts)
        return (jnp.sum(losses), join(aux)), grads

    return over_micro_batches


SMALL = 1 << 17  # elements


def global_norm(tree: Any) -> jax.Array:
    """Computes the norm of all arrays together, float32[].

    On one device small arrays are joined first: a reduction of each would take a quarter of the
    time that a small model's step compiles on a CPU. On several they are sharded and stay apart.
    """
    leaves = [x.astype(jnp.float32) for x in jax.tree.leaves(tree)]
    if jax.sharding.get_abstract_mesh().size == 1:
        small = [x.ravel() for x in leaves if x.size <= SMALL]
        leaves = [x for x in leaves if x.size > SMALL]
        leaves += [jnp.concatenate(small)] if small else []
    return optax.global_norm(leaves)


def apply_gradients(
    tx: optax.GradientTransformationExtraArgs,
    grads: nnx.State,
    opt_state: Any,
    trainable: nnx.State,
) -> tuple[nnx.State, Any, dict[str, jax.Array]]:
    """Applies one optimiser step; returns the new parameters, optimiser state, and norms."""
    # Gradient norms are those before clipping, which is part of `tx`: spikes stay visible.
    parts = {part: global_norm(g) for part, g in grads.items()}
    norm = optax.global_norm(parts)
    updates, opt_state = tx.update(grads, opt_state, trainable, norm=norm)
    new = optax.apply_updates(trainable, updates)
    norms = {
        "grad_norm": norm,
        "update_norm": global_norm(updates),
        "param_norm": global_norm(new),
        **{f"grad_norm/{part}": value for part, value in parts.items()},
    }
    return new, opt_state, norms


def jit_update(update: Callable, model: StageModel) -> Callable:
    """Jits `(*TrainState, ...) -> ((trainable, opt_state, step), metrics)` and donates the first
    three arguments; call or lower it with the mesh set."""
    # XLA writes the new state into the donated buffers, so that weights and moments exist once.
    # That needs outputs laid out like the inputs, hence explicit shardings; they also keep the next
    # call from seeing other input shardings and compiling again.
    where = model.shardings
    return jax.jit(
        update,
        donate_argnums=(0, 1, 2),
        out_shardings=((where.trainable, where.opt_state, where.step), replicated(model.mesh)),
    )


class Validation:
    """Computes the loss without dropout and its scalar sums over batches of val.

    `blank(batch, real)` removes from the loss the rows that only fill up the last batch.
    """

    def __init__(
        self,
        abstract: AbstractModel,
        loss: Callable,
        loader: Callable,
        batches: Sequence[EvalBatch],
        blank: Callable[[Any, int], None],
    ):
        self.mesh, self.loader, self.batches, self.blank = abstract.mesh, loader, batches, blank

        def validation_step(params, batch):
            value, sums = loss(params, Remainder(abstract.graph, nnx.State({})), batch)
            return {"loss": value, **{k: v for k, v in sums.items() if v.ndim == 0}}

        self.step = jax.jit(validation_step, out_shardings=replicated(abstract.mesh))

    def compile(self, params: nnx.State) -> None:
        """Compiles what a call needs, for parameters as shapes with shardings."""
        first = {rows.shape: rows for rows, _ in self.batches}
        for rows in first.values():
            compile_for(
                self.step, params, shapes_of(put_whole_batch(self.loader(rows)[1], self.mesh))
            )

    def __call__(self, params: nnx.State) -> dict[str, float]:
        sums: dict[str, float] = {}
        for rows, real in self.batches:
            _, batch = self.loader(rows)
            self.blank(batch, real)  # the last batch keeps its shape: nothing is compiled for it
            with jax.set_mesh(self.mesh):
                got = jax.device_get(self.step(params, put_whole_batch(batch, self.mesh)))
            sums = {k: sums.get(k, 0.0) + float(v) for k, v in got.items()}
        return sums
