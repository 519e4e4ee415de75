"""Evaluates a policy by its reward on val: the mean, the gain over the stage's start, intervals."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import jax
import numpy as np
from flax import nnx

from mm_jax.data.datasets.common import SampleSource
from mm_jax.data.pipeline import Loader, split_batches
from mm_jax.rewards.pool import RewardFailureError, reasons, score_metrics
from mm_jax.rl.rollout import Collector
from mm_jax.run.build import Run
from mm_jax.training.runner import StageData

Means = list[float | None]  # of each prompt; None where no response had a valid reward


def make_validation(
    run: Run, name: str, val: SampleSource, data: StageData, collector: Collector
) -> Callable[[nnx.State, Means | None], tuple[dict[str, float], Means]]:
    """Returns `(params, first) -> (scores, means)`. Scores: the mean reward on val with its 95 %
    interval over prompts, the components, and "score"; means: the mean reward of every prompt.

    `first`, the means before the stage, adds the mean "gain" per prompt with its 95 % interval.
    Seeds are always the same, so that two evaluations differ only by the policy.
    """
    config, stage = run.config, run.config.stage[name]
    source = SampleSource(config.data.folder, "val")
    recipe = data.recipe.without_dropout()
    host, hosts = (data.loader.host, data.loader.hosts) if jax.process_count() > 1 else (0, 1)
    loader = Loader(source, recipe, run.prompter, host, hosts)
    batches = split_batches(
        val,
        recipe,
        run.prompter,
        stage.batch_size,
        stage.eval_modality,
        data.schedule.shapes.extended,  # training's, as sampling is compiled for those
        stage.eval_examples,
    )

    def validate(params: nnx.State, first: Means | None) -> tuple[dict[str, float], Means]:
        means: Means = []
        kept: dict[str, list] = {}
        for rows, real in batches:
            _, batch = loader(rows)
            samples = [source[item.record] for item in rows.items]
            rollout = collector.collect(params, 0, batch, samples)
            collector.pool.check(rollout.scores)
            counted = np.array(rollout.order) < real
            rewards = np.where(rollout.valid, rollout.means, np.nan)[counted]
            means += [float(np.nanmean(r)) if np.isfinite(r).any() else None for r in rewards]
            for component, own in rollout.scores.items():
                each = np.repeat(counted, stage.rl.group)
                kept.setdefault(component, []).extend(itertools.compress(own, each))
        return summary(name, means, first, kept, config.reward.weights), means

    return validate


def summary(name: str, means: Means, first: Means | None, scores: dict, weights) -> dict:
    """Summarises an evaluation. Raises RewardFailureError where no response has a valid reward."""
    known = [m for m in means if m is not None]
    if not known:
        failed = {c: [s for s in own if not s.valid] for c, own in scores.items()}
        said = "; ".join(f"{c}: {reasons(own)}" for c, own in failed.items() if own)
        raise RewardFailureError(
            f"{name}: no response of the val split has a valid reward: {said}; fix the service, "
            "then continue with --resume"
        )
    parts = score_metrics(scores)
    keys = (f"reward/{component}" for component in weights)
    out = {
        **interval("reward", known),
        "score": score_of(means, first),
        **{key: parts[key] for key in keys if key in parts},
    }
    if first is not None:
        pairs = [(a, b) for a, b in zip(first, means, strict=True) if None not in (a, b)]
        if pairs:
            out.update(interval("gain", [b - a for a, b in pairs]))
    return out


def score_of(means: Means, first: Means | None) -> float:
    """Averages over the prompts that had a valid reward in the `first` evaluation; evaluations are
    compared by it. A prompt whose reward failed keeps its baseline value, so that failures never
    look like improvement."""
    pairs = zip(means, means if first is None else first, strict=True)
    values = [before if now is None else now for now, before in pairs if before is not None]
    return float(np.mean(values or [m for m in means if m is not None]))


def described(scores: dict[str, float]) -> str:
    """Puts the val reward into words, with its gain where there is one."""
    text = f"val reward {scores['reward']:.4f}"
    if "gain" not in scores:
        return text
    low, high = scores["gain_low"], scores["gain_high"]
    return f"{text}, gain {scores['gain']:+.4f} (95 % {low:+.4f} to {high:+.4f})"


def interval(name: str, values: Sequence[float]) -> dict[str, float]:
    """Returns the mean and its 95 % interval as name, name_low and name_high."""
    mean, count = float(np.mean(values)), len(values)
    half = 1.96 * float(np.std(values)) / max(count - 1, 1) ** 0.5
    return {name: mean, f"{name}_low": mean - half, f"{name}_high": mean + half}
