"""Builds a stage's optimiser: clipping, AdamW or Adafactor, schedule, moving average."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx


def decayed(params: nnx.State) -> nnx.State:
    """Marks the parameters that weight decay applies to: matrices, not biases or norm scales."""
    # By name, not by rank: layers are stacked, so a bias [L, D] has two dimensions as well.
    flat = [
        (path, v.replace(str(path[-1]) in ("kernel", "embedding", "lora_a", "lora_b")))
        for path, v in nnx.to_flat_state(params)
    ]
    return nnx.from_flat_state(flat)


class AverageState(NamedTuple):
    """Holds count int32[] (updates so far) and the running average of the parameters."""

    count: jax.Array
    average: Any


def average_params(decay: float) -> optax.GradientTransformation:
    """Keeps an exponential moving average of the parameters and passes updates on unchanged.

    Must come last in a chain. The decay of update t is min(decay, (1 + t) / (10 + t)), so that
    random starting weights are soon forgotten.
    """

    def init(params):
        # A copy: the step donates its state, and no buffer can be donated as two arguments.
        return AverageState(jnp.int32(0), jax.tree.map(jnp.copy, params))

    def update(updates, state, params):
        d = jnp.minimum(decay, (1 + state.count) / (10 + state.count))
        new = optax.apply_updates(params, updates)  # as the step itself will apply them
        average = jax.tree.map(lambda a, p: d * a + (1 - d) * p, state.average, new)
        return updates, AverageState(state.count + 1, average)

    return optax.GradientTransformation(init, update)


def clip_by_norm(limit: float) -> optax.GradientTransformationExtraArgs:
    """Scales gradients down to a global norm of `limit`; `norm` is an extra argument of `update`.

    As optax.clip_by_global_norm, which computes the norm once more: a reduction a parameter.
    """

    def update(updates, state, params=None, *, norm: jax.Array, **extra):
        del params, extra
        scale = jnp.where(norm < limit, 1.0, limit / norm)
        return jax.tree.map(lambda g: g * scale.astype(g.dtype), updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def scale_part(part: str, ratio: float, updates: nnx.State, params) -> nnx.State:
    """Multiplies the updates of one part of the model by `ratio`."""
    del params
    flat = [
        (path, v.replace(v.get_value() * ratio) if path[0] == part else v)
        for path, v in nnx.to_flat_state(updates)
    ]
    return nnx.from_flat_state(flat)


def make_optimizer(
    stage, steps: int
) -> tuple[optax.GradientTransformationExtraArgs, optax.Schedule]:
    """Returns the optimiser and its schedule: global-norm clipping, AdamW or Adafactor with linear
    warm-up and cosine decay, and optionally a moving average of the parameters.

    Its `update` takes the gradients' global norm as `norm`. Second moments stay in float32:
    bfloat16 cannot hold their small steps (1 - b2 = 0.001).
    """
    # A warm-up starts at rate 0, so the first update of a stage without one gets the full rate.
    warmup = max(1, round(stage.warmup * steps)) if stage.warmup else 0
    schedule = optax.warmup_cosine_decay_schedule(
        0.0 if warmup else stage.learning_rate,
        stage.learning_rate,
        warmup,
        max(steps, warmup + 1),  # optax refuses a decay of no steps
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
    # Clipping comes first, so that one spike does not enter the moments.
    tx = [clip_by_norm(stage.clip_norm), rule]
    if stage.compressor_learning_rate:
        # After the rule: Adam divides any scale of the gradients out again.
        ratio = stage.compressor_learning_rate / stage.learning_rate
        tx.append(optax.stateless(functools.partial(scale_part, "mamba_compressor", ratio)))
    if stage.ema_decay:
        tx.append(average_params(stage.ema_decay))
    return optax.chain(*tx), schedule
