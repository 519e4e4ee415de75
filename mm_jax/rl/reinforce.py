"""Trains reinforcement stages (GRPO, PPO) in four phases per step.

1. Collect: the weights are resharded for sampling, and every prompt of the batch gets G responses;
   the reward pool scores those of one prompt while others are sampled.
2. Score: log-probabilities of the responses under the trainer (unless the update computes them
   itself) and the reference, and for PPO values.
3. Advantages: relative to the group, or by generalised advantage estimation. A response whose
   reward failed is masked out; its reward never counts as 0.
4. Update: `inner_epochs` passes over the prompts, each in `minibatches` optimiser steps.

Randomness is fold_in(seed, step, prompt id, number of the sample), so resuming is exact.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from mm_jax.config.errors import ConfigError
from mm_jax.config.stage import Reinforcement
from mm_jax.data.datasets.common import SampleSource
from mm_jax.models.sharding import batch_sharding, fetch, put_whole_batch
from mm_jax.rewards.pool import RewardFailureError, make_pool, score_metrics
from mm_jax.rl import reward_model
from mm_jax.rl.advantages import masked_mean
from mm_jax.rl.policy import Experience, Policy, TokenScores
from mm_jax.rl.rollout import (
    SAMPLES_FILE,
    Clock,
    Collector,
    Rollout,
    SampleRecord,
    length_metrics,
    padding_share,
)
from mm_jax.rl.validation import Means, described, make_validation
from mm_jax.run import build
from mm_jax.run.build import Run
from mm_jax.training.metrics_writer import MetricsWriter
from mm_jax.training.runner import Runner, initial_params, stage_data
from mm_jax.training.state import TrainState


@dataclasses.dataclass
class Progress:
    """Holds what resuming needs besides the state: the KL coefficient, and each val prompt's mean
    reward before the stage."""

    kl_coef: float
    first: Means | None = None


# ---- the stage ---------------------------------------------------------------------------------


def train(run: Run, name: str, splits: dict[str, SampleSource], writer: MetricsWriter) -> int:
    """Trains a stage, resuming from its newest checkpoint; returns the step with the best mean
    reward on val.

    `splits`: train and val, without their media. Raises NonFiniteError, RewardFailureError (after
    saving the earlier steps), and Preempted after SIGTERM.
    """
    # ---- set-up
    config, stage = run.config, run.config.stage[name]
    data = stage_data(run, name, splits["train"])
    compute = build.dtypes(config).compute
    runner = Runner(run, name, data.schedule, writer)
    policy = Policy(run.abstract, stage, run.tokenizer, compute, runner.seed, runner.steps)
    scorer = reward_model.load(run, name)
    replies = [s.response for s in splits["train"] if s.response]
    pool = make_pool(config.reward, run.workdir, replies)
    collector = Collector(
        policy,
        pool,
        config.reward,
        run.tokenizer.decode,
        run.prompter.label_space,
        scorer,
    )
    validate = make_validation(run, name, splits["val"], data, collector)
    progress, window = Progress(stage.rl.beta), []
    seen: set[tuple] = set()  # shapes of prompts and responses
    with contextlib.closing(pool), runner:
        # ---- compile, while weights are loaded; scoring and updates while the first responses
        # are sampled
        batches = runner.abstract_batches(data.loader)
        sampling = [runner.ahead.add(policy.compile_sampling, batch) for batch in batches]
        jobs = (policy.compile_update, policy.compile_scoring)
        later = [runner.ahead.add(job, batch) for batch in batches for job in jobs]
        # ---- resume
        # The reference is the policy before the stage, so it is copied before the checkpoint's
        # state takes its place.
        state = policy.model.start(initial_params(run, name), runner.seed)
        reference = policy.reference(state)
        state, saved = runner.resume(state, policy.model.shardings)
        if saved:
            progress = Progress(saved["kl_coef"], saved["first"])
        record = SampleRecord(run.workdir / SAMPLES_FILE, name, runner.done)
        measured = (runner, policy, validate, progress, window)
        runner.ahead.wait(sampling)
        if not saved:
            evaluate(*measured, state)
        elif runner.evaluation_due() and not runner.checkpoints.evaluated(runner.done):
            # Rewards failed in the evaluation that should have scored this checkpoint.
            scores = evaluate(*measured, state)
            runner.checkpoints.score_late(runner.done, scores["score"])
        # ---- loop
        for step, batch in runner.batches(data.loader):
            clock = Clock()
            rows = data.schedule[step].items
            with clock("step"):
                # ---- collect: a group of responses per prompt, and their rewards
                with clock("reshard"):
                    params = policy.rollout_params(state)
                with saved_before_failure(runner, policy, state, progress, window):
                    samples = [data.loader.source[item.record] for item in rows]
                    rollout = collector.collect(params, step, batch, samples, clock)
                    pool.check(rollout.scores)
                if rollout.size == (stage.rl.group, stage.rl.max_new_tokens):
                    runner.ahead.wait(later)  # what was compiled for other sizes is not needed
                del params  # the sampling weights: the update needs their memory
                with clock("score"):
                    # ---- score: log-probabilities of trainer and reference, and values
                    old, ref_logps = score(policy, state, reference, rollout)
                    # ---- advantages
                    experience, values, counted, advantages = make_experience(
                        policy, rollout, old, ref_logps, progress.kl_coef
                    )
                    jax.block_until_ready(experience)  # so that the clock times the work itself
                # ---- update
                learning_rate = next_learning_rate(policy, state)
                with clock("update"):
                    state, updates = update(policy, state, experience, counted)
            runner.check_finite([step] * len(updates), updates)
            values |= {**mean_metrics(updates), **score_metrics(rollout.scores)}
            values |= {**length_metrics(rollout), "kl_coef": progress.kl_coef}
            values["learning_rate"] = learning_rate
            seen.add((*(a.shape for a in batch), rollout.size))
            values |= {"padding_share": padding_share(batch, rollout), "programs": len(seen)}
            clock.seconds["step"] += runner.wait
            values |= {f"seconds/{k}": v for k, v in clock.seconds.items()}
            record.write(step, rollout, advantages)
            if stage.objective == "ppo" and "kl_sampled" in values:
                # For the next step: this step's rewards were penalised with the old coefficient.
                progress.kl_coef = adapted_kl(
                    progress.kl_coef, values["kl_sampled"], stage.rl, rollout.rewards.size
                )
            due = runner.finish_step()
            runner.bar.set_postfix({k: f"{values[k]:.3f}" for k in ("reward", "kl") if k in values})
            window.append(values)
            if due.log:
                runner.log(mean_of_steps(window))
                window.clear()
            # ---- evaluation and saving
            scores = evaluate(*measured, state) if due.evaluate else None
            if due.save:
                save(runner, policy, state, progress, scores)
            if due.stop:
                runner.stop()
        return runner.best_step()


def evaluate(
    runner: Runner,
    policy: Policy,
    validate: Callable,
    progress: Progress,
    window: list[dict],
    state: TrainState,
) -> dict[str, float]:
    """Evaluates the policy on val; what it finds before the first step is the baseline of gains."""
    with saved_before_failure(runner, policy, state, progress, window):
        scores, means = validate(policy.rollout_params(state), progress.first)
    if runner.done == 0:
        progress.first = means
    runner.log_scores(scores, described(scores))
    return scores


def save(
    runner: Runner, policy: Policy, state: TrainState, progress: Progress, scores: dict | None
) -> None:
    params = policy.model.inference_params(state)
    runner.save(state, params, scores, **dataclasses.asdict(progress))


@contextlib.contextmanager
def saved_before_failure(
    runner: Runner, policy: Policy, state: TrainState, progress: Progress, window: list[dict]
) -> Iterator[None]:
    """Saves the steps so far when rewards fail, then raises the error on."""
    try:
        yield
    except (RewardFailureError, ConfigError):
        # A service that is down for hours must not cost trained steps; --resume goes on from here.
        if runner.done not in (0, *runner.checkpoints.steps()):
            if window:
                runner.log(mean_of_steps(window))
            save(runner, policy, state, progress, None)
            runner.checkpoints.wait()
        raise


# ---- score -------------------------------------------------------------------------------------


def score(
    policy: Policy, state: TrainState, reference: nnx.State | None, rollout: Rollout
) -> tuple[TokenScores | None, jax.Array | None]:
    """Returns the trainer's scores (None where the update computes them itself) and the reference's
    log-probabilities (None without one)."""
    old = ref_logps = None
    if policy.stage.rescores:
        old = policy.score(state.trainable, state.frozen, rollout.responses)
    if reference is not None:
        ref_logps = policy.score(reference, state.frozen, rollout.responses).logps
    return old, ref_logps


# ---- advantages --------------------------------------------------------------------------------


def make_experience(
    policy: Policy,
    rollout: Rollout,
    old: TokenScores | None,
    ref_logps: jax.Array | None,
    kl_coef: float,
) -> tuple[Experience, dict, np.ndarray, np.ndarray]:
    """Returns what the update learns from, metrics, and on the host the responses that count,
    bool[B, G], and their advantages [B, G]."""
    stage, mesh = policy.stage, policy.mesh
    rewards = np.nan_to_num(rollout.rewards)
    relative, used, metrics = policy.group_advantages(rewards, rollout.valid)
    # With a critic a group without variance still teaches: its rewards are compared with values.
    counted = np.asarray(used) if stage.critic == "none" else rollout.valid
    if stage.rl.truncated == "mask":
        counted = counted & rollout.ended
    put = lambda a: put_whole_batch(np.asarray(a), mesh)  # noqa: E731
    with jax.set_mesh(mesh):
        mask = rollout.responses.mask & put(counted)[..., None]
        if stage.critic == "none":
            advantages = jnp.where(put(counted), put(relative), 0.0)
            per_token = jnp.where(mask, advantages[..., None], 0.0)
            old_logps, old_values, returns = old and old.logps, None, None
        else:
            penalised = kl_coef if stage.rl.kl_in == "reward" else 0.0
            per_token, returns, kl = policy.token_advantages(
                old.logps,
                old.logps if ref_logps is None else ref_logps,
                old.values,
                mask,
                put(rewards),
                jnp.float32(penalised),
            )
            any_token = jnp.any(mask)
            metrics["kl_sampled"] = jnp.where(any_token, masked_mean(kl, mask), jnp.nan)
            metrics["value"] = jnp.where(any_token, masked_mean(old.values, mask), jnp.nan)
            advantages = jnp.sum(per_token, axis=2) / jnp.maximum(jnp.sum(mask, axis=2), 1)
            old_logps, old_values = old.logps, old.values
    # Laid out as the update was compiled for.
    mask, per_token, returns = jax.device_put((mask, per_token, returns), batch_sharding(mesh))
    experience = Experience(
        rollout.responses,
        mask,
        per_token,
        rollout.sampler_logps,
        old_logps,
        ref_logps if stage.loss_beta else None,
        old_values,
        returns,
    )
    if rollout.valid.any():
        metrics["reward"] = np.mean(rollout.means[rollout.valid])
    # NaN: no response or group had a value.
    metrics = {k: float(v) for k, v in fetch(metrics).items() if not np.isnan(v)}
    return experience, metrics, counted, np.asarray(fetch(advantages))


def adapted_kl(coef: float, kl: float, rl: Reinforcement, samples: int) -> float:
    """Adapts the KL coefficient towards `kl_target` (Ziegler et al. 2019, with KL per token): by at
    most 20 % of samples / kl_horizon per step, and never by more than 20 %."""
    if rl.kl_target <= 0:
        return coef
    error = float(np.clip(kl / rl.kl_target - 1, -0.2, 0.2))
    return coef * (1 + error * min(samples / rl.kl_horizon, 1.0))


# ---- update ------------------------------------------------------------------------------------


def update(
    policy: Policy, state: TrainState, experience: Experience, counted: np.ndarray
) -> tuple[TrainState, list[dict]]:
    """Takes the step's optimiser steps, which donate the old state; returns the new one and their
    metrics."""
    rl, metrics = policy.stage.rl, []
    for _ in range(rl.inner_epochs):
        for index in range(rl.minibatches):
            # An update without a single token would still move the parameters, by momentum and
            # weight decay.
            if counted[index :: rl.minibatches].any():
                new, found = policy.update(*state, experience, np.int32(index))
                state = TrainState(*new, state.frozen)
                metrics.append(found)
    return state, jax.device_get(metrics)


def next_learning_rate(policy: Policy, state: TrainState) -> float:
    counts = optax.tree_utils.tree_get_all_with_path(state.opt_state, "count")
    return float(policy.model.schedule(jax.device_get(counts[0][1])))


# ---- metrics -----------------------------------------------------------------------------------


def mean_metrics(updates: Sequence[dict]) -> dict[str, float]:
    """Aggregates a step's updates: max for `*_max`, token-weighted mean for the rest (losses and
    norms: plain mean), plus the number of updates."""
    tokens = np.array([m["used_tokens"] for m in updates], np.float64)
    out = {"updates": len(updates)}
    for name in updates[0] if updates else ():
        values = np.array([m[name] for m in updates], np.float64)
        if name.endswith("_max"):
            out[name] = float(values.max())
        elif name == "used_tokens" or "loss" in name or "norm" in name:
            out[name] = float(values.mean())
        else:
            out[name] = float(np.average(values, weights=tokens))
    return out


def mean_of_steps(window: Sequence[dict]) -> dict[str, float]:
    """Aggregates steps that have a value: max for `*_max`, the last for settings, else the mean."""
    out = {}
    for name in dict.fromkeys(name for values in window for name in values):
        known = [values[name] for values in window if name in values]
        if name.endswith("_max"):
            out[name] = max(known)
        elif name in ("learning_rate", "kl_coef", "programs"):
            out[name] = known[-1]
        else:
            out[name] = float(np.mean(known))
    return out
