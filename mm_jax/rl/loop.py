"""Reinforcement stages (GRPO, PPO): the loop, in four phases a step.

1. Roll out: weights go to the rollout's shardings, and every prompt of the batch is answered G
   times, chunk after chunk; the reward pool scores a chunk while the next is sampled.
2. Score: log-probabilities of the responses by the trainer (where they are not those of the update
   itself), by the reference and, for PPO, values; the pool works on meanwhile.
3. Advantages: relative to the group, or by generalised advantage estimation. A response whose
   reward failed is masked out; it is never a 0.
4. Update: `inner_epochs` times over `minibatches` shares of the prompts.

Randomness is fold_in(seed, step, prompt id, number of the sample), so resuming is exact.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import os
import pathlib
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from flax import nnx

from mm_jax.data.pipeline import Loader, PlannedBatch, TrainPlan, train_iterator
from mm_jax.data.records import Sample
from mm_jax.evaluation.parse import parse_answer
from mm_jax.models import lora
from mm_jax.models.lora import LoraConfig
from mm_jax.rewards.base import Request, Score
from mm_jax.rewards.combine import combine, screen
from mm_jax.rewards.pool import RewardPool, score_metrics
from mm_jax.rl import losses, policy
from mm_jax.rl.advantages import gae, group_advantages, masked_mean, token_rewards, whiten
from mm_jax.rl.policy import Lesson, PolicyOptions, Responses
from mm_jax.training import hosts
from mm_jax.training.checkpoint import Checkpoints
from mm_jax.training.loop import NonFiniteError, Preempted, Terminated, due
from mm_jax.training.metrics_writer import MetricsWriter
from mm_jax.training.sharding import (
    ROLLOUT_RULES,
    batch_sharding,
    fetch,
    param_shardings,
    put_batch,
    put_whole_batch,
)
from mm_jax.training.state import (
    Abstract,
    TrainState,
    adapt_params,
    adapted_model,
    cast,
    make_optimizer,
    merged_params,
    start_state,
    state_shardings,
)

log = logging.getLogger(__name__)

SAMPLES_FILE = "samples.jsonl"


@dataclasses.dataclass(frozen=True)
class PolicyRun:
    """What a reinforcement stage needs.

    samples(planned) -> the samples of a planned batch; decode(ids) -> text. val: planned batches of
    the val split with the number of real rows, and their samples.
    """

    name: str
    stage: Any
    reward: Any
    options: PolicyOptions
    plan: TrainPlan
    loader: Loader
    samples: Callable[[PlannedBatch], list[Sample]]
    val: Sequence[tuple[PlannedBatch, int, list[Sample]]]
    val_loader: Loader
    decode: Callable[[np.ndarray], str]
    label_space: str
    pool: RewardPool
    weights: dict[str, float]
    seed: int
    log_every: int
    keep_checkpoints: int
    reader_threads: int
    reader_processes: int
    prefetch: int
    frozen_dtype: Any
    lora: LoraConfig | None = None


@dataclasses.dataclass
class Rolled:
    """One batch of rollouts with its rewards, on the host where not said otherwise."""

    responses: Responses  # on the devices
    sampler_logps: jax.Array  # on the devices
    lengths: np.ndarray
    ended: np.ndarray
    requests: list[Request]
    scores: dict[str, list[Score]]
    rewards: np.ndarray  # [B, G], NaN where invalid
    valid: np.ndarray
    vetoed: list[str]
    seconds: dict[str, float]


class Trainer:
    """The stage's model, state and jitted functions."""

    def __init__(self, run: PolicyRun, plain: Abstract, initial: nnx.State):
        stage, options = run.stage, run.options
        self.run, self.plain, self.mesh = run, plain, plain.mesh
        rl = stage.rl

        def adapt(model, rngs):
            if options.critic != "none":
                model = policy.add_critic(model, options.critic, rngs)
            return model if run.lora is None else lora.add_adapters(model, run.lora, rngs)

        self.adapted = options.critic != "none" or run.lora is not None
        self.abstract = plain
        if self.adapted:
            self.abstract = adapted_model(plain, adapt)
            donate = run.lora is None or run.lora.base == "none"
            initial = adapt_params(plain, self.abstract, adapt, initial, run.seed, donate)
        self.parts = (*stage.trainable, "value_head", "value_model")
        adapters = run.lora is not None
        steps = run.plan.steps * rl.inner_epochs * rl.minibatches
        tx, self.schedule = make_optimizer(stage, steps)
        self.shardings = state_shardings(self.abstract, self.parts, tx, adapters)
        self.state = start_state(
            initial, self.parts, tx, self.shardings, run.frozen_dtype, adapters
        )
        # The reference is the policy before its first step. Under LoRA that is the base: adapters
        # start at zero, and the frozen weights are shared with the policy's.
        self.reference = None
        if rl.beta > 0:
            self.reference = jax.jit(
                lambda s: cast(jax.tree.map(jnp.copy, s), run.frozen_dtype),
                out_shardings=self.shardings.trainable,
            )(self.state.trainable)
        self.features_frozen = not set(stage.trainable) & set(policy.TOWERS)
        rollout_shardings = plain.shardings
        if rl.rollout_weights == "gathered":
            rollout_shardings = param_shardings(plain.params, self.mesh, ROLLOUT_RULES)
        self.rollout_abstract = dataclasses.replace(plain, shardings=rollout_shardings)
        self._to_rollout = self._make_inference(rollout_shardings, run.frozen_dtype)
        self._to_plain = self._make_inference(plain.shardings, None)
        self.rollout = policy.make_rollout(
            self.rollout_abstract, options, run.seed, self.features_frozen
        )
        # Made once: a jitted function made anew every step would be compiled every step.
        self.group_advantages = jax.jit(
            functools.partial(
                group_advantages, scale=rl.advantage_scale, ddof=rl.std_ddof, eps=rl.std_eps
            )
        )
        self.token_advantages = jax.jit(
            functools.partial(token_advantages, gamma=rl.gamma, lam=rl.gae_lambda),
            out_shardings=batch_sharding(self.mesh),
        )
        micro = rl.minibatches * stage.accumulation
        self.score = policy.make_scorer(self.abstract, options, micro)
        self.update = policy.make_update(
            self.abstract, tx, self.shardings, options, rl.minibatches, stage.accumulation
        )

    def _make_inference(self, shardings, dtype):
        """`state -> parameters of the plain model` for rollouts and checkpoints."""
        config, like = self.run.lora, self.plain.params

        def convert(params):
            if config is not None:
                params = lora.plain(params, like, config, dtype or self.run.frozen_dtype)
            elif self.adapted:
                flat = dict(nnx.to_flat_state(params))
                params = nnx.from_flat_state([(p, flat[p]) for p, _ in nnx.to_flat_state(like)])
            return params if dtype is None else cast(params, dtype)

        jitted = jax.jit(convert, out_shardings=shardings)

        def call(state: TrainState) -> nnx.State:
            with jax.set_mesh(self.mesh):
                return jitted(merged_params(state))

        return call

    def rollout_params(self) -> nnx.State:
        return self._to_rollout(self.state)

    def checkpoint_params(self) -> nnx.State:
        """The policy as prediction and later stages load it."""
        if self.run.lora is None and not self.adapted:
            return merged_params(self.state)
        return self._to_plain(self.state)


def seeds_of(samples: Sequence[Sample], group: int) -> np.ndarray:
    """uint32[B, G]: a seed for every response, by the prompt's id."""
    return np.array(
        [[zlib.crc32(f"{s.id} {g}".encode()) for g in range(group)] for s in samples], np.uint32
    )


def roll_out(
    trainer: Trainer, params: nnx.State, step: int, batch, samples: Sequence[Sample], chunks: int
) -> Rolled:
    """Samples and scores G responses to every prompt of `batch` (this process's rows; `samples`
    are those of all rows)."""
    run, options, mesh = trainer.run, trainer.run.options, trainer.mesh
    seconds = {"rollout": 0.0}
    rows = len(samples)
    seeds = seeds_of(samples, options.group)
    where = batch_sharding(mesh)
    parts, waiting, requests, own_requests = [], [], [], []
    share, shares = jax.process_index(), jax.process_count()
    size, own_size = rows // chunks, len(batch.tokens) // chunks
    for chunk in range(chunks):
        began = time.perf_counter()
        own = jax.tree.map(lambda a: a[chunk * own_size : (chunk + 1) * own_size], batch)  # noqa: B023
        first, last = chunk * size, (chunk + 1) * size
        put = put_whole_batch(seeds[first:last], mesh)
        on_device = put_batch(own, mesh)
        features, out = trainer.rollout(params, on_device, np.uint32(step), put)
        tokens, lengths, ended = fetch((out.tokens, out.lengths, out.ended))
        seconds["rollout"] += time.perf_counter() - began
        new = []
        for row, sample in enumerate(samples[first:last]):
            for g in range(options.group):
                text = run.decode(tokens[row, g, : lengths[row, g]])
                parsed = parse_answer(text, run.label_space)
                new.append(Request(sample, parsed.response, text, parsed.labels))
        waiting.append(run.pool.submit(new[share::shares]))
        own_requests.append(len(new))
        requests += new
        parts.append((on_device, features, out, lengths, ended))
    join = lambda *a: jnp.concatenate(a) if chunks > 1 else a[0]  # noqa: E731
    device = jax.tree.map(join, *[(b, f, o.tokens, o.mask(), o.logps) for b, f, o, *_ in parts])
    device_batch, features, tokens, mask, logps = jax.device_put(device, where)
    responses = Responses(device_batch, features, tokens, mask)
    began = time.perf_counter()
    scores: dict[str, list[Score]] = {r.name: [] for r in run.pool.rewards}
    for future, count in zip(waiting, own_requests, strict=True):
        for name, got in shared_scores(future.result(), count).items():
            scores[name] += got
    seconds["reward_wait"] = time.perf_counter() - began
    lengths, ended = (np.concatenate([p[i] for p in parts]) for i in (3, 4))
    shape = (rows, options.group)
    vetoed = [screen(r.response) for r in requests] if run.reward.safety_veto else []
    rewards, valid = combine(
        scores,
        run.weights,
        shape,
        run.reward.combination,
        np.array([bool(v) for v in vetoed]).reshape(shape) if vetoed else None,
    )
    ruled = outside(requests, ended.reshape(-1), run.stage.rl).reshape(shape)
    rewards = np.where(ruled, np.float32(min(0.0, np.nanmin(rewards, initial=0.0))), rewards)
    return Rolled(
        responses, logps, lengths, ended, requests, scores, rewards, valid | ruled, vetoed, seconds
    )


def outside(requests: Sequence[Request], ended: np.ndarray, rl) -> np.ndarray:
    """Which responses a rule gives the lowest reward: outside the length window (in words), or cut
    off where rl.truncated is "zero"."""
    low, high = rl.length_window
    words = np.array([len(r.response.split()) for r in requests])
    out = (words < low) | ((words > high) if high else False)
    return out | ~ended if rl.truncated == "zero" else out


def shared_scores(own: dict[str, list[Score]], count: int) -> dict[str, list[Score]]:
    """The scores of all processes, where process p scored the requests p, p + n, p + 2n, ..."""
    if jax.process_count() == 1:
        return own
    plain = {name: [dataclasses.asdict(s) for s in scores] for name, scores in own.items()}
    out: dict[str, list] = {name: [None] * count for name in own}
    shares = hosts.gather_objects(plain)
    for place, share in enumerate(shares):
        for name, scores in share.items():
            out[name][place :: len(shares)] = [Score(**s) for s in scores]
    return out


def lesson_of(trainer: Trainer, rolled: Rolled, kl_coef: float) -> tuple[Lesson, dict, np.ndarray]:
    """What the update learns from, metrics, and the advantages [B, G] on the host."""
    options, rl = trainer.run.options, trainer.run.stage.rl
    responses, state = rolled.responses, trainer.state
    recompute = options.critic != "none" or rl.inner_epochs * rl.minibatches > 1
    old = trainer.score(state.trainable, state.frozen, responses) if recompute else None
    ref = None
    if trainer.reference is not None:
        ref = trainer.score(trainer.reference, state.frozen, responses).logps
    put = lambda a: put_whole_batch(np.asarray(a), trainer.mesh)  # noqa: E731
    advantages, used, metrics = trainer.group_advantages(
        np.nan_to_num(rolled.rewards), rolled.valid
    )
    with jax.set_mesh(trainer.mesh):
        if options.critic == "none":
            keep = np.asarray(used)
            if rl.truncated == "mask":
                keep = keep & rolled.ended
            mask = responses.mask & put(keep)[..., None]
            each = jnp.where(mask, put(advantages)[..., None], 0.0)
            lesson = Lesson(
                responses, mask, each, rolled.sampler_logps, old and old.logps, ref, None, None
            )
        else:
            keep = rolled.valid & (rolled.ended if rl.truncated == "mask" else True)
            mask = responses.mask & put(keep)[..., None]
            penalised = kl_coef if rl.kl_in == "reward" else 0.0
            each, returns, kl = trainer.token_advantages(
                old.logps,
                old.logps if ref is None else ref,
                old.values,
                mask,
                put(np.nan_to_num(rolled.rewards)),
                jnp.float32(penalised),
            )
            metrics["kl_sampled"] = masked_mean(kl, mask)
            metrics["value"] = masked_mean(old.values, mask)
            in_loss = ref if rl.kl_in == "loss" else None
            lesson = Lesson(
                responses, mask, each, rolled.sampler_logps, old.logps, in_loss, old.values, returns
            )
            advantages = jnp.sum(each, axis=2) / jnp.maximum(jnp.sum(mask, axis=2), 1)
    metrics = {k: float(v) for k, v in fetch(metrics).items()}
    return lesson, metrics, np.asarray(fetch(advantages))


def token_advantages(logps, ref_logps, values, mask, rewards, kl_coef, *, gamma, lam):
    """PPO: whitened advantages, returns and the sampled KL, float32[B, G, R].

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


def adapted_kl(coef: float, kl: float, rl, samples: int) -> float:
    """The adaptive KL coefficient (Ziegler et al. 2019): towards kl_target by at most 20 % of
    samples / kl_horizon a step."""
    if rl.kl_target <= 0:
        return coef
    error = float(np.clip(kl / rl.kl_target - 1, -0.2, 0.2))
    return coef * (1 + error * samples / rl.kl_horizon)


def run_policy_stage(
    run: PolicyRun,
    plain: Abstract,
    initial: Callable[[], nnx.State],
    workdir: pathlib.Path,
    writer: MetricsWriter,
) -> int:
    """Trains one reinforcement stage, resuming from its newest checkpoint; returns the best step
    by the mean reward on val. Raises NonFiniteError, RewardFailureError, and Preempted after
    SIGTERM."""
    stage, rl, steps = run.stage, run.stage.rl, run.plan.steps
    trainer = Trainer(run, plain, initial())
    checkpoints = Checkpoints(workdir / "checkpoints" / run.name, run.keep_checkpoints)
    start, kl_coef = 0, rl.beta
    saved = checkpoints.steps()
    if saved:
        # The optimiser may have taken several steps a step of ours.
        trainer.state, data, _ = checkpoints.restore_state(
            saved[-1], trainer.state, trainer.shardings
        )
        start, kl_coef = data["next_step"], data["kl_coef"]
        log.info("%s: resumed at step %d of %d", run.name, start, steps)
    # A run that was lost before its first checkpoint evaluates step 0 again.
    writer.rewind(run.name, start if saved else -1)
    record = SampleRecord(workdir / SAMPLES_FILE, run.name, start)
    batches = train_iterator(
        run.plan, run.loader, start, run.reader_threads, run.reader_processes, run.prefetch
    )
    bar = tqdm.tqdm(
        total=steps,
        initial=start,
        desc=run.name,
        unit="step",
        mininterval=1.0,
        dynamic_ncols=True,
        disable=jax.process_index() > 0,
    )

    def save(done: int, scores: dict | None) -> None:
        checkpoints.save(
            trainer.state._replace(step=jnp.int32(done)),
            trainer.checkpoint_params(),
            data={"next_step": done, "kl_coef": kl_coef},
            meta={"stage": run.name, "seed": run.seed},
            metrics=scores,
        )

    with (
        contextlib.closing(checkpoints),
        contextlib.closing(batches),
        bar,
        Terminated() as terminated,
    ):
        if not saved:
            scores = evaluate(trainer, trainer.rollout_params())
            writer.write(run.name, 0, {f"val_{k}": v for k, v in scores.items()})
            bar.write(f"{run.name} step 0: val reward {scores['reward']:.4f}")
        for step in range(start, steps):
            began = time.perf_counter()
            _, batch = next(batches)
            planned = run.plan[step]
            clock = time.perf_counter()
            params = jax.block_until_ready(trainer.rollout_params())
            reshard = time.perf_counter() - clock
            rolled = roll_out(trainer, params, step, batch, run.samples(planned), rl.chunks)
            del params
            run.pool.check(rolled.scores)
            clock = time.perf_counter()
            lesson, values, advantages = lesson_of(trainer, rolled, kl_coef)
            jax.block_until_ready(lesson)
            scoring = time.perf_counter() - clock
            clock = time.perf_counter()
            each = []
            for _ in range(rl.inner_epochs):
                for index in range(rl.minibatches):
                    trainer.state, metrics = trainer.update(trainer.state, lesson, index)
                    each.append(metrics)
            each = jax.device_get(each)
            update = time.perf_counter() - clock
            check_finite(run, step, each, workdir)
            values.update(mean_metrics(each), **score_metrics(rolled.scores))
            values.update(length_metrics(rolled))
            values["kl_coef"] = kl_coef
            updates = step * rl.inner_epochs * rl.minibatches
            values["learning_rate"] = float(trainer.schedule(updates))
            values.update({f"seconds/{k}": v for k, v in rolled.seconds.items()})
            values.update({"seconds/reshard": reshard, "seconds/score": scoring})
            values.update({"seconds/update": update})
            values["seconds/step"] = time.perf_counter() - began
            record.write(step, rolled, advantages)
            if stage.objective == "ppo":
                count = rolled.rewards.size
                kl_coef = adapted_kl(kl_coef, values["kl_sampled"], rl, count)
            done = step + 1
            bar.update()
            bar.set_postfix(reward=f"{values['reward']:.3f}", kl=f"{values.get('kl', 0.0):.3f}")
            evaluating = due(done, stage.eval_every) or done == steps
            stopping = done < steps and terminated.asked(done)
            saving = evaluating or stopping or due(done, stage.checkpoint_every)
            if saving or due(done, run.log_every):
                writer.write(run.name, done, values)
            scores = None
            if evaluating:
                scores = evaluate(trainer, trainer.rollout_params())
                writer.write(run.name, done, {f"val_{k}": v for k, v in scores.items()})
                bar.write(
                    f"{run.name} step {done}: val reward {scores['reward']:.4f} "
                    f"({scores['reward_low']:.4f} to {scores['reward_high']:.4f})"
                )
            if saving:
                save(done, scores)
            if stopping:
                checkpoints.wait()
                raise Preempted(f"{run.name}: stopped by SIGTERM; step {done} is saved")
        checkpoints.wait()
        return checkpoints.best_step()


def evaluate(trainer: Trainer, params: nnx.State) -> dict[str, float]:
    """Mean reward on val with its 95 % interval over prompts, the components, and "score".

    Always with the same seeds, so that two evaluations differ by the policy alone.
    """
    run = trainer.run
    means, components = [], []
    for planned, real, samples in run.val:
        _, batch = run.val_loader(planned)
        rolled = roll_out(trainer, params, 0, batch, samples, 1)
        run.pool.check(rolled.scores)
        rewards = np.where(rolled.valid, rolled.rewards, np.nan)[:real]
        means += [float(np.nanmean(r)) for r in rewards if np.isfinite(r).any()]
        kept = real * run.options.group
        components.append(score_metrics({k: v[:kept] for k, v in rolled.scores.items()}))
    if not means:
        raise NonFiniteError(f"{run.name}: no response of the val split has a valid reward")
    mean, spread = float(np.mean(means)), float(np.std(means)) / max(len(means) - 1, 1) ** 0.5
    names = [k for k in components[0] if k.count("/") == 1 and k.split("/")[1] in run.weights]
    return {
        "reward": mean,
        "reward_low": mean - 1.96 * spread,
        "reward_high": mean + 1.96 * spread,
        "score": mean,
        **{k: float(np.nanmean([c[k] for c in components])) for k in names},
    }


def check_finite(run: PolicyRun, step: int, each: Sequence[dict], workdir: pathlib.Path) -> None:
    if all(np.isfinite(m["loss"]) and np.isfinite(m["grad_norm"]) for m in each):
        return
    path = workdir / "nonfinite_batches.json"
    if jax.process_index() == 0:
        ids = [item.id for item in run.plan[step].items]
        path.write_text(json.dumps([{"stage": run.name, "step": step, "ids": ids}], indent=1))
    raise NonFiniteError(
        f"{run.name}: loss or gradient is not finite at step {step}; the ids of the batch are in "
        f"{path}"
    )


def mean_metrics(each: Sequence[dict]) -> dict[str, float]:
    """Over the updates of a step: means, and of names in `_max` the largest."""
    return {
        k: float(
            np.max([m[k] for m in each]) if k.endswith("_max") else np.mean([m[k] for m in each])
        )
        for k in each[0]
    }


def length_metrics(rolled: Rolled) -> dict[str, float]:
    words = [len(r.response.split()) for r in rolled.requests]
    return {
        "response_tokens": float(rolled.lengths.mean()),
        "response_words": float(np.mean(words)),
        "truncated_share": float(1 - rolled.ended.mean()),
        "unparsed_share": float(np.mean([not r.response for r in rolled.requests])),
        "vetoed_share": float(np.mean([bool(v) for v in rolled.vetoed] or [0.0])),
    }


class SampleRecord:
    """samples.jsonl: one line a response, with every reward and what became of it.

    Process 0 writes. Lines of steps that are to be run again are dropped.
    """

    def __init__(self, path: pathlib.Path, stage: str, start: int):
        self.path, self.stage = path, stage
        if jax.process_index() or not path.exists():
            return
        partial = path.with_name(path.name + ".partial")
        with open(path, encoding="utf-8") as old, open(partial, "w", encoding="utf-8") as new:
            for line in old:
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:  # the process was killed while it wrote
                    continue
                if row["stage"] != stage or row["step"] < start:
                    new.write(line)
        os.replace(partial, path)

    def write(self, step: int, rolled: Rolled, advantages: np.ndarray) -> None:
        if jax.process_index():
            return
        group = rolled.rewards.shape[1]
        with open(self.path, "a", encoding="utf-8") as file:
            for i, request in enumerate(rolled.requests):
                row, g = divmod(i, group)
                rewards = {
                    name: {
                        "value": none_if_nan(scores[i].value),
                        "raw": none_if_nan(scores[i].raw),
                        "valid": scores[i].valid,
                        "reason": scores[i].reason,
                        **({"detail": scores[i].detail} if scores[i].detail else {}),
                    }
                    for name, scores in rolled.scores.items()
                }
                line = {
                    "stage": self.stage,
                    "step": step,
                    "id": request.sample.id,
                    "sample": g,
                    "completion": request.completion,
                    "response": request.response,
                    "rewards": rewards,
                    "reward": none_if_nan(rolled.rewards[row, g]),
                    "valid": bool(rolled.valid[row, g]),
                    "veto": rolled.vetoed[i] if rolled.vetoed else "",
                    "advantage": float(advantages[row, g]),
                    "tokens": int(rolled.lengths[row, g]),
                    "ended": bool(rolled.ended[row, g]),
                }
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def none_if_nan(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
