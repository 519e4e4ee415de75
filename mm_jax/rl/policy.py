"""Defines the policy of a reinforcement stage and its jitted functions: rollout, scoring,
advantages and update, and PPO's critic.

Work is done once per prompt where possible: frozen towers run once for rollout, scoring and all
updates; the prompt is prefilled once and its cache is read by all G samples; in scoring and update
the prompt stands once before its G responses (`Decoder.shared_prefix`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from mm_jax.config.stage import Stage
from mm_jax.data.batch import Batch, Responses
from mm_jax.generation import sampler
from mm_jax.generation.engine import Engine
from mm_jax.generation.slots import Drawing
from mm_jax.models.abstract import AbstractModel, adapted_model
from mm_jax.models.decoder import Decoder
from mm_jax.models.layers import Dtypes, linear
from mm_jax.models.multimood import MultiMood
from mm_jax.models.sharding import (
    ROLLOUT_RULES,
    OnMesh,
    abstract_rows,
    batch_sharding,
    param_shardings,
)
from mm_jax.ops.log_probs import token_log_probs
from mm_jax.ops.partition import rows_apart
from mm_jax.rl import losses
from mm_jax.rl.advantages import gae, group_advantages, masked_mean, token_rewards, whiten
from mm_jax.run.ahead import compile_for
from mm_jax.training.state import Remainder, StageModel, TrainState, cast, merged_params, placed
from mm_jax.training.step import accumulated, apply_gradients, jit_update, micro_batches

TOWERS = ("vision_tower", "audio_tower")


class StopIds(Protocol):
    """Describes what sampling needs of a tokenizer."""

    stop_ids: tuple[int, ...]
    pad_id: int


class TokenScores(NamedTuple):
    """Holds, for every response token, float32[B, G, R]: log-probability and entropy at the
    sampling temperature, and the value of the state before it (None without a critic)."""

    logps: jax.Array
    entropy: jax.Array
    values: jax.Array | None


class Experience(NamedTuple):
    """Holds what an update learns from: responses; used bool[B, G, R], the tokens that count; the
    rest float32[B, G, R]. `old_logps` None: the update is on policy."""

    responses: Responses
    used: jax.Array
    advantages: jax.Array
    sampler_logps: jax.Array
    old_logps: jax.Array | None
    ref_logps: jax.Array | None
    old_values: jax.Array | None
    returns: jax.Array | None


# ---- the critic --------------------------------------------------------------------------------


def add_critic(model: MultiMood, rngs: nnx.Rngs, critic: str = "shared") -> MultiMood:
    """Adds a value head to the policy, and for "own" a second trunk; values start at 0."""
    lm = model.language_model
    width = lm.config.hidden_size
    model.value_head = linear(
        width, 1, ("embed", None), bias=True, dtypes=Dtypes(compute=jnp.float32), rngs=rngs
    )
    model.value_head.kernel.set_value(jnp.zeros((width, 1), jnp.float32))
    if critic == "own":
        config = dataclasses.replace(lm.config, tie_word_embeddings=True)  # it has no head
        dtypes = Dtypes(compute=lm.dtype)
        model.value_model = Decoder(
            config, dtypes=dtypes, rngs=rngs, remat=lm.remat, attention=lm.attention
        )
        policy = dict(nnx.to_flat_state(nnx.state(lm)))
        # The trunk is trained, so it stays in float32 even where the policy is frozen in bfloat16.
        own = [
            (path, variable.replace(policy[path].get_value().astype(variable.dtype)))
            for path, variable in nnx.to_flat_state(nnx.state(model.value_model))
        ]
        nnx.update(model.value_model, nnx.from_flat_state(own))
    return model


# ---- scoring -----------------------------------------------------------------------------------


class Rows(NamedTuple):
    """Holds responses as they are computed: tokens, places in their response int32[B, P, R], mask
    bool[B, P, R]; places is None where each response has a row of its own (P = G)."""

    tokens: jax.Array
    mask: jax.Array
    places: jax.Array | None


def as_rows(responses: Responses) -> Rows:
    if responses.packing is None:
        return Rows(responses.tokens, responses.mask, None)
    source, length = responses.packing.source, responses.tokens.shape[2]
    flat = lambda x: x.reshape(len(x), -1)  # noqa: E731
    at = jnp.maximum(flat(source), 0)
    tokens = jnp.take_along_axis(flat(responses.tokens), at, axis=1).reshape(source.shape)
    return Rows(tokens, source >= 0, jnp.where(source >= 0, source % length, 0))


def of_responses(packed: jax.Array, responses: Responses) -> jax.Array:
    """Takes values [B, P, R] of rows back to the responses they belong to, [B, G, R]."""
    if responses.packing is None:
        return packed
    target = responses.packing.target
    flat = packed.reshape(len(packed), -1)
    found = jnp.take_along_axis(flat, target.reshape(len(flat), -1), axis=1)
    return jnp.where(responses.mask, found.reshape(target.shape), 0)


def states_before(lm: Decoder, prompt: jax.Array, mask: jax.Array, rows: Rows) -> jax.Array:
    """Returns the hidden states [B, P, R, D] that predict every response token; mask bool[B, T] of
    the prompts."""
    # The prompt's last state predicts the first response token; a response's last state predicts
    # nothing that was sampled.
    tails = lm.embed(rows.tokens)
    last, hidden = lm.shared_prefix(prompt, mask, tails, rows.mask, rows.places)
    first = jnp.broadcast_to(last[:, None, None], hidden[:, :, :1].shape)
    before = jnp.concatenate([first, hidden[:, :, :-1]], axis=2)
    if rows.places is None:
        return before
    return jnp.where((rows.places == 0)[..., None], last[:, None, None], before)


def score_responses(model: MultiMood, responses: Responses, stage: Stage) -> TokenScores:
    """Computes log-probabilities, entropies and values of the response tokens."""
    prompt = model.embed(responses.batch, responses.features)
    mask, rows = responses.batch.mask, as_rows(responses)
    if not stage.rl.shared_prefix:  # every response gets a copy of its prompt
        group = responses.tokens.shape[1]
        prompt, mask = (jnp.repeat(x, group, axis=0) for x in (prompt, mask))
        alone = lambda x: x.reshape(-1, 1, x.shape[2])  # noqa: E731
        rows = Rows(alone(responses.tokens), alone(responses.mask), None)
    lm = model.language_model
    before = states_before(lm, prompt, mask, rows)
    flat = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
    found = token_log_probs(
        flat(before),
        lm.head_kernel(),
        flat(rows.tokens),
        stage.rl.temperature,
        vocab_padding=lm.config.vocab_padding,
        counted=flat(rows.mask),
    )

    def back(x):
        return of_responses(x.reshape(len(responses.tokens), -1, x.shape[-1]), responses)

    values = None
    if stage.critic != "none":
        if stage.critic == "own":
            # The value loss trains the critic's trunk, not the connectors that feed the prompt.
            before = states_before(model.value_model, jax.lax.stop_gradient(prompt), mask, rows)
        values = back(flat(model.value_head(before.astype(jnp.float32))[..., 0]))
    return TokenScores(back(found.logps), back(found.entropy), values)


# ---- advantages of PPO --------------------------------------------------------------------------


def token_advantages(
    logps: jax.Array,
    ref_logps: jax.Array,
    values: jax.Array,
    mask: jax.Array,
    rewards: jax.Array,
    kl_coef: jax.Array,
    *,
    gamma: float,
    lam: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes PPO's whitened advantages, returns and sampled KL (k1), each float32[B, G, R].

    logps, ref_logps, values float32[B, G, R]; mask bool[B, G, R]; rewards float32[B, G].
    """
    shape = mask.shape
    flat = lambda x: x.reshape(-1, shape[-1])  # noqa: E731
    real = flat(mask)
    kl = jnp.where(real, losses.k1(flat(logps), flat(ref_logps)), 0.0)
    last = jnp.maximum(jnp.sum(real, axis=1) - 1, 0)
    token = jnp.where(real, token_rewards(kl, rewards.reshape(-1), last, kl_coef), 0.0)
    advantages, returns = gae(token, jnp.where(real, flat(values), 0.0), gamma, lam)
    advantages = jnp.where(real, whiten(advantages, real), 0.0)
    back = lambda x: x.reshape(shape)  # noqa: E731
    return back(advantages), back(returns), back(kl)


# ---- the jitted functions ----------------------------------------------------------------------


def jit_read(abstract: AbstractModel, with_features: bool) -> Callable:
    """Jits `(params, batch) -> (features, Decoding)`: reads prompts into caches.

    `abstract`: the plain model, with its layers apart or stacked; the parameters may be sharded by
    other rules than its own.
    """

    def read(params, batch):
        model = nnx.merge(abstract.graph, params)
        features = jax.tree.map(rows_apart, model.features(batch))
        at = sampler.prefill(model, batch, features=features)
        return (features if with_features else None), at

    return jax.jit(read)


def jit_scorer(abstract: AbstractModel, stage: Stage, micro: int) -> Callable:
    """Jits `(trainable, frozen, responses) -> TokenScores` without gradients."""

    def score(trainable, frozen, responses):
        def one(part):
            model = nnx.merge(abstract.graph, trainable, frozen)
            return score_responses(model, part, stage)

        # As many rows at a time as an update takes, so that scoring needs no more memory than it.
        if micro == 1:
            return one(responses)
        parts = jax.lax.map(one, micro_batches(responses, micro))
        join = lambda a: jnp.moveaxis(a, 0, 1).reshape(-1, *a.shape[2:])  # noqa: E731
        return jax.tree.map(join, parts)

    return jax.jit(score, out_shardings=batch_sharding(abstract.mesh))


def response_weights(used: jax.Array, stage: Stage) -> jax.Array:
    """Computes `losses.token_weights` of used bool[B, G, R]; micro-batches are split by prompts."""
    rl = stage.rl
    # bnpo's means are over a micro-batch, so a prompt's responses count as one row there.
    flat = used.reshape(used.shape[0], -1) if rl.reduction == "bnpo" else used
    flat = flat.reshape(-1, flat.shape[-1])
    weights = losses.token_weights(flat, rl.reduction, rl.max_new_tokens, stage.accumulation)
    return weights.reshape(used.shape)


def experience_loss(
    trainable: nnx.State, rest: Remainder, data: tuple[Experience, jax.Array], key, stage: Stage
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes the policy loss of (experience, token weights), plus the value loss with a critic;
    metrics include the number of `used_tokens`."""
    del key  # no dropout: the update must see what the rollout was sampled from
    experience, weights = data
    scored = score_responses(rest.model(trainable), experience.responses, stage)
    flat = lambda x: x.reshape(-1, x.shape[-1])  # noqa: E731
    # On policy the old log-probabilities are those of this very pass: the ratio is exactly 1, and
    # its gradient is that of the log-probability.
    old = experience.old_logps
    old = jax.lax.stop_gradient(scored.logps) if old is None else old
    mask, rl = flat(experience.used), stage.rl
    loss, metrics = losses.policy_loss(
        flat(scored.logps),
        flat(old),
        flat(experience.advantages),
        mask,
        flat(weights),
        clip_low=rl.clip_low,
        clip_high=rl.clip_high,
        clip_max=rl.clip_max or None,
        ref_logps=None if experience.ref_logps is None else flat(experience.ref_logps),
        beta=stage.loss_beta,
        level=rl.level,
    )
    metrics["entropy"] = masked_mean(flat(scored.entropy), mask)
    if stage.critic != "none":
        value, more = losses.value_loss(
            flat(scored.values),
            flat(experience.old_values),
            flat(experience.returns),
            mask,
            flat(weights),
            rl.value_clip,
        )
        loss = loss + rl.value_coef * value
        metrics.update(more, value_loss=value)
    # Sampler and trainer compute the same log-probabilities in different programs. A gap beyond
    # rounding says that they disagree on the model.
    gap = jnp.abs(old - experience.sampler_logps)
    metrics["sampler_gap"] = masked_mean(flat(gap), mask)
    metrics["sampler_gap_max"] = jnp.max(jnp.where(experience.used, gap, 0.0))
    metrics["used_tokens"] = jnp.sum(experience.used)
    return loss, metrics


def joined_metrics(each: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Joins micro-batches' metrics: max for `*_max`, sums for sums, else means over tokens."""
    tokens = each["used_tokens"]
    share = tokens / jnp.maximum(jnp.sum(tokens), 1)

    def join(name: str, values: jax.Array) -> jax.Array:
        if name.endswith("_max"):
            return jnp.max(values)
        # The value loss of a micro-batch is its part of the sum, already weighted.
        return jnp.sum(values if name in ("value_loss", "used_tokens") else values * share)

    return {name: join(name, values) for name, values in each.items()}


def make_update(model: StageModel) -> Callable:
    """Jits `(*state, experience, index) -> ((trainable, opt_state, step), metrics)`: one optimiser
    step on the `index`-th of `rl.minibatches` shares of the prompts (see `jit_update`)."""
    stage, graph = model.stage, model.abstract.graph
    grad = accumulated(
        jax.value_and_grad(experience_loss, has_aux=True), stage.accumulation, joined_metrics
    )

    def update(trainable, opt_state, number, frozen, experience, index):
        if stage.rl.minibatches > 1:
            parts = micro_batches(experience, stage.rl.minibatches)
            experience = jax.tree.map(lambda a: a[index], parts)
        data = (experience, response_weights(experience.used, stage))
        key = jax.random.key(0)  # unused: there is no dropout
        (loss, metrics), grads = grad(trainable, Remainder(graph, frozen), data, key, stage)
        new, opt_state, norms = apply_gradients(model.tx, grads, opt_state, trainable)
        return (new, opt_state, number + 1), {**metrics, "loss": loss, **norms}

    return jit_update(update, model)


class Policy:
    """Holds a stage's policy without parameter values: its models, shardings and functions.

    model: with critic and adapters (`StageModel`); sampling: the plain model with its layers apart.
    The functions set the mesh themselves:

    * to_rollout: parameters of `model.abstract` -> of `sampling`;
    * read, score: see `jit_read`, `jit_scorer`; update: see `make_update`; engine: decodes;
    * group_advantages: see rl/advantages.py; token_advantages.
    """

    def __init__(
        self,
        plain: AbstractModel,
        stage: Stage,
        stops: StopIds,
        frozen_dtype: Any,
        seed: int,
        steps: int,
    ):
        rl, mesh = stage.rl, plain.mesh
        self.stage, self.mesh, self.frozen_dtype = stage, mesh, frozen_dtype
        add_head = None
        if stage.critic != "none":
            add_head = functools.partial(add_critic, critic=stage.critic)
        self.model = StageModel(
            plain,
            stage,
            steps * rl.inner_epochs * rl.minibatches,
            frozen_dtype,
            add_head,
            ("value_head", "value_model"),
        )
        self.sampling = adapted_model(plain, layers_apart)
        # Decoding reads all weights for every token. Gathered once per step over fsdp, they need no
        # all-gather per token; the price is memory while sampling.
        if rl.rollout_weights == "gathered":
            where = param_shardings(self.sampling.params, mesh, ROLLOUT_RULES)
            self.sampling = dataclasses.replace(self.sampling, shardings=where)
        self.to_rollout = OnMesh(
            jax.jit(self._rollout_params, out_shardings=self.sampling.shardings), mesh
        )
        frozen_towers = not set(stage.trainable) & set(TOWERS)
        self.read = OnMesh(jit_read(self.sampling, frozen_towers), mesh)
        self.seed = seed
        self.engine = Engine(
            lambda params: nnx.merge(self.sampling.graph, params).language_model,
            mesh,
            Drawing(stops.stop_ids, stops.pad_id, rl.max_new_tokens, rl.temperature),
            slots=stage.batch_size // rl.chunks,
            kv_heads=nnx.merge(plain.graph, plain.params).config.llm.num_key_value_heads,
            group=rl.group,
            steps=min(16, rl.max_new_tokens),
        )
        micro = rl.minibatches * stage.accumulation
        self.score = OnMesh(jit_scorer(self.model.abstract, stage, micro), mesh)
        self.update = OnMesh(make_update(self.model), mesh)
        # Jitted here once: a new jitted function per step would be compiled in every step.
        self.group_advantages = jax.jit(
            functools.partial(
                group_advantages, scale=rl.advantage_scale, ddof=rl.std_ddof, eps=rl.std_eps
            )
        )
        self.token_advantages = jax.jit(
            functools.partial(token_advantages, gamma=rl.gamma, lam=rl.gae_lambda),
            out_shardings=batch_sharding(mesh),
        )

    def _rollout_params(self, params: nnx.State) -> nnx.State:
        plain = cast(self.model.plain_params(params), self.frozen_dtype)
        return nnx.split(layers_apart(nnx.merge(self.model.plain.graph, plain)))[1]

    def rollout_params(self, state: TrainState) -> nnx.State:
        """Reshards the state's weights for sampling, and waits so that the caller can time it."""
        return jax.block_until_ready(self.to_rollout(merged_params(state)))

    def reference(self, state: TrainState) -> nnx.State | None:
        """Copies the trainable weights before the first step, in the compute dtype; None without a
        KL term. With LoRA the reference is the base: adapters start at zero, and frozen weights are
        shared."""
        if self.stage.rl.beta == 0:
            return None
        # A real copy: the first update donates the buffers of `state`.
        copy = lambda s: cast(jax.tree.map(jnp.copy, s), self.frozen_dtype)  # noqa: E731
        return jax.jit(copy, out_shardings=self.model.shardings.trainable)(state.trainable)

    def abstract_arguments(self, batch: Batch) -> dict[str, tuple]:
        """Returns the arguments of read, score and update as shapes with shardings, for the
        shapes of a global batch; the memory plan compiles the functions with them."""
        stage, mesh, rl = self.stage, self.mesh, self.stage.rl
        rows = functools.partial(abstract_rows, mesh=mesh)
        weights = jax.eval_shape(lambda p: cast(p, self.frozen_dtype), self.sampling.params)
        chunk = stage.batch_size // rl.chunks  # prompts that are read at a time
        read = (placed(weights, self.sampling.shardings), rows(batch, count=chunk))
        with jax.set_mesh(mesh):
            features, _ = jax.eval_shape(self.read.jitted, *read)
        shape = jax.ShapeDtypeStruct((0, rl.group, rl.max_new_tokens), jnp.int32)
        features, drawn = rows((features, shape), count=stage.batch_size)
        mask = jax.ShapeDtypeStruct(drawn.shape, bool, sharding=drawn.sharding)
        responses = Responses(rows(batch), features, drawn, mask)
        state = self.model.abstract_state()
        each = jax.ShapeDtypeStruct(drawn.shape, jnp.float32, sharding=drawn.sharding)
        critic = each if stage.critic != "none" else None
        experience = Experience(
            responses,
            used=mask,
            advantages=each,
            sampler_logps=each,
            old_logps=each if stage.rescores else None,
            ref_logps=each if stage.loss_beta else None,
            old_values=critic,
            returns=critic,
        )
        reference = jax.eval_shape(lambda p: cast(p, self.frozen_dtype), state.trainable)
        reference = placed(reference, self.model.shardings.trainable)
        return {
            "read": read,
            "score": (state.trainable, state.frozen, responses),
            "score_reference": (reference, state.frozen, responses),
            "update": (*state, experience, jax.ShapeDtypeStruct((), jnp.int32)),
        }

    def compile_sampling(self, batch: Batch) -> None:
        """Compiles reading and decoding for the shapes of a global batch."""
        read = self.abstract_arguments(batch)["read"]
        compile_for(self.read, *read)
        with jax.set_mesh(self.mesh):
            _, at = jax.eval_shape(self.read.jitted, *read)
            slots, _, limits = self.engine.programs.abstract_arguments(at, self.engine.sizes[-1])
            compile_for(self.engine.programs.decode, read[0], slots, limits)

    def compile_scoring(self, batch: Batch) -> None:
        """Compiles scoring, for responses of all tokens that they may have."""
        arguments = self.abstract_arguments(batch)
        if self.stage.rescores:
            compile_for(self.score, *arguments["score"])
        if self.stage.rl.beta:
            compile_for(self.score, *arguments["score_reference"])

    def compile_update(self, batch: Batch) -> None:
        """Compiles the update, for responses of all tokens that they may have."""
        compile_for(self.update, *self.abstract_arguments(batch)["update"])


def layers_apart(model: MultiMood, rngs: nnx.Rngs | None = None) -> MultiMood:
    del rngs
    model.language_model.unstack()
    return model
