"""Runs what every stage's loop shares: data, resuming, what is due at a step, SIGTERM, saving, and
the dump of batches with a non-finite loss."""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from flax import nnx
from jax.experimental import multihost_utils

from mm_jax.config.errors import UserError, require
from mm_jax.config.files import read_json, write_whole
from mm_jax.config.schema import Config
from mm_jax.data.batch import Shape
from mm_jax.data.datasets.common import SampleSource
from mm_jax.data.pipeline import (
    BatchRows,
    BatchSchedule,
    Loader,
    Recipe,
    list_items,
    train_iterator,
)
from mm_jax.data.prompts import Prompter
from mm_jax.data.shapes import Shapes
from mm_jax.models.sharding import batch_share, put_batch
from mm_jax.run import build, flops
from mm_jax.run.ahead import Ahead, shapes_of
from mm_jax.run.build import Run
from mm_jax.run.start import start_params, training_dtype
from mm_jax.training import hosts
from mm_jax.training.checkpoint import Checkpoints, load_stage
from mm_jax.training.metrics_writer import MetricsWriter
from mm_jax.training.state import TrainState

log = logging.getLogger(__name__)

SHAPES_FILE = "shapes.json"  # stage -> the shapes of its batches
NONFINITE_FILE = "nonfinite_batches.json"


class NonFiniteError(UserError, RuntimeError):
    """Says that the loss or gradient became NaN or infinite."""


class Preempted(Exception):  # noqa: N818 (no error: the run is to be resumed)
    """Ends a run after SIGTERM; its state is saved."""


# ---- data and weights of a stage ---------------------------------------------------------------


class StageData(NamedTuple):
    """Holds what a stage trains on."""

    recipe: Recipe
    prompter: Prompter
    schedule: BatchSchedule
    loader: Callable


def check_batch_size(config: Config, name: str, ways: int) -> None:
    """Raises ConfigError unless every part that a batch is split into divides evenly over the
    devices; `ways`: data x fsdp devices."""
    stage = config.stage[name]
    splits = {"accumulation": stage.accumulation}
    if stage.reinforces:
        splits["accumulation x rl.minibatches"] = stage.accumulation * stage.rl.minibatches
        splits["rl.chunks"] = stage.rl.chunks
    for what, parts in splits.items():
        require(
            stage.batch_size % (ways * parts) == 0,
            f"stage.{name}.batch_size: {stage.batch_size} is not a multiple of {ways * parts} "
            f"({ways} data x fsdp devices, {what} {parts})",
        )


def stage_seed(config: Config, name: str) -> int:
    # Stages of one run, and runs with neighbouring seeds, must not share their randomness.
    return config.seed * 1000 + config.stages.index(name)


def with_media(config: Config, name: str, split: SampleSource) -> SampleSource:
    """Opens a split as a stage reads it; a compressor reads no media."""
    if config.stage[name].objective == "compressor":
        return split
    return SampleSource(config.data.folder, split.split)


def stage_data(
    run: Run, name: str, split: SampleSource, only: Collection[str] | None = None
) -> StageData:
    """Lists a stage's examples (only those with ids in `only`, if given) and batches them.

    `split` is the train split without its media. Raises ConfigError where too few fit.
    """
    config, stage = run.config, run.config.stage[name]
    recipe = build.stage_recipe(config, stage)
    prompter = build.stage_prompter(run.prompter, stage, split)
    items, refused = list_items(split, recipe, prompter)
    items = [item for item in items if only is None or item.id in only]
    if refused and only is None:  # chosen ones come from examples that were listed before
        log.warning("%s: train examples left out: %s", name, dict(refused))
    require(
        len(items) >= stage.batch_size,
        f"stage.{name}.batch_size: {stage.batch_size} is more than the {len(items)} usable train "
        f"examples (left out: {dict(refused)})",
    )
    steps = stage.steps or max(1, round(stage.epochs * (len(items) // stage.batch_size)))
    shapes = stage_shapes(run, name, [item.lengths for item in items])
    schedule = BatchSchedule(
        items,
        recipe,
        stage.batch_size,
        stage_seed(config, name),
        steps,
        shapes,
        config.data.group_by_length,
    )
    share, shares = batch_share(run.abstract.mesh)
    source = with_media(config, name, split)
    loader = Loader(source, recipe, prompter, host=share, hosts=shares)
    return StageData(recipe, prompter, schedule, loader)


def stage_shapes(run: Run, name: str, lengths: Sequence[Shape]) -> Shapes:
    """Chooses the shapes of a stage's batches, or takes those that the run has recorded."""
    path = run.workdir / SHAPES_FILE

    def recorded() -> dict[str, list]:
        return read_json(path) if path.is_file() else {}

    def record() -> None:
        known = recorded()
        shapes = Shapes(tuple(Shape(*size) for size in known.get(name, ())))
        if not shapes.sizes or not shapes.fit(lengths):
            chosen = build.shapes(run.config, run.model_config, lengths)
            write_whole(path, json.dumps(known | {name: chosen.sizes}))

    # Process 0 alone decides: another processor may round otherwise, and see the file sooner.
    hosts.on_first(record)
    return Shapes(tuple(Shape(*size) for size in recorded()[name]))


def initial_params(run: Run, name: str) -> nnx.State:
    """Returns the parameters a stage starts from: the previous stage's best, or the run's own."""
    before = run.config.stage_before(name)
    if before:
        return load_stage(run, before)[0]
    dtype = training_dtype(run.config, run.config.stage[name])
    return start_params(run.config, run.create, run.abstract, dtype)


# ---- the loop ----------------------------------------------------------------------------------


class Due(NamedTuple):
    """Says what is to be done after a step."""

    log: bool
    evaluate: bool
    save: bool
    stop: bool


class Runner:
    """Keeps track of a stage's steps, and writes its metrics and checkpoints.

    Within `with`: `resume`, then `for step, batch in batches(...)`; each step ends with
    `finish_step`, which says what is due. done: steps taken; wait: seconds waited for the last
    batch; ahead: compiles programs.
    """

    def __init__(self, run: Run, name: str, schedule: BatchSchedule, writer: MetricsWriter):
        self.run, self.name, self.schedule, self.writer = run, name, schedule, writer
        self.stage, self.steps = run.config.stage[name], schedule.steps
        self.seed, self.done, self.wait = stage_seed(run.config, name), 0, 0.0
        self.checkpoints = Checkpoints(
            run.workdir / "checkpoints" / name, run.config.keep_checkpoints
        )
        self._exit = contextlib.ExitStack()
        self.ahead = Ahead(run.abstract.mesh, self._tell)
        self.bar: tqdm.tqdm | None = None

    def __enter__(self) -> Runner:
        self._exit.enter_context(contextlib.closing(self.checkpoints))
        self._exit.enter_context(contextlib.closing(self.ahead))
        self.trace = self._exit.enter_context(
            Profile(*self.run.config.profile_steps, self.run.workdir / "profile" / self.name)
        )
        return self

    def __exit__(self, *exception) -> None:
        self._exit.__exit__(*exception)

    def resume(self, state: TrainState, shardings: TrainState) -> tuple[TrainState, dict | None]:
        """Returns the newest checkpoint's state and its data item, or `state` and None."""
        count, size = len(self.schedule.items), self.schedule.batch_size
        log.info("%s: %d examples, %d steps of %d", self.name, count, self.steps, size)
        saved, data = self.checkpoints.steps(), None
        if saved:
            # `done` comes from the data item, not from the optimiser: a step of a reinforcement
            # stage takes several optimiser steps, or none.
            state, data, _ = self.checkpoints.restore_state(saved[-1], state, shardings)
            self.done = data["next_step"]
            log.info("%s: resumed at step %d of %d", self.name, self.done, self.steps)
        # Only now is there something to save: while weights load, SIGTERM ends the process.
        self.terminated = self._exit.enter_context(Terminated())
        # Without a checkpoint step 0 is evaluated again, so its records are dropped as well.
        self.writer.rewind(self.name, self.done if saved else -1)
        self.bar = self._exit.enter_context(
            tqdm.tqdm(
                total=self.steps,
                initial=self.done,
                desc=self.name,
                unit="step",
                mininterval=1.0,
                dynamic_ncols=True,
                disable=jax.process_index() > 0,
            )
        )
        return state, data

    def _tell(self, text: str) -> None:
        if self.bar is not None:
            self.bar.set_postfix_str(text)

    def abstract_batches(self, loader: Callable) -> list[Any]:
        """Returns one batch of each shape, as shapes with shardings."""
        first: dict[Shape, BatchRows] = {}
        for step in range(min(self.steps, self.schedule.steps_per_epoch)):
            rows = self.schedule[step]
            first.setdefault(rows.shape, rows)
            if len(first) == len(self.schedule.shapes.sizes):
                break
        found = []
        for rows in first.values():
            found.append(shapes_of(put_batch(loader(rows)[1], self.run.abstract.mesh)))
            sizes = flops.batch_shapes(found[-1]).items()
            shown = ", ".join(f"{name}{list(shape)}" for name, shape in sizes)
            log.info("%s: compiling for %s", self.name, shown)
        return found

    def batches(self, loader: Callable) -> Iterator[tuple[int, object]]:
        """Yields (step, batch of this process) from the resumed step on."""
        iterator = train_iterator(self.schedule, loader, self.done, self.run.config.data)
        self._exit.enter_context(contextlib.closing(iterator))
        for step in range(self.done, self.steps):
            self.trace.before(step)
            began = time.perf_counter()
            _, batch = next(iterator)  # loaded ahead; a wait here means that loading is too slow
            self.wait = time.perf_counter() - began
            yield step, batch

    def evaluation_due(self) -> bool:
        return due(self.done, self.stage.eval_every) or self.done == self.steps

    def finish_step(self) -> Due:
        """Counts a step and says what follows; the same on every process."""
        self.done += 1
        self.bar.update()
        evaluate = self.evaluation_due()
        # The last step saves its state anyway; `best_step` asks once more.
        stop = self.done < self.steps and self.terminated.asked(self.done)
        save = evaluate or stop or due(self.done, self.stage.checkpoint_every)
        return Due(save or due(self.done, self.run.config.log_every), evaluate, save, stop)

    def log(self, values: dict[str, float]) -> None:
        self.writer.write(self.name, self.done, values)

    def log_scores(self, scores: dict[str, float], text: str) -> None:
        """Writes the scores of an evaluation on val, and shows `text`."""
        self.log({f"val_{k}": v for k, v in scores.items()})
        self.bar.write(f"{self.name} step {self.done}: {text}")

    def save(
        self, state: TrainState, params: nnx.State, scores: dict | None, **data: object
    ) -> None:
        """Saves asynchronously; `params` is the inference view, `data` what resuming needs."""
        self.checkpoints.save(
            state._replace(step=jnp.int32(self.done)),
            params,
            data={"next_step": self.done, **data},
            meta={"stage": self.name, "seed": self.seed},
            metrics=scores,
        )

    def stop(self) -> None:
        """Ends the stage after SIGTERM, once everything is written."""
        self.checkpoints.wait()
        raise Preempted(f"{self.name}: stopped by SIGTERM; step {self.done} is saved")

    def best_step(self) -> int:
        """Returns the best step of a finished stage, or ends a run of one process if SIGTERM came
        in the stage's last step and other stages follow."""
        if self.terminated.came and self.name != self.run.config.stages[-1]:
            self.stop()
        self.checkpoints.wait()
        return self.checkpoints.best_step()

    def check_finite(self, steps: Sequence[int], metrics: Sequence[dict]) -> None:
        """Raises NonFiniteError where a step's loss or gradient is not finite, after writing the
        ids of the batches. steps[i]: the step that metrics[i] belongs to."""
        finite = [np.isfinite(m["loss"]) and np.isfinite(m["grad_norm"]) for m in metrics]
        bad = sorted({step for step, fine in zip(steps, finite, strict=True) if not fine})
        if not bad:
            return
        path = self.run.workdir / NONFINITE_FILE
        if jax.process_index() == 0:
            dump = [
                {"stage": self.name, "step": s, "ids": [i.id for i in self.schedule[s].items]}
                for s in bad
            ]
            path.write_text(json.dumps(dump, indent=1))
        raise NonFiniteError(
            f"{self.name}: loss or gradient is not finite, first at step {bad[0]} (window "
            f"{steps[0]}..{steps[-1]}); the ids of the batches are in {path}"
        )


def due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0


class Terminated:
    """Defers SIGTERM to the next step boundary; a second SIGTERM terminates at once.

    A single process handles the signal itself. Several leave it to jax's preemption service, which
    makes them agree on a step: a process that stopped alone would leave the others waiting in a
    collective.
    """

    def __init__(self):
        self.came = False
        # Python lets only the main thread set signal handlers.
        main = threading.current_thread() is threading.main_thread()
        self.handles = jax.process_count() == 1 and main

    def __enter__(self):
        if self.handles:
            self.before = signal.signal(signal.SIGTERM, self._handle)
        return self

    def _handle(self, number, frame):
        # A flag and no more: the signal may arrive anywhere, even inside a save.
        self.came = True
        signal.signal(signal.SIGTERM, self.before)

    def asked(self, step: int) -> bool:
        """Says whether to stop after `step`; the same answer on every process."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self.came

    def __exit__(self, *exception):
        if self.handles:
            signal.signal(signal.SIGTERM, self.before)


class Profile:
    """Traces the steps [first, last) into `folder`, for TensorBoard or Perfetto."""

    def __init__(self, first: int, last: int, folder):
        self.first, self.last, self.folder, self.on = first, last, str(folder), False

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
