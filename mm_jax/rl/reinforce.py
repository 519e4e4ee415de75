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
import pathlib
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from mm_jax.config.errors import ConfigError
from mm_jax.data.pipeline import Loader, PlannedBatch, train_iterator
from mm_jax.data.records import Sample
from mm_jax.models.abstract import Abstract, adapt_params
from mm_jax.models.sharding import batch_sharding, fetch, put_whole_batch
from mm_jax.rewards.pool import RewardFailureError, reasons, score_metrics
from mm_jax.rl import losses, policy
from mm_jax.rl.advantages import gae, group_advantages, masked_mean, token_rewards, whiten
from mm_jax.rl.policy import Lesson, PolicyOptions
from mm_jax.rl.rollout import (
    SAMPLES_FILE,
    Rolled,
    SampleRecord,
    Scoring,
    length_metrics,
    roll_out,
)
from mm_jax.training.checkpoint import Checkpoints
from mm_jax.training.metrics_writer import MetricsWriter
from mm_jax.training.state import TrainState, cast, merged_params, start_state
from mm_jax.training.supervised import (
    NonFiniteError,
    Preempted,
    Profile,
    StageRun,
    Terminated,
    due,
    progress_bar,
)

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyRun(StageRun):
    """What a reinforcement stage needs besides.

    samples(planned) -> the samples of a planned batch, val_samples those of one of `val`: planned
    batches of the val split with the number of real rows.
    """

    options: PolicyOptions
    samples: Callable[[PlannedBatch], list[Sample]]
    val: Sequence[tuple[PlannedBatch, int]]
    val_samples: Callable[[PlannedBatch], list[Sample]]
    val_loader: Loader
    scoring: Scoring


class Trainer:
    """The stage's state, and its jitted functions applied to it."""

    def __init__(self, run: PolicyRun, plain: Abstract, initial: nnx.State):
        stage, rl = run.stage, run.stage.rl
        self.run, self.mesh = run, plain.mesh
        program = policy.Program(
            plain, stage, run.options, run.lora, run.frozen_dtype, run.seed, run.plan.steps
        )
        self.program = program
        if program.adapted:
            donate = run.lora is None or run.lora.base == "none"
            initial = adapt_params(
                plain, program.abstract, program.adapt, initial, run.seed, donate
            )
        if run.lora is not None:
            initial = run.start_adapters(initial, program.abstract.shardings)
        self.state = start_state(
            initial,
            program.parts,
            program.tx,
            program.shardings,
            run.frozen_dtype,
            run.lora is not None,
        )
        # The reference is the policy before its first step. Under LoRA that is the base: adapters
        # start at zero, and the frozen weights are shared with the policy's.
        self.reference = None
        if rl.beta > 0:
            self.reference = jax.jit(
                lambda s: cast(jax.tree.map(jnp.copy, s), run.frozen_dtype),
                out_shardings=program.shardings.trainable,
            )(self.state.trainable)
        self.roll_out = functools.partial(
            roll_out, self._call(program.rollout), run.scoring, self.mesh
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
        self.score = self._call(program.score)

    def _call(self, jitted: Callable) -> Callable:
        def call(*args):
            with jax.set_mesh(self.mesh):
                return jitted(*args)

        return call

    def update(self, lesson: Lesson, index: int) -> dict[str, jax.Array]:
        """One optimiser step; the old state is given up."""
        old = self.state
        with jax.set_mesh(self.mesh):
            (trainable, opt_state, number), metrics = self.program.update(
                old.trainable, old.opt_state, old.step, old.frozen, lesson, index
            )
        self.state = TrainState(trainable, old.frozen, opt_state, number)
        return metrics

    def learning_rate(self) -> float:
        """Of the next update."""
        counts = optax.tree_utils.tree_get_all_with_path(self.state.opt_state, "count")
        return float(self.program.schedule(jax.device_get(counts[0][1])))

    def rollout_params(self) -> nnx.State:
        return self._call(self.program.to_rollout)(merged_params(self.state))

    def checkpoint_params(self) -> nnx.State:
        """The policy as prediction and later stages load it."""
        params = merged_params(self.state)
        return self._call(self.program.to_plain)(params) if self.program.adapted else params


def lesson_of(
    trainer: Trainer, rolled: Rolled, kl_coef: float
) -> tuple[Lesson, dict, np.ndarray, np.ndarray]:
    """What the update learns from, metrics, and on the host bool[B, G] of the responses that count
    and their advantages [B, G]."""
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
            advantages = jnp.where(put(keep), put(advantages), 0.0)
            each = jnp.where(mask, advantages[..., None], 0.0)
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
            metrics["kl_sampled"] = jnp.where(jnp.any(mask), masked_mean(kl, mask), jnp.nan)
            metrics["value"] = jnp.where(jnp.any(mask), masked_mean(old.values, mask), jnp.nan)
            in_loss = ref if rl.kl_in == "loss" else None
            lesson = Lesson(
                responses, mask, each, rolled.sampler_logps, old.logps, in_loss, old.values, returns
            )
            advantages = jnp.sum(each, axis=2) / jnp.maximum(jnp.sum(mask, axis=2), 1)
    if rolled.valid.any():
        metrics["reward"] = np.mean(rolled.plain[rolled.valid])
    # What no response or group tells is left out.
    metrics = {k: float(v) for k, v in fetch(metrics).items() if not np.isnan(v)}
    return lesson, metrics, keep, np.asarray(fetch(advantages))


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
    """The adaptive KL coefficient (Ziegler et al. 2019, but KLs a token): towards kl_target by at
    most 20 % of samples / kl_horizon a step, or 20 % where that is more."""
    if rl.kl_target <= 0:
        return coef
    error = float(np.clip(kl / rl.kl_target - 1, -0.2, 0.2))
    return coef * (1 + error * min(samples / rl.kl_horizon, 1.0))


def run_policy_stage(
    run: PolicyRun,
    plain: Abstract,
    initial: Callable[[], nnx.State],
    workdir: pathlib.Path,
    writer: MetricsWriter,
) -> int:
    """Trains one reinforcement stage, resuming from its newest checkpoint; returns the best step
    by the mean reward on val. Raises NonFiniteError, RewardFailureError (the steps before are
    saved), and Preempted after SIGTERM."""
    stage, rl, steps = run.stage, run.stage.rl, run.plan.steps
    trainer = Trainer(run, plain, initial())
    checkpoints = Checkpoints(workdir / "checkpoints" / run.name, run.keep_checkpoints)
    start, kl_coef, first, window = 0, rl.beta, None, []
    saved = checkpoints.steps()
    if saved:
        # The optimiser may have taken several steps a step of ours.
        trainer.state, data, _ = checkpoints.restore_state(
            saved[-1], trainer.state, trainer.program.shardings
        )
        start, kl_coef, first = data["next_step"], data["kl_coef"], data["first"]
        log.info("%s: resumed at step %d of %d", run.name, start, steps)
    done = start
    # A run that was lost before its first checkpoint evaluates step 0 again.
    writer.rewind(run.name, start if saved else -1)
    record = SampleRecord(workdir / SAMPLES_FILE, run.name, start)
    batches = train_iterator(
        run.plan, run.loader, start, run.reader_threads, run.reader_processes, run.prefetch
    )
    bar = progress_bar(run, start)

    def save(scores: dict | None) -> None:
        checkpoints.save(
            trainer.state._replace(step=jnp.int32(done)),
            trainer.checkpoint_params(),
            data={"next_step": done, "kl_coef": kl_coef, "first": first},
            meta={"stage": run.name, "seed": run.seed},
            metrics=scores,
        )

    @contextlib.contextmanager
    def rewards_may_fail():
        """The steps until now are saved before the error goes on."""
        try:
            yield
        except (RewardFailureError, ConfigError):
            if done not in (0, *checkpoints.steps()):
                if window:
                    writer.write(run.name, done, mean_of_steps(window))
                save(None)
                checkpoints.wait()
            raise

    def judge() -> tuple[dict, list]:
        """Of the policy after `done` steps, see `evaluate`; into the record."""
        with rewards_may_fail():
            scores, means = evaluate(trainer, trainer.rollout_params(), first)
        writer.write(run.name, done, {f"val_{k}": v for k, v in scores.items()})
        bar.write(f"{run.name} step {done}: {described(scores)}")
        return scores, means

    def to_be_judged() -> bool:
        return due(done, stage.eval_every) or done == steps

    with (
        contextlib.closing(checkpoints),
        contextlib.closing(batches),
        bar,
        Terminated() as terminated,
        Profile(run, workdir) as trace,
    ):
        if not saved:
            _, first = judge()
        elif to_be_judged() and not checkpoints.evaluated(done):  # rewards failed in it
            checkpoints.score_late(done, judge()[0]["score"])
        for step in range(start, steps):
            trace.before(step)
            began = time.perf_counter()
            _, batch = next(batches)
            planned = run.plan[step]
            clock = time.perf_counter()
            params = jax.block_until_ready(trainer.rollout_params())
            reshard = time.perf_counter() - clock
            with rewards_may_fail():
                rolled = trainer.roll_out(params, step, batch, run.samples(planned), rl.chunks)
                run.scoring.pool.check(rolled.scores)
            del params
            clock = time.perf_counter()
            lesson, values, keep, advantages = lesson_of(trainer, rolled, kl_coef)
            jax.block_until_ready(lesson)
            scoring = time.perf_counter() - clock
            learning_rate = trainer.learning_rate()
            clock = time.perf_counter()
            each = []
            for _ in range(rl.inner_epochs):
                for index in range(rl.minibatches):
                    # Without a token momentum and weight decay would still move the parameters.
                    if keep[index :: rl.minibatches].any():
                        each.append(trainer.update(lesson, index))
            each = jax.device_get(each)
            update = time.perf_counter() - clock
            check_finite(run, step, each, workdir)
            values.update(mean_metrics(each), **score_metrics(rolled.scores))
            values.update(length_metrics(rolled))
            values["kl_coef"] = kl_coef
            values["learning_rate"] = learning_rate
            values.update({f"seconds/{k}": v for k, v in rolled.seconds.items()})
            values.update({"seconds/reshard": reshard, "seconds/score": scoring})
            values.update({"seconds/update": update})
            values["seconds/step"] = time.perf_counter() - began
            record.write(step, rolled, advantages)
            if stage.objective == "ppo" and "kl_sampled" in values:
                count = rolled.rewards.size
                kl_coef = adapted_kl(kl_coef, values["kl_sampled"], rl, count)
            done = step + 1
            bar.update()
            shown = {k: f"{values[k]:.3f}" for k in ("reward", "kl") if k in values}
            bar.set_postfix(shown)
            evaluating = to_be_judged()
            stopping = done < steps and terminated.asked(done)
            saving = evaluating or stopping or due(done, stage.checkpoint_every)
            window.append(values)
            if saving or due(done, run.log_every):
                writer.write(run.name, done, mean_of_steps(window))
                window.clear()
            scores = judge()[0] if evaluating else None
            if saving:
                save(scores)
            if stopping:
                checkpoints.wait()
                raise Preempted(f"{run.name}: stopped by SIGTERM; step {done} is saved")
        checkpoints.wait()
        return checkpoints.best_step()


def evaluate(
    trainer: Trainer, params: nnx.State, first: list[float | None] | None
) -> tuple[dict[str, float], list[float | None]]:
    """Mean reward on val with its 95 % interval over prompts, the components, and "score"; and the
    mean of every prompt (None where no response had a valid reward).

    Always with the same seeds, so that two evaluations differ by the policy alone: `first`, the
    means before the stage, gives the mean "gain" of a prompt with its 95 % interval.
    """
    run = trainer.run
    means, kept_scores = [], {}
    for planned, real in run.val:
        _, batch = run.val_loader(planned)
        rolled = trainer.roll_out(params, 0, batch, run.val_samples(planned), 1)
        run.scoring.pool.check(rolled.scores)
        rewards = np.where(rolled.valid, rolled.plain, np.nan)[:real]
        means += [float(np.nanmean(r)) if np.isfinite(r).any() else None for r in rewards]
        kept = real * run.options.group
        for name, own in rolled.scores.items():
            kept_scores.setdefault(name, []).extend(own[:kept])
    known = [m for m in means if m is not None]
    if not known:
        failed = {name: [s for s in own if not s.valid] for name, own in kept_scores.items()}
        said = "; ".join(f"{name}: {reasons(own)}" for name, own in failed.items() if own)
        raise RewardFailureError(
            f"{run.name}: no response of the val split has a valid reward: {said}; mend the "
            "service, then go on with --resume"
        )
    parts = score_metrics(kept_scores)
    keys = (f"reward/{name}" for name in run.scoring.weights)
    scores = {
        **interval("reward", known),
        "score": score_of(means, first),
        **{key: parts[key] for key in keys if key in parts},
    }
    if first is not None:
        pairs = [(a, b) for a, b in zip(first, means, strict=True) if None not in (a, b)]
        if pairs:
            scores.update(interval("gain", [b - a for a, b in pairs]))
    return scores, means


def score_of(means: list[float | None], first: list[float | None] | None) -> float:
    """By which evaluations are compared: the mean over the prompts that had a valid reward in the
    `first` one. One without now counts as it was, so that no failure of hard prompts is a gain."""
    pairs = zip(means, means if first is None else first, strict=True)
    values = [before if now is None else now for now, before in pairs if before is not None]
    return float(np.mean(values or [m for m in means if m is not None]))


def described(scores: dict[str, float]) -> str:
    """The val reward in words, with its gain where there is one."""
    text = f"val reward {scores['reward']:.4f}"
    if "gain" not in scores:
        return text
    low, high = scores["gain_low"], scores["gain_high"]
    return f"{text}, gain {scores['gain']:+.4f} (95 % {low:+.4f} to {high:+.4f})"


def interval(name: str, values: Sequence[float]) -> dict[str, float]:
    """The mean of `values` and its 95 % interval, as name, name_low and name_high."""
    mean, count = float(np.mean(values)), len(values)
    half = 1.96 * float(np.std(values)) / max(count - 1, 1) ** 0.5
    return {name: mean, f"{name}_low": mean - half, f"{name}_high": mean + half}


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


def mean_of_steps(window: Sequence[dict]) -> dict[str, float]:
    """Over the steps that have a value: the largest of names in `_max`, the last of settings, means
    of the rest."""
    out = {}
    for name in dict.fromkeys(name for values in window for name in values):
        known = [values[name] for values in window if name in values]
        if name.endswith("_max"):
            out[name] = max(known)
        elif name in ("learning_rate", "kl_coef"):
            out[name] = known[-1]
        else:
            out[name] = float(np.mean(known))
    return out


def mean_metrics(each: Sequence[dict]) -> dict[str, float]:
    """Over the updates of a step and their number: the largest of names in `_max`, means of losses
    and norms, and of what is a mean over tokens that over the tokens of all."""
    tokens = np.array([m["used_tokens"] for m in each], np.float64)
    out = {"updates": len(each)}
    for name in each[0] if each else ():
        values = np.array([m[name] for m in each], np.float64)
        if name.endswith("_max"):
            out[name] = float(values.max())
        elif name == "used_tokens" or "loss" in name or "norm" in name:
            out[name] = float(values.mean())
        else:
            out[name] = float(np.average(values, weights=tokens))
    return out
