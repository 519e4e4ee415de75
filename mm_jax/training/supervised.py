"""Trains supervised stages (objective sft or compressor): the loss, the step, and the loop.

SFT and compressor pre-training differ only in their data; both minimise the token loss.
"""

from __future__ import annotations

import functools
import logging
import math
import resource
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mm_jax.data.batch import Shape
from mm_jax.data.datasets.common import SampleSource
from mm_jax.data.pipeline import BatchSchedule, Loader, split_batches
from mm_jax.data.records import Sample
from mm_jax.data.shapes import Shapes
from mm_jax.generation.predictor import label_accuracy, predictor_of
from mm_jax.generation.reconstruction import Reconstructor, reconstruction_metrics
from mm_jax.models.sharding import put_batch
from mm_jax.ops.log_probs import token_log_probs
from mm_jax.run import build, flops
from mm_jax.run.ahead import compile_for
from mm_jax.run.build import Run
from mm_jax.training.metrics_writer import MetricsWriter
from mm_jax.training.runner import (
    NonFiniteError,
    Runner,
    StageData,
    initial_params,
    stage_data,
    with_media,
)
from mm_jax.training.state import Remainder, StageModel, TrainState
from mm_jax.training.step import Validation, accumulated, apply_gradients, jit_update

log = logging.getLogger(__name__)

GIB = 2**30
# Modality sets that a row may have, in the order of the metric `subset_loss`.
SUBSETS = ("text", "audio", "video", "audio_video")


# ---- the objective -----------------------------------------------------------------------------


def token_loss(
    trainable: nnx.State,
    rest: Remainder,
    batch,
    dropout_key: jax.Array | None = None,
    token_dropout: float = 0.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Sums the weighted cross-entropy of the target tokens, and what the metrics need.

    Reduction: the caller divides by `weight`, so that accumulation over micro-batches and devices
    gives the weighted mean over all target tokens. Returns float32 scalars, and float32[4] for the
    modality subsets of SUBSETS.
    """
    model = rest.model(trainable)
    hidden = model(batch, dropout_key=dropout_key, token_dropout=token_dropout)
    lm = model.language_model
    # Position t predicts token t + 1; the last position would get the first token, so weight 0.
    targets = jnp.roll(batch.tokens, -1, axis=1)
    weights = jnp.roll(batch.loss_weights, -1, axis=1).at[:, -1].set(0)
    counted = weights > 0  # prompts, padding and filler rows have weight 0
    logps, best, _ = token_log_probs(
        hidden,
        lm.head_kernel(),
        targets,
        vocab_padding=lm.config.vocab_padding,
        counted=counted,
    )
    losses = -weights * logps
    shows = lambda token: jnp.any(batch.tokens == token, axis=1)  # noqa: E731
    # Sums per subset by a product with one-hot rows: shapes stay fixed under jit.
    subset = shows(model.config.audio_token_id) + 2 * shows(model.config.video_token_id)
    rows = jax.nn.one_hot(subset, len(SUBSETS), dtype=jnp.float32)
    return jnp.sum(losses), {
        "weight": jnp.sum(weights),
        "targets": jnp.sum(counted, dtype=jnp.float32),
        "correct": jnp.sum(counted & (best == targets), dtype=jnp.float32),
        "tokens": jnp.sum(batch.mask, dtype=jnp.float32),
        "subset_loss": jnp.sum(losses, axis=1) @ rows,
        "subset_weight": jnp.sum(weights, axis=1) @ rows,
    }


def token_metrics(sums: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {
        "token_accuracy": sums["correct"] / jnp.maximum(sums["targets"], 1),
        **{name: sums[name] for name in ("tokens", "subset_loss", "subset_weight")},
    }


class Objective(NamedTuple):
    """Defines what a stage minimises: loss(trainable, rest, batch, dropout_key, token_dropout) ->
    (summed loss, sums with its "weight"), and metrics(sums) -> metrics."""

    loss: Callable = token_loss
    metrics: Callable = token_metrics


TOKENS = Objective()


# ---- the step ----------------------------------------------------------------------------------


def make_train_step(model: StageModel, seed: int, objective: Objective = TOKENS) -> Callable:
    """Returns the jitted `(*state, batch) -> ((trainable, opt_state, step), metrics)` of
    `jit_update`.

    The loss is the weighted mean over all target tokens (or pairs) of the whole batch, whatever the
    number of micro-batches. Dropout keys are fold_in(fold_in(seed, step), micro-batch).
    """
    stage, graph = model.stage, model.abstract.graph

    grad = accumulated(
        jax.value_and_grad(objective.loss, has_aux=True),
        stage.accumulation,
        lambda sums: jax.tree.map(lambda a: jnp.sum(a, axis=0), sums),
    )

    def train_step(trainable, opt_state, step, frozen, batch):
        key = jax.random.fold_in(jax.random.key(seed), step)
        if stage.accumulation == 1:  # as `accumulated` does for the first micro-batch
            key = jax.random.fold_in(key, 0)
        rest = Remainder(graph, frozen)
        (loss, sums), grads = grad(trainable, rest, batch, key, stage.token_dropout)
        # Divided once, after the sum: micro-batches hold different numbers of targets, so a mean
        # of their means would give a token of a short micro-batch more weight.
        scale = 1.0 / jnp.maximum(sums["weight"], 1e-6)
        grads = jax.tree.map(lambda g: g * scale, grads)
        new, opt_state, norms = apply_gradients(model.tx, grads, opt_state, trainable)
        metrics = {"loss": loss * scale, **objective.metrics(sums), **norms}
        return (new, opt_state, step + 1), metrics

    return jit_update(train_step, model)


class Window:
    """Collects the steps since the last log; their metrics stay on the device until `fetch`."""

    # JAX dispatches steps ahead; reading a metric waits for its step and leaves the device idle.

    def __init__(self, runner: Runner, hosts: int):
        self.runner, self.hosts = runner, hosts  # hosts: equal shares of a global batch
        self.flops_of: dict[tuple, float] = {}
        self.restart()

    def restart(self) -> None:
        self.steps: list[int] = []
        self.metrics: list[dict] = []
        self.flops = self.waited = 0.0
        self.places = 0  # of tokens, padding among them
        self.began = time.perf_counter()

    def add(self, step: int, batch, metrics: dict) -> None:
        shapes = flops.batch_shapes(batch)
        key = tuple(shapes.values())
        places = math.prod(shapes["tokens"]) + math.prod(shapes.get("responses", (0,)))
        self.places += places * self.hosts
        if key not in self.flops_of:
            shapes = {name: (n * self.hosts, *rest) for name, (n, *rest) in shapes.items()}
            stage = self.runner.stage
            self.flops_of[key] = flops.train_flops(
                self.runner.run.model_config,
                shapes,
                stage.trainable,
                stage.lora.rank > 0,
                head="responses" in shapes,
            )
        self.flops += self.flops_of[key]
        self.waited += self.runner.wait
        self.steps.append(step)
        self.metrics.append(metrics)

    def fetch(self) -> dict[str, float]:
        """Averages over the window; between logs only this waits for the device."""
        fetched = jax.device_get(self.metrics)
        seconds = time.perf_counter() - self.began
        self.runner.check_finite(self.steps, fetched)
        vectors = [k for k, v in fetched[0].items() if v.ndim]
        # A subset's loss is a ratio of sums over the window: many steps have no row of a subset.
        sums = {name: np.sum([m.pop(name) for m in fetched], axis=0) for name in vectors}
        values = {k: float(np.mean([m[k] for m in fetched])) for k in fetched[0]}
        for i, name in enumerate(SUBSETS if sums else ()):
            if sums["subset_weight"][i] > 0:
                values[f"loss/{name}"] = float(sums["subset_loss"][i] / sums["subset_weight"][i])
        devices = self.runner.run.abstract.mesh.devices
        values["padding_share"] = 1 - values["tokens"] * len(fetched) / self.places
        values["programs"] = len(self.flops_of)
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


# ---- evaluation on val -------------------------------------------------------------------------


def evaluation_shapes(run: Run) -> Callable[[list[Shape]], Shapes]:
    """Returns what chooses the shapes of a validation: half as many as of training, as it has
    fewer batches."""
    count = max(1, run.config.data.shapes // 2)
    return lambda lengths: build.shapes(run.config, run.model_config, lengths, count)


def blank_rows(batch, real: int) -> None:
    """Removes the rows from `real` on from the loss."""
    batch.loss_weights[real:] = 0.0


class Evaluation(NamedTuple):
    """Evaluates on val: scores(params) -> metrics, whose "score" (larger is better) chooses the
    checkpoint; programs: each compiles what that needs, for parameters as shapes."""

    scores: Callable[[nnx.State], dict[str, float]]
    programs: tuple[Callable[[nnx.State], None], ...] = ()


def make_evaluation(run: Run, name: str, val: SampleSource, data: StageData) -> Evaluation:
    """Evaluates token loss, label accuracies (`select_by=labels`), and for a compressor the quality
    of its greedy reconstructions."""
    config, stage = run.config, run.config.stage[name]
    recipe, modality = data.recipe.without_dropout(), stage.eval_modality
    source = with_media(config, name, val)
    loader = Loader(source, recipe, data.prompter)
    size = stage.batch_size // stage.accumulation  # a micro-batch of training: it fits in memory
    split = (val, recipe, data.prompter, size, modality, evaluation_shapes(run))
    batches = split_batches(*split, stage.eval_examples)
    validate = Validation(run.abstract, token_loss, loader, batches, blank_rows)
    predictor = predictor_of(run) if stage.select_by == "labels" else None
    written = []
    if stage.objective == "compressor" and stage.eval_reconstructions:
        written = split_batches(*split, stage.eval_reconstructions)
        reconstructor = Reconstructor(run.abstract, run.tokenizer)

    def val_samples() -> list[Sample]:
        return [source[i.record] for rows, real in batches for i in rows.items[:real]]

    def evaluate(params: nnx.State) -> dict[str, float]:
        sums = validate(params)
        loss = sums["loss"] / max(sums["weight"], 1e-6)
        accuracy = sums["correct"] / max(sums["targets"], 1)
        metrics = {"loss": loss, "token_accuracy": accuracy, "score": -loss}
        if predictor is not None:
            samples = val_samples()
            found = predictor.predict(
                params,
                samples,
                modality,
                config.data.history_labels,
                respond=False,
                predictions=recipe.predictions,
            )
            labels = label_accuracy(found, samples)
            metrics.update({f"{task}_accuracy": v for task, v in labels.items()})
            metrics["score"] = sum(labels.values()) / len(labels)
        if written:
            parts = [(loader(rows)[1], real) for rows, real in written]
            texts = reconstructor.texts(params, parts)
            found = reconstruction_metrics(texts, run.prompter.label_space)
            metrics.update({f"greedy_{k}": v for k, v in found.items()})
        return metrics

    def compile_labels(params: nnx.State) -> None:
        predictor.compile_labels(params, val_samples(), modality, config.data.history_labels)

    return Evaluation(evaluate, (validate.compile,) + (compile_labels,) * (predictor is not None))


# ---- the stage ---------------------------------------------------------------------------------


class SetUp(NamedTuple):
    """Holds what the loop needs from a stage. initial() -> the plain model's parameters before the
    stage; hosts: the number of equal shares in which a global batch is loaded."""

    schedule: BatchSchedule
    loader: Callable
    hosts: int
    model: StageModel
    initial: Callable[[], nnx.State]
    objective: Objective
    evaluation: Evaluation


def set_up(run: Run, name: str, splits: dict[str, SampleSource]) -> SetUp:
    """Sets up an sft or compressor stage."""
    data = stage_data(run, name, splits["train"])
    frozen_dtype = build.dtypes(run.config).compute
    model = StageModel(run.abstract, run.config.stage[name], data.schedule.steps, frozen_dtype)
    return SetUp(
        data.schedule,
        data.loader,
        data.loader.hosts,
        model,
        functools.partial(initial_params, run, name),
        TOKENS,
        make_evaluation(run, name, splits["val"], data),
    )


def train(
    run: Run,
    name: str,
    splits: dict[str, SampleSource],
    writer: MetricsWriter,
    set_up: Callable[[Run, str, dict[str, SampleSource]], SetUp] = set_up,
) -> int:
    """Trains a stage, resuming from its newest checkpoint; returns its best step on val.

    `splits`: train and val, without their media; `set_up` prepares the kind of stage. Raises
    NonFiniteError, after writing the ids of the offending batches, and Preempted after SIGTERM,
    once the state of the last step is saved.
    """
    # ---- set-up
    stage = set_up(run, name, splits)
    model, runner = stage.model, Runner(run, name, stage.schedule, writer)
    train_step = make_train_step(model, runner.seed, stage.objective)
    window = Window(runner, stage.hosts)
    with runner:
        # ---- compile, while weights are loaded; an evaluation's programs while the stage trains
        programs = [
            runner.ahead.add(compile_for, train_step, *model.abstract_state(), batch)
            for batch in runner.abstract_batches(stage.loader)
        ]
        later = [runner.ahead.add(p, model.abstract_params()) for p in stage.evaluation.programs]
        # ---- resume
        state = model.start(stage.initial(), runner.seed)
        state, _ = runner.resume(state, model.shardings)
        runner.ahead.wait(programs)
        window.restart()
        # ---- loop
        for step, batch in runner.batches(stage.loader):
            with jax.set_mesh(model.mesh):  # returns at once; the device works on
                new, metrics = train_step(*state, put_batch(batch, model.mesh))
            state = TrainState(*new, state.frozen)
            window.add(step, batch, metrics)
            due = runner.finish_step()
            if due.log:
                log_window(runner, window, model)
            # ---- evaluation and saving
            if due.save:
                scores = None
                params = model.inference_params(state)
                if due.evaluate:
                    runner.ahead.wait(later)
                    scores = evaluated(runner, stage.evaluation.scores(params))
                runner.save(state, params, scores)
                del params  # may be a second copy of the weights: free it before the next step
            if due.stop:
                runner.stop()
            if due.log:
                window.restart()  # so that evaluating and saving do not count as training time
        return runner.best_step()


def log_window(runner: Runner, window: Window, model: StageModel) -> None:
    """Writes the metrics of the steps since the last log."""
    values = window.fetch()
    runner.log({**values, "learning_rate": float(model.schedule(runner.done - 1))})
    runner.bar.set_postfix(loss=f"{values['loss']:.3f}", tok_s=f"{values['tokens_per_second']:.0f}")


def evaluated(runner: Runner, scores: dict[str, float]) -> dict[str, float]:
    """Writes the scores of an evaluation. Raises NonFiniteError where they are not finite."""
    if not np.isfinite(scores["score"]):
        raise NonFiniteError(f"{runner.name}: val metrics at step {runner.done}: {scores}")
    shown = ", ".join(f"{k} {v:.4f}" for k, v in scores.items() if k != "score")
    runner.log_scores(scores, f"val {shown}")
    return scores
