"""The one training loop; stages differ in objective, data and trained parts."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import pathlib
import resource
import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import tqdm
from flax import nnx
from jax.experimental import multihost_utils

from mm_jax.data.pipeline import Loader, TrainPlan, train_iterator
from mm_jax.models import lora
from mm_jax.models.abstract import Abstract, adapt_params, adapted_model
from mm_jax.models.lora import LoraConfig
from mm_jax.models.sharding import put_batch
from mm_jax.training import flops
from mm_jax.training.checkpoint import Checkpoints
from mm_jax.training.metrics_writer import MetricsWriter
from mm_jax.training.optimizer import make_optimizer
from mm_jax.training.state import make_plain_params, merged_params, start_state, state_shardings
from mm_jax.training.step import SUBSETS, TOKENS, Objective, make_train_step

log = logging.getLogger(__name__)

GIB = 2**30


class NonFiniteError(RuntimeError):
    """The loss or gradient became NaN or infinite."""


class Preempted(Exception):  # noqa: N818 (no error: the run is to be resumed)
    """SIGTERM came; the state was saved."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageRun:
    """What every stage needs to run.

    profile: steps [first, last) of a profiler trace; (0, 0) for none.
    """

    name: str
    stage: Any
    plan: TrainPlan
    loader: Loader
    seed: int
    log_every: int
    keep_checkpoints: int
    reader_threads: int
    reader_processes: int
    prefetch: int
    frozen_dtype: Any
    profile: tuple[int, int] = (0, 0)
    lora: LoraConfig | None = None
    # (adapted parameters, their shardings) -> the same with the adapters training goes on with.
    start_adapters: Callable[[nnx.State, nnx.State], nnx.State] = lambda params, shardings: params


@dataclasses.dataclass(frozen=True, kw_only=True)
class SupervisedRun(StageRun):
    """What a supervised stage needs besides.

    evaluate(params) -> metrics with "score" (larger is better), on the val split.
    step_flops(shapes) -> FLOPs of a training step on a global batch of these shapes.
    """

    evaluate: Callable[[nnx.State], dict[str, float]]
    step_flops: Callable[[dict[str, tuple[int, ...]]], float]
    objective: Objective = TOKENS


def run_stage(
    run: SupervisedRun,
    abstract: Abstract,
    initial: Callable[[], nnx.State],
    workdir: pathlib.Path,
    writer: MetricsWriter,
) -> int:
    """Trains one stage, resuming from its newest checkpoint; returns the best step.

    `initial()` gives the parameters before the first step. Raises NonFiniteError, after writing
    the ids of the offending batches to `nonfinite_batches.json`, and Preempted after SIGTERM, when
    the state of the step that ran is saved.
    """
    stage, steps = run.stage, run.plan.steps
    tx, schedule = make_optimizer(stage, steps)
    params, inference_params = initial(), lambda params: params
    if run.lora is not None:
        add = lambda model, rngs: lora.add_adapters(model, run.lora, rngs)  # noqa: E731
        plain, abstract = abstract, adapted_model(abstract, add)
        donate = run.lora.base == "none"
        params = adapt_params(plain, abstract, add, params, run.seed, donate)
        params = run.start_adapters(params, abstract.shardings)
        inference_params = make_plain_params(plain, run.lora, run.frozen_dtype)
    adapters = run.lora is not None
    parts = (*stage.trainable, *run.objective.parts)
    shardings = state_shardings(abstract, parts, tx, adapters)
    checkpoints = Checkpoints(workdir / "checkpoints" / run.name, run.keep_checkpoints)
    state = start_state(params, parts, tx, shardings, run.frozen_dtype, adapters)
    del params
    saved = checkpoints.steps()
    start = 0
    if saved:
        state, data, _ = checkpoints.restore_state(saved[-1], state, shardings)
        start = data["next_step"]
        log.info("%s: resumed at step %d of %d", run.name, start, steps)
    writer.rewind(run.name, start)
    train_step = make_train_step(
        abstract,
        tx,
        shardings,
        run.seed,
        stage.accumulation,
        stage.token_dropout,
        run.objective,
    )
    batches = train_iterator(
        run.plan, run.loader, start, run.reader_threads, run.reader_processes, run.prefetch
    )
    window = Window(run, abstract, workdir)
    bar = progress_bar(run, start)

    with (
        contextlib.closing(checkpoints),
        contextlib.closing(batches),
        bar,
        Terminated() as term,
        Profile(run, workdir) as trace,
    ):
        for step in range(start, steps):
            trace.before(step)
            batch = window.wait_for(batches)
            state, metrics = train_step(state, put_batch(batch, abstract.mesh))
            window.add(step, batch, metrics)
            done = step + 1
            bar.update()
            evaluating = due(done, stage.eval_every) or done == steps
            stopping = done < steps and term.asked(done)
            saving = evaluating or stopping or due(done, stage.checkpoint_every)
            if not (saving or due(done, run.log_every)):
                continue
            values = window.fetch()
            writer.write(run.name, done, {**values, "learning_rate": float(schedule(step))})
            bar.set_postfix(
                loss=f"{values['loss']:.3f}", tok_s=f"{values['tokens_per_second']:.0f}"
            )
            scores = None
            if saving:
                seen = inference_params(merged_params(state))
            if evaluating:
                scores = run.evaluate(seen)
                if not np.isfinite(scores["score"]):
                    raise NonFiniteError(f"{run.name}: val metrics at step {done}: {scores}")
                writer.write(run.name, done, {f"val_{k}": v for k, v in scores.items()})
                shown = ", ".join(f"{k} {v:.4f}" for k, v in scores.items() if k != "score")
                bar.write(f"{run.name} step {done}: val {shown}")
            if saving:
                meta = {"stage": run.name, "seed": run.seed}
                checkpoints.save(state, seen, data={"next_step": done}, meta=meta, metrics=scores)
                del seen
            if stopping:
                checkpoints.wait()
                raise Preempted(f"{run.name}: stopped by SIGTERM; step {done} is saved")
            window.restart()
        checkpoints.wait()
        return checkpoints.best_step()


def progress_bar(run: StageRun, start: int) -> tqdm.tqdm:
    """Steps, speed and time left of a stage; shown by process 0."""
    return tqdm.tqdm(
        total=run.plan.steps,
        initial=start,
        desc=run.name,
        unit="step",
        mininterval=1.0,
        dynamic_ncols=True,
        disable=jax.process_index() > 0,
    )


def due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0


class Window:
    """The steps since the last log: their metrics stay on the device until `fetch`."""

    def __init__(self, run: SupervisedRun, abstract: Abstract, workdir: pathlib.Path):
        self.run, self.mesh, self.workdir = run, abstract.mesh, workdir
        self.flops_of: dict[tuple, float] = {}
        self.restart()

    def restart(self) -> None:
        self.steps: list[tuple[int, dict]] = []
        self.flops = self.waited = 0.0
        self.began = time.perf_counter()

    def wait_for(self, batches):
        began = time.perf_counter()
        _, batch = next(batches)
        self.waited += time.perf_counter() - began
        return batch

    def add(self, step: int, batch, metrics: dict) -> None:
        shapes = flops.batch_shapes(batch)
        key = tuple(shapes.values())
        if key not in self.flops_of:
            shown = ", ".join(f"{name}{list(shape)}" for name, shape in shapes.items())
            log.info("%s: compiling for %s", self.run.name, shown)
            shares = self.run.loader.hosts
            shapes = {name: (shape[0] * shares, *shape[1:]) for name, shape in shapes.items()}
            self.flops_of[key] = self.run.step_flops(shapes)
        self.flops += self.flops_of[key]
        self.steps.append((step, metrics))

    def fetch(self) -> dict[str, float]:
        """Means over the window; the only place that waits for the device."""
        fetched = jax.device_get([metrics for _, metrics in self.steps])
        seconds = time.perf_counter() - self.began
        self._check_finite(fetched)
        vectors = [k for k, v in fetched[0].items() if v.ndim]
        sums = {name: np.sum([m.pop(name) for m in fetched], axis=0) for name in vectors}
        values = {k: float(np.mean([m[k] for m in fetched])) for k in fetched[0]}
        for i, name in enumerate(SUBSETS if sums else ()):
            if sums["subset_weight"][i] > 0:
                values[f"loss/{name}"] = float(sums["subset_loss"][i] / sums["subset_weight"][i])
        devices = self.mesh.devices
        values["tokens_per_second"] = values.pop("tokens") * len(fetched) / seconds
        values["tflops_per_second_per_device"] = self.flops / seconds / devices.size / 1e12
        used = flops.mfu(self.flops, seconds, devices.size, devices.flat[0].device_kind)
        if used is not None:
            values["mfu"] = used
        values["data_wait_share"] = self.waited / seconds
        values["host_memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
        stats = jax.local_devices()[0].memory_stats()  # None on CPU
        if stats and "peak_bytes_in_use" in stats:
            values["device_memory_gib"] = stats["peak_bytes_in_use"] / GIB
        return values

    def _check_finite(self, fetched: Sequence[dict]) -> None:
        run = self.run
        bad = [
            step
            for (step, _), m in zip(self.steps, fetched, strict=True)
            if not (np.isfinite(m["loss"]) and np.isfinite(m["grad_norm"]))
        ]
        if not bad:
            return
        path = self.workdir / "nonfinite_batches.json"
        if jax.process_index() == 0:
            batches = [
                {"stage": run.name, "step": s, "ids": [item.id for item in run.plan[s].items]}
                for s in bad
            ]
            path.write_text(json.dumps(batches, indent=1))
        raise NonFiniteError(
            f"{run.name}: loss or gradient is not finite, first at step {bad[0]} (window "
            f"{self.steps[0][0]}..{self.steps[-1][0]}); the ids of the batches are in {path}"
        )


class Terminated:
    """Turns SIGTERM into a question, a second one into the end: one process handles it itself,
    several let jax's preemption service agree on a step that all of them reach."""

    def __init__(self):
        self.came = False
        main = threading.current_thread() is threading.main_thread()
        self.handles = jax.process_count() == 1 and main

    def __enter__(self):
        if self.handles:
            self.before = signal.signal(signal.SIGTERM, self._handle)
        return self

    def _handle(self, number, frame):
        self.came = True
        signal.signal(signal.SIGTERM, self.before)

    def asked(self, step: int) -> bool:
        """Whether to stop after `step`; the same answer on every process."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self.came

    def __exit__(self, *exception):
        if self.handles:
            signal.signal(signal.SIGTERM, self.before)


class Profile:
    """A profiler trace of the steps [first, last) in `profile/`, for TensorBoard or Perfetto."""

    def __init__(self, run: StageRun, workdir: pathlib.Path):
        self.first, self.last = run.profile
        self.folder = str(workdir / "profile" / run.name)
        self.on = False

    def __enter__(self):
        return self

    def before(self, step: int) -> None:
        if step == self.first and self.last > self.first:
            jax.profiler.start_trace(self.folder)
            self.on = True
        elif step == self.last:
            self.stop()

    def stop(self) -> None:
        if self.on:
            jax.profiler.stop_trace()
            self.on = False

    def __exit__(self, *exception):
        self.stop()
