"""The one training loop; stages differ in objective, data and trained parts."""

from __future__ import annotations

import dataclasses
import json
import logging
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import tqdm
from flax import nnx

from mm_jax.data.pipeline import Loader, TrainPlan, train_iterator
from mm_jax.training.checkpoint import Checkpoints
from mm_jax.training.metrics_writer import MetricsWriter
from mm_jax.training.sharding import put_batch
from mm_jax.training.state import (
    Abstract,
    make_optimizer,
    make_train_step,
    merged_params,
    start_state,
    state_shardings,
)

log = logging.getLogger(__name__)


class NonFiniteError(RuntimeError):
    """The loss or gradient became NaN or infinite."""


@dataclasses.dataclass(frozen=True)
class StageRun:
    """What a stage needs to run.

    evaluate(params) -> metrics with "score" (larger is better), on the val split.
    """

    name: str
    stage: Any
    plan: TrainPlan
    loader: Loader
    evaluate: Callable[[nnx.State], dict[str, float]]
    seed: int
    log_every: int
    keep_checkpoints: int
    reader_threads: int
    prefetch: int
    frozen_dtype: Any


def run_stage(
    run: StageRun,
    abstract: Abstract,
    initial: Callable[[], nnx.State],
    workdir: pathlib.Path,
    writer: MetricsWriter,
) -> int:
    """Trains one stage, resuming from its newest checkpoint; returns the best step.

    `initial()` gives the parameters before the first step. Raises NonFiniteError, after writing
    the ids of the offending batches to `nonfinite_batches.json`.
    """
    stage, steps = run.stage, run.plan.steps
    tx, schedule = make_optimizer(stage, steps)
    shardings = state_shardings(abstract, stage.trainable, tx)
    checkpoints = Checkpoints(workdir / "checkpoints" / run.name, run.keep_checkpoints)
    state = start_state(initial(), stage.trainable, tx, shardings, run.frozen_dtype)
    saved = checkpoints.steps()
    start = 0
    if saved:
        state, data, _ = checkpoints.restore_state(saved[-1], state, shardings)
        start = data["next_step"]
        log.info("%s: resumed at step %d of %d", run.name, start, steps)
    train_step = make_train_step(
        abstract, tx, shardings, run.seed, stage.accumulation, stage.token_dropout
    )
    batches = train_iterator(run.plan, run.loader, start, run.reader_threads, run.prefetch)
    every = stage.eval_every or steps
    window: list[tuple[int, tuple[str, ...], dict]] = []
    shapes: set[tuple] = set()
    bar = tqdm.tqdm(
        total=steps, initial=start, desc=run.name, unit="step", mininterval=1.0, dynamic_ncols=True
    )
    clock = time.perf_counter()
    for step in range(start, steps):
        ids, batch = next(batches)
        shape = tuple(a.shape for a in batch)
        if shape not in shapes:
            shapes.add(shape)
            names = ", ".join(
                f"{name}{list(s)}" for name, s in zip(batch._fields, shape, strict=True)
            )
            log.info("%s: compiling for %s", run.name, names)
        state, metrics = train_step(state, put_batch(batch, abstract.mesh))
        window.append((step, ids, metrics))
        done = step + 1
        bar.update()
        if done % run.log_every == 0 or done == steps or done % every == 0:
            values = fetch_window(window, workdir, run.name)
            seconds = time.perf_counter() - clock
            values["tokens_per_second"] = values.pop("tokens") * len(window) / seconds
            values["learning_rate"] = float(schedule(step))
            writer.write(run.name, done, values)
            bar.set_postfix(
                loss=f"{values['loss']:.3f}", tok_s=f"{values['tokens_per_second']:.0f}"
            )
            window.clear()
            clock = time.perf_counter()
        if done % every == 0 or done == steps:
            scores = run.evaluate(merged_params(state))
            if not np.isfinite(scores["score"]):
                raise NonFiniteError(f"{run.name}: val metrics at step {done}: {scores}")
            writer.write(run.name, done, {f"val_{k}": v for k, v in scores.items()})
            checkpoints.save(
                state,
                data={"next_step": done},
                meta={"stage": run.name, "seed": run.seed},
                metrics=scores,
            )
            shown = ", ".join(f"{k} {v:.4f}" for k, v in scores.items() if k != "score")
            bar.write(f"{run.name} step {done}: val {shown}")
            clock = time.perf_counter()
    bar.close()
    checkpoints.wait()
    best = checkpoints.best_step()
    checkpoints.close()
    return best


def fetch_window(
    window: list[tuple[int, tuple[str, ...], dict]], workdir: pathlib.Path, name: str
) -> dict[str, float]:
    """Means over the steps since the last log; the only place that waits for the device."""
    fetched = jax.device_get([metrics for _, _, metrics in window])
    bad = [
        (step, ids)
        for (step, ids, _), m in zip(window, fetched, strict=True)
        if not (np.isfinite(m["loss"]) and np.isfinite(m["grad_norm"]))
    ]
    if bad:
        path = workdir / "nonfinite_batches.json"
        path.write_text(
            json.dumps([{"stage": name, "step": s, "ids": list(ids)} for s, ids in bad], indent=1)
        )
        raise NonFiniteError(
            f"{name}: loss or gradient is not finite, first at step {bad[0][0]} (window "
            f"{window[0][0]}..{window[-1][0]}); the ids of the batches are in {path}"
        )
    return {k: float(np.mean([m[k] for m in fetched])) for k in fetched[0]}
