"""The policy's jitted functions: rollout, scoring, update; and the critic beside it.

Everything is done once a prompt that can be: the towers run once for rollout, scoring and all
updates (where they are frozen), the prompt is prefilled once and its cache read by all G samples,
and in scoring and update the prompt stands in front of its G responses once
(`Qwen2.shared_prefix`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from mm_jax.data.batch import Responses
from mm_jax.generation import sampler
from mm_jax.models import lora
from mm_jax.models.abstract import Abstract, adapted_model
from mm_jax.models.layers import Dtypes, linear
from mm_jax.models.lora import LoraConfig
from mm_jax.models.multimood import MultiMood
from mm_jax.models.qwen2 import Qwen2
from mm_jax.models.sharding import ROLLOUT_RULES, batch_sharding, param_shardings, replicated
from mm_jax.ops.log_probs import token_log_probs
from mm_jax.rl import losses
from mm_jax.rl.advantages import masked_mean
from mm_jax.training.optimizer import make_optimizer
from mm_jax.training.state import TrainState, cast, state_shardings
from mm_jax.training.step import micro_batches

CRITICS = ("none", "shared", "own")
TOWERS = ("vision_tower", "audio_tower")


@dataclasses.dataclass(frozen=True)
class PolicyOptions:
    """How responses are sampled, scored and learnt from; all static in the jitted functions.

    critic: "none" (GRPO), "shared" (a value head on the policy's hidden states) or "own" (a copy
    of the language model with the head, which reads the policy's prompt embeddings).
    """

    group: int
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    pad_id: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    critic: str = "none"
    shared_prefix: bool = True
    reduction: str = "grpo"
    clip_low: float = 0.2
    clip_high: float = 0.2
    clip_max: float | None = None
    level: str = "token"
    beta: float = 0.0  # of the KL term in the loss
    value_clip: float = 0.2
    value_coef: float = 0.1

    def __post_init__(self):
        if self.group < 1:
            raise ValueError(f"group: expected at least 1, got {self.group}")
        if self.critic == "none" and self.group < 2:
            raise ValueError(
                "group: expected at least 2: one response has no group to compare with"
            )
        if not self.temperature >= 0.01:  # log-probabilities are divided by it
            raise ValueError(f"temperature: expected at least 0.01, got {self.temperature}")


class Lesson(NamedTuple):
    """What an update learns from: responses; used bool[B, G, R], the tokens that count; the rest
    float32[B, G, R]. `old_logps` None: the update is on policy."""

    responses: Responses
    used: jax.Array
    advantages: jax.Array
    sampler_logps: jax.Array
    old_logps: jax.Array | None
    ref_logps: jax.Array | None
    old_values: jax.Array | None
    returns: jax.Array | None


class Scored(NamedTuple):
    """Of every response token float32[B, G, R]: log-probability and entropy at the sampling
    temperature, and the value of the state before it (None without a critic)."""

    logps: jax.Array
    entropy: jax.Array
    values: jax.Array | None


def add_critic(model: MultiMood, critic: str, rngs: nnx.Rngs) -> MultiMood:
    """Puts a value head, and for "own" a trunk, beside the policy; values start at 0."""
    lm = model.language_model
    width = lm.config.hidden_size
    model.value_head = linear(
        width, 1, ("embed", None), bias=True, dtypes=Dtypes(compute=jnp.float32), rngs=rngs
    )
    model.value_head.kernel.set_value(jnp.zeros((width, 1), jnp.float32))
    if critic == "own":
        config = dataclasses.replace(lm.config, tie_word_embeddings=True)  # it has no head
        dtypes = Dtypes(compute=lm.dtype)
        model.value_model = Qwen2(
            config, dtypes=dtypes, rngs=rngs, remat=lm.remat, attention=lm.attention
        )
        policy = dict(nnx.to_flat_state(nnx.state(lm)))
        # It is trained, also where the policy is frozen and in bfloat16.
        own = [
            (path, variable.replace(policy[path].get_value().astype(variable.dtype)))
            for path, variable in nnx.to_flat_state(nnx.state(model.value_model))
        ]
        nnx.update(model.value_model, nnx.from_flat_state(own))
    return model


def states_before(lm: Qwen2, prompt: jax.Array, responses: Responses) -> jax.Array:
    """Hidden states [B, G, R, D] from which every response token is predicted."""
    tails = lm.embed(responses.tokens)
    last, hidden = lm.shared_prefix(prompt, responses.batch.mask, tails, responses.mask)
    first = jnp.broadcast_to(last[:, None, None], hidden[:, :, :1].shape)
    return jnp.concatenate([first, hidden[:, :, :-1]], axis=2)


def score_responses(model: MultiMood, responses: Responses, options: PolicyOptions) -> Scored:
    """Log-probabilities, entropies and values of the response tokens."""
    prompt = model.embed(responses.batch, responses.features)
    shape = responses.tokens.shape
    if not options.shared_prefix:  # every response gets a copy of its prompt
        prompt = jnp.repeat(prompt, shape[1], axis=0)
        mask = jnp.repeat(responses.batch.mask, shape[1], axis=0)
        alone = lambda x: x.reshape(-1, 1, shape[2])  # noqa: E731
        responses = responses._replace(
            batch=responses.batch._replace(mask=mask),
            tokens=alone(responses.tokens),
            mask=alone(responses.mask),
        )
    lm = model.language_model
    before = states_before(lm, prompt, responses)
    flat = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
    found = token_log_probs(
        flat(before),
        lm.head_kernel(),
        flat(responses.tokens),
        options.temperature,
        vocab_padding=lm.config.vocab_padding,
    )
    values = None
    if options.critic != "none":
        if options.critic == "own":
            before = states_before(model.value_model, jax.lax.stop_gradient(prompt), responses)
        values = model.value_head(before.astype(jnp.float32))[..., 0].reshape(shape)
    return Scored(found.logps.reshape(shape), found.entropy.reshape(shape), values)


def jit_rollout(
    abstract: Abstract, options: PolicyOptions, seed: int, with_features: bool
) -> Callable:
    """The jitted `(params, batch, step, seeds uint32[B, G]) -> (features, Samples)`.

    `abstract`: the plain model, with its layers apart or stacked; the parameters may lie on the
    mesh by other rules than its own.
    """

    def rollout(params, batch, step, seeds):
        model = nnx.merge(abstract.graph, params)
        features = model.features(batch)
        key = jax.random.fold_in(jax.random.key(seed), step)
        samples = sampler.generate(
            model.language_model,
            sampler.prefill(model, batch, features=features),
            sampler.row_keys(key, seeds),
            stop_ids=options.stop_ids,
            pad_id=options.pad_id,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
        )
        return (features if with_features else None), samples

    return jax.jit(rollout, out_shardings=batch_sharding(abstract.mesh))


def jit_scorer(abstract: Abstract, options: PolicyOptions, micro: int) -> Callable:
    """The jitted `(trainable, frozen, responses) -> Scored` without gradients."""

    def score(trainable, frozen, responses):
        def one(part):
            model = nnx.merge(abstract.graph, trainable, frozen)
            return score_responses(model, part, options)

        if micro == 1:
            return one(responses)
        parts = jax.lax.map(one, micro_batches(responses, micro))
        join = lambda a: jnp.moveaxis(a, 0, 1).reshape(-1, *a.shape[2:])  # noqa: E731
        return jax.tree.map(join, parts)

    return jax.jit(score, out_shardings=batch_sharding(abstract.mesh))


def response_weights(used: jax.Array, options: PolicyOptions, micro: int) -> jax.Array:
    """`losses.token_weights` of used bool[B, G, R]; micro-batches are split by prompts."""
    flat = used.reshape(used.shape[0], -1) if options.reduction == "bnpo" else used
    flat = flat.reshape(-1, flat.shape[-1])
    weights = losses.token_weights(flat, options.reduction, options.max_new_tokens, micro)
    return weights.reshape(used.shape)


def lesson_loss(
    model: MultiMood, lesson: Lesson, weights: jax.Array, options: PolicyOptions
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Policy loss, with a critic also the value loss, of one micro-batch, and metrics."""
    scored = score_responses(model, lesson.responses, options)
    flat = lambda x: x.reshape(-1, x.shape[-1])  # noqa: E731
    old = lesson.old_logps
    old = jax.lax.stop_gradient(scored.logps) if old is None else old
    mask = flat(lesson.used)
    loss, metrics = losses.policy_loss(
        flat(scored.logps),
        flat(old),
        flat(lesson.advantages),
        mask,
        flat(weights),
        clip_low=options.clip_low,
        clip_high=options.clip_high,
        clip_max=options.clip_max,
        ref_logps=None if lesson.ref_logps is None else flat(lesson.ref_logps),
        beta=options.beta,
        level=options.level,
    )
    metrics["entropy"] = masked_mean(flat(scored.entropy), mask)
    if options.critic != "none":
        value, more = losses.value_loss(
            flat(scored.values),
            flat(lesson.old_values),
            flat(lesson.returns),
            mask,
            flat(weights),
            options.value_clip,
        )
        loss = loss + options.value_coef * value
        metrics.update(more, value_loss=value)
    gap = jnp.abs(old - lesson.sampler_logps)
    metrics["sampler_gap"] = masked_mean(flat(gap), mask)
    metrics["sampler_gap_max"] = jnp.max(jnp.where(lesson.used, gap, 0.0))
    return loss, metrics


def jit_update(
    abstract: Abstract,
    tx: optax.GradientTransformation,
    shardings: TrainState,
    options: PolicyOptions,
    minibatches: int,
    accumulation: int,
) -> Callable:
    """The jitted `(trainable, opt_state, step, frozen, lesson, index) -> ((trainable, opt_state,
    step), metrics)`: one optimiser step on the `index`-th of `minibatches` shares of the prompts.

    The first three arguments are donated.
    """

    def loss(trainable, frozen, lesson, weights):
        model = nnx.merge(abstract.graph, trainable, frozen)
        return lesson_loss(model, lesson, weights, options)

    grad = jax.value_and_grad(loss, has_aux=True)

    def update(trainable, opt_state, number, frozen, lesson, index):
        if minibatches > 1:
            lesson = jax.tree.map(lambda a: a[index], micro_batches(lesson, minibatches))
        weights = response_weights(lesson.used, options, accumulation)
        if accumulation == 1:
            (value, metrics), grads = grad(trainable, frozen, lesson, weights)
        else:

            def one(grads, xs):
                (value, metrics), new = grad(trainable, frozen, *xs)
                tokens = jnp.sum(xs[0].used)
                return jax.tree.map(jnp.add, grads, new), (value, metrics, tokens)

            zeros = jax.tree.map(jnp.zeros_like, trainable)
            parts = micro_batches((lesson, weights), accumulation)
            grads, (value, each, tokens) = jax.lax.scan(one, zeros, parts)
            value = jnp.sum(value)
            share = tokens / jnp.maximum(jnp.sum(tokens), 1)
            metrics = {
                k: jnp.max(v) if k.endswith("_max") else jnp.sum(v * share) for k, v in each.items()
            }
            if "value_loss" in each:
                metrics["value_loss"] = jnp.sum(each["value_loss"])
        updates, opt_state = tx.update(grads, opt_state, trainable)
        new = optax.apply_updates(trainable, updates)
        metrics = {
            **metrics,
            "used_tokens": jnp.sum(lesson.used),
            "loss": value,
            "grad_norm": optax.global_norm(grads),
            "update_norm": optax.global_norm(updates),
            **{f"grad_norm/{part}": optax.global_norm(g) for part, g in grads.items()},
        }
        return (new, opt_state, number + 1), metrics

    return jax.jit(
        update,
        donate_argnums=(0, 1, 2),
        out_shardings=(
            (shardings.trainable, shardings.opt_state, shardings.step),
            replicated(abstract.mesh),
        ),
    )


class Program:
    """A stage without values: its model, where everything lies, and the jitted functions.

    What `loop.Trainer` runs and what `plan` compiles. plain, abstract: the model without and with
    the critic and the adapters; sampling: the plain one with its layers apart. The functions are
    to be called or lowered inside `jax.set_mesh(mesh)`:

    * to_rollout, to_plain: parameters of `abstract` -> of `sampling`, and of `plain` (checkpoints);
    * rollout, score, update: see `jit_rollout`, `jit_scorer`, `jit_update`.
    """

    def __init__(
        self,
        plain: Abstract,
        stage,
        options: PolicyOptions,
        config: LoraConfig | None,
        frozen_dtype,
        seed: int,
        steps: int,
    ):
        rl = stage.rl
        self.plain, self.lora, self.frozen_dtype = plain, config, frozen_dtype
        self.critic, self.mesh = options.critic, plain.mesh
        self.adapted = options.critic != "none" or config is not None
        self.abstract = adapted_model(plain, self.adapt) if self.adapted else plain
        self.parts = (*stage.trainable, "value_head", "value_model")
        self.tx, self.schedule = make_optimizer(stage, steps * rl.inner_epochs * rl.minibatches)
        self.shardings = state_shardings(self.abstract, self.parts, self.tx, config is not None)
        self.sampling = adapted_model(plain, layers_apart)
        if rl.rollout_weights == "gathered":
            where = param_shardings(self.sampling.params, plain.mesh, ROLLOUT_RULES)
            self.sampling = dataclasses.replace(self.sampling, shardings=where)
        self.to_rollout = jax.jit(self._rollout_params, out_shardings=self.sampling.shardings)
        self.to_plain = jax.jit(self._plain_params, out_shardings=plain.shardings)
        frozen_towers = not set(stage.trainable) & set(TOWERS)
        self.rollout = jit_rollout(self.sampling, options, seed, with_features=frozen_towers)
        micro = rl.minibatches * stage.accumulation
        self.score = jit_scorer(self.abstract, options, micro)
        self.update = jit_update(
            self.abstract, self.tx, self.shardings, options, rl.minibatches, stage.accumulation
        )

    def adapt(self, model: MultiMood, rngs: nnx.Rngs) -> MultiMood:
        if self.critic != "none":
            model = add_critic(model, self.critic, rngs)
        return model if self.lora is None else lora.add_adapters(model, self.lora, rngs)

    def _plain_params(self, params: nnx.State) -> nnx.State:
        like = self.plain.params
        if self.lora is not None:
            return lora.plain(params, like, self.lora, self.frozen_dtype)
        if not self.adapted:
            return params
        flat = dict(nnx.to_flat_state(params))
        return nnx.from_flat_state([(path, flat[path]) for path, _ in nnx.to_flat_state(like)])

    def _rollout_params(self, params: nnx.State) -> nnx.State:
        params = cast(self._plain_params(params), self.frozen_dtype)
        return nnx.split(layers_apart(nnx.merge(self.plain.graph, params)))[1]


def layers_apart(model: MultiMood, rngs: nnx.Rngs | None = None) -> MultiMood:
    del rngs
    model.language_model.unstack()
    return model
