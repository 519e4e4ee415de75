"""The jitted training step: what it minimises, accumulated gradients, the update, its metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import PartitionSpec

from mm_jax.models.abstract import Abstract
from mm_jax.models.multimood import MultiMood
from mm_jax.models.sharding import replicated
from mm_jax.ops.log_probs import token_log_probs
from mm_jax.ops.partition import BATCH_AXES
from mm_jax.training.state import TrainState

# Modality sets a row may show, in the order of the metrics' `subset_loss`.
SUBSETS = ("text", "audio", "video", "audio_video")


def token_loss(
    model: MultiMood, batch, dropout_key: jax.Array | None = None, token_dropout: float = 0.0
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Summed weighted cross-entropy of the target tokens, and sums for the metrics.

    Reduction: the caller divides by `weight`, so that accumulation over micro-batches and devices
    gives the mean over all target tokens (weighted). float32 scalars, and float32[4] for the
    modality subsets of SUBSETS.
    """
    hidden = model(batch, dropout_key=dropout_key, token_dropout=token_dropout)
    lm = model.language_model
    # Position t predicts token t + 1.
    targets = jnp.roll(batch.tokens, -1, axis=1)
    weights = jnp.roll(batch.loss_weights, -1, axis=1).at[:, -1].set(0)
    logps, best, _ = token_log_probs(
        hidden, lm.head_kernel(), targets, vocab_padding=lm.config.vocab_padding
    )
    counted = weights > 0
    losses = -weights * logps
    shows = lambda token: jnp.any(batch.tokens == token, axis=1)  # noqa: E731
    subset = shows(model.config.audio_token_id) + 2 * shows(model.config.video_token_id)
    rows = jax.nn.one_hot(subset, len(SUBSETS), dtype=jnp.float32)
    return jnp.sum(losses), {
        "weight": jnp.sum(weights),
        "targets": jnp.sum(counted, dtype=jnp.float32),
        "correct": jnp.sum(counted & (best == targets), dtype=jnp.float32),
        "tokens": jnp.sum(batch.mask, dtype=jnp.float32),
        "subset_loss": jnp.sum(losses, axis=1) @ rows,
        "subset_weight": jnp.sum(weights, axis=1) @ rows,
    }


def token_metrics(sums: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {
        "token_accuracy": sums["correct"] / jnp.maximum(sums["targets"], 1),
        **{name: sums[name] for name in ("tokens", "subset_loss", "subset_weight")},
    }


class Objective(NamedTuple):
    """loss(model, batch, dropout_key, token_dropout) -> (summed loss, sums with its "weight");
    metrics(sums) -> metrics; parts: names of trained parts that it puts beside the model."""

    loss: Callable = token_loss
    metrics: Callable = token_metrics
    parts: tuple[str, ...] = ()


TOKENS = Objective()


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
