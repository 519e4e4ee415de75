"""Trains one stage of a run: its data, its evaluation on val, and the loop of its objective."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Collection

import jax
from ml_collections import ConfigDict
from tqdm.contrib.logging import logging_redirect_tqdm

from mm_jax.config.errors import require
from mm_jax.data.datasets.common import SampleSource
from mm_jax.data.pipeline import (
    Loader,
    PlannedBatch,
    Task,
    TrainPlan,
    evaluation_batches,
    list_items,
)
from mm_jax.data.prompts import Prompter
from mm_jax.generation.predictor import label_accuracy
from mm_jax.generation.reconstruction import Reconstructor, reconstruction_metrics
from mm_jax.models.abstract import Abstract, adapt_params
from mm_jax.models.sharding import batch_share, put_whole_batch
from mm_jax.rewards.build import make_pool, reward_weights
from mm_jax.rl import policy, reward_model
from mm_jax.rl.reinforce import PolicyRun, run_policy_stage
from mm_jax.rl.rollout import Scoring
from mm_jax.run import build
from mm_jax.run.folder import Session
from mm_jax.run.start import start_adapters, start_params, training_dtype
from mm_jax.training import hosts
from mm_jax.training.flops import train_flops
from mm_jax.training.metrics_writer import MetricsWriter
from mm_jax.training.state import cast
from mm_jax.training.step import TOKENS, make_eval_step
from mm_jax.training.supervised import SupervisedRun, run_stage

log = logging.getLogger(__name__)


def train_stage(
    session: Session, sources: dict[str, SampleSource], name: str, writer: MetricsWriter
) -> int:
    config = session.config
    stage = config.stage[name]
    task = build.stage_task(config, stage)
    prompter = build.stage_prompter(session.prompter, stage, sources["train"])
    items, refused = list_items(sources["train"], task, prompter)
    share, shares = batch_share(session.abstract.mesh)
    buckets = build.buckets(config)
    source = loaded_source(config, stage, sources["train"])
    loader = Loader(source, task, prompter, buckets, host=share, hosts=shares)
    seed = config.seed * 1000 + config.stages.index(name)

    def initial():
        before = build.stage_before(config, name)
        if not before:
            dtype = training_dtype(config, stage)
            return start_params(config, session.create, session.abstract, dtype)
        return session.stage_params(before)[0]

    pairs = None
    if stage.objective == "preference":
        pairs = collect_pairs(session, sources, name, loader, initial, seed)
        items = [item for item in items if item.id in pairs["train"]]
        length = reward_model.padded_length(list(pairs.values()))
        loader = reward_model.PairLoader(loader, pairs["train"], length)
    if refused:
        log.warning("%s: train examples left out: %s", name, dict(refused))
    require(
        len(items) >= stage.batch_size,
        f"stage.{name}.batch_size: {stage.batch_size} is more than the {len(items)} usable train "
        f"examples (left out: {dict(refused)})",
    )
    steps = stage.steps or max(1, round(stage.epochs * (len(items) // stage.batch_size)))
    plan = TrainPlan(
        items, task, stage.batch_size, seed, steps, buckets, config.data.group_by_length
    )
    log.info("%s: %d examples, %d steps of %d", name, len(items), steps, stage.batch_size)
    common = dict(
        name=name,
        stage=stage,
        plan=plan,
        loader=loader,
        seed=seed,
        log_every=config.log_every,
        keep_checkpoints=config.keep_checkpoints,
        reader_threads=config.data.reader_threads,
        reader_processes=config.data.reader_processes,
        prefetch=config.data.prefetch,
        frozen_dtype=build.dtypes(config).compute,
        lora=build.lora_config(stage),
        profile=tuple(config.profile_steps),
    )
    if stage.lora.init_from:
        common["start_adapters"] = functools.partial(start_adapters, stage.lora.init_from)

    with logging_redirect_tqdm():  # log lines stand above the progress bar
        if stage.objective in ("grpo", "ppo"):
            return train_policy(session, sources, common, task, initial, writer)
        abstract = session.abstract
        if pairs is None:
            evaluate = make_evaluation(session, sources["val"], name, prompter)
            objective = TOKENS
        else:
            abstract = reward_model.with_head(session.abstract)
            evaluate = make_pair_evaluation(
                session, sources["val"], name, abstract, pairs["val"], loader.length
            )
            objective = reward_model.PAIRS
            plain_initial = initial

            def initial():
                return adapt_params(
                    session.abstract, abstract, reward_model.add_head, plain_initial(), seed, False
                )

        run = SupervisedRun(
            evaluate=evaluate,
            objective=objective,
            step_flops=functools.partial(
                train_flops,
                session.model_config,
                trainable=tuple(stage.trainable),
                adapters=stage.lora.rank > 0,
            ),
            **common,
        )
        return run_stage(run, abstract, initial, session.workdir, writer)


def loaded_source(config: ConfigDict, stage: ConfigDict, light: SampleSource) -> SampleSource:
    """The split of a light source as a stage reads it: a compressor's without its media."""
    if stage.objective == "compressor":
        return light
    return SampleSource(config.data.folder, light.split)


def collect_pairs(
    session: Session,
    sources: dict[str, SampleSource],
    name: str,
    loader: Loader,
    initial,
    seed: int,
) -> dict[str, dict]:
    """split -> the pairs of a preference stage (`reward_model.read_pairs`), sampled once and kept
    in `workdir/preferences_NAME.jsonl`."""
    config, stage = session.config, session.config.stage[name]
    path = session.workdir / f"preferences_{name}.jsonl"
    if not path.is_file():
        options = build.policy_options(config, stage, session.tokenizer)
        compute = build.dtypes(config).compute
        program = policy.Program(session.abstract, stage, options, None, compute, seed, 1)
        params, rows = initial(), {}
        task = dataclasses.replace(loader.task, label_dropout=0.0)
        for split, light in sources.items():
            own = dataclasses.replace(
                loader, source=SampleSource(config.data.folder, split), task=task
            )
            batches = split_batches(light, task, session.prompter, stage, stage.batch_size)
            with_samples = [
                (planned, real, [light[item.record] for item in planned.items])
                for planned, real in batches
            ]
            log.info("%s: sampling answers to %d batches of %s", name, len(batches), split)
            rows[split] = reward_model.sample_pairs(
                program,
                params,
                with_samples,
                own,
                stage.rl.group,
                session.tokenizer.decode,
                config.data.label_space,
            )
        hosts.on_first(functools.partial(reward_model.write_pairs, path, rows))
    pairs = {}
    for split, light in sources.items():
        samples = [light[i] for i in range(len(light))]
        pairs[split] = reward_model.read_pairs(path, split, samples, session.prompter)
        require(len(pairs[split]) > 0, f"{path}: no pair of the {split} split")
    return pairs


def make_pair_evaluation(
    session: Session, light: SampleSource, name: str, abstract: Abstract, pairs: dict, length: int
):
    """`params -> metrics` on the pairs of the val split."""
    config, stage = session.config, session.config.stage[name]
    task = dataclasses.replace(build.stage_task(config, stage), label_dropout=0.0)
    loader = Loader(
        SampleSource(config.data.folder, "val"), task, session.prompter, build.buckets(config)
    )
    loader = reward_model.PairLoader(loader, pairs, length)
    rows = stage.batch_size // stage.accumulation
    batches = split_batches(light, task, session.prompter, stage, rows, stage.eval_examples, pairs)
    eval_step = make_eval_step(abstract, reward_model.PAIRS)

    def evaluate(params) -> dict[str, float]:
        sums: dict[str, float] = {}
        for planned, real in batches:
            _, responses = loader(planned)
            responses.mask[real:] = False
            got = jax.device_get(eval_step(params, put_whole_batch(responses, abstract.mesh)))
            sums = {k: sums.get(k, 0.0) + float(v) for k, v in got.items()}
        loss = sums["loss"] / sums["weight"]
        return {
            "loss": loss,
            "pair_accuracy": sums["right"] / sums["weight"],
            "margin": sums["margin"] / sums["weight"],
            "score": -loss,
        }

    return evaluate


def check_batch_size(stage: ConfigDict, name: str, ways: int) -> None:
    """A batch must be divisible over the devices in everything it is split into."""
    splits = {"accumulation": stage.accumulation}
    if stage.objective in ("grpo", "ppo"):
        splits["accumulation x rl.minibatches"] = stage.accumulation * stage.rl.minibatches
        splits["rl.chunks"] = stage.rl.chunks
    for what, parts in splits.items():
        require(
            stage.batch_size % (ways * parts) == 0,
            f"stage.{name}.batch_size: {stage.batch_size} is not a multiple of {ways * parts} "
            f"({ways} data x fsdp devices, {what} {parts})",
        )


def train_policy(
    session: Session,
    sources: dict[str, SampleSource],
    common: dict,
    task: Task,
    initial,
    writer: MetricsWriter,
) -> int:
    """A stage with objective grpo or ppo."""
    config, stage = session.config, common["stage"]
    source, light = common["loader"].source, sources["train"]
    replies = [s.response for s in light if s.response]
    val_task = dataclasses.replace(task, label_dropout=0.0)
    val_source = SampleSource(config.data.folder, "val")
    val_loader = Loader(val_source, val_task, session.prompter, build.buckets(config))
    rows = stage.batch_size
    batches = split_batches(
        sources["val"], val_task, session.prompter, stage, rows, stage.eval_examples
    )
    if jax.process_count() > 1:
        val_loader = dataclasses.replace(
            val_loader, host=common["loader"].host, hosts=common["loader"].hosts
        )
    learned = None
    if "learned" in reward_weights(config.reward):
        abstract = reward_model.with_head(session.abstract)
        params, _ = session.stage_params(
            build.reward_stage(config, common["name"]), abstract=abstract
        )
        learned = reward_model.make_learned(abstract, cast(params, common["frozen_dtype"]))
    pool = make_pool(config.reward, session.workdir, replies)
    run = PolicyRun(
        **common,
        options=build.policy_options(config, stage, session.tokenizer),
        samples=lambda planned: [source[item.record] for item in planned.items],
        val=batches,
        val_samples=lambda planned: [val_source[item.record] for item in planned.items],
        val_loader=val_loader,
        scoring=Scoring(
            decode=session.tokenizer.decode,
            label_space=config.data.label_space,
            pool=pool,
            weights=reward_weights(config.reward),
            learned=learned,
            reward=config.reward,
            rl=stage.rl,
        ),
    )
    try:
        return run_policy_stage(run, session.abstract, initial, session.workdir, writer)
    finally:
        pool.close()


def split_batches(
    light: SampleSource,
    task: Task,
    prompter: Prompter,
    stage: ConfigDict,
    rows: int,
    limit: int = 0,
    ids: Collection[str] | None = None,
) -> list[tuple[PlannedBatch, int]]:
    """Batches of a whole split (see `evaluation_batches`), of the examples `ids` alone where given;
    at most `limit` rows, evenly spread so that a limited one still sees the whole split."""
    items, _ = list_items(light, task, prompter)
    items = [item for item in items if ids is None or item.id in ids]
    require(len(items) > 0, "a split has no usable example")
    limit = limit or len(items)
    items = [items[i * len(items) // limit] for i in range(min(limit, len(items)))]
    modality = "text" if stage.text_only_prob == 1.0 else "av"
    return evaluation_batches(items, rows, modality)


def make_evaluation(session: Session, light: SampleSource, name: str, prompter: Prompter):
    """`params -> metrics` on the val split: token loss, label accuracies where asked for, and what
    a compressor's greedy reconstructions hold."""
    config, stage = session.config, session.config.stage[name]
    task = dataclasses.replace(build.stage_task(config, stage), label_dropout=0.0)
    modality = "text" if stage.text_only_prob == 1.0 else "av"
    source = loaded_source(config, stage, light)
    loader = Loader(source, task, prompter, build.buckets(config))
    rows = stage.batch_size // stage.accumulation
    batches = split_batches(light, task, prompter, stage, rows, stage.eval_examples)
    eval_step = make_eval_step(session.abstract)
    predictor = session.predictor() if stage.select_by == "labels" else None
    regime = config.data.history_labels
    written = []
    if stage.objective == "compressor" and stage.eval_reconstructions:
        limit = stage.eval_reconstructions
        written = split_batches(light, task, prompter, stage, rows, limit)
        reconstructor = Reconstructor(session.abstract, session.tokenizer)

    def evaluate(params) -> dict[str, float]:
        sums: dict[str, float] = {}
        for planned, real in batches:
            _, batch = loader(planned)
            batch.loss_weights[real:] = 0.0
            got = jax.device_get(eval_step(params, put_whole_batch(batch, session.abstract.mesh)))
            sums = {k: sums.get(k, 0.0) + float(v) for k, v in got.items()}
        loss = sums["loss"] / max(sums["weight"], 1e-6)
        metrics = {
            "loss": loss,
            "token_accuracy": sums["correct"] / max(sums["targets"], 1),
            "score": -loss,
        }
        if predictor is not None:
            samples = [
                source[item.record] for planned, real in batches for item in planned.items[:real]
            ]
            found = predictor.predict(
                params, samples, modality, regime, respond=False, predictions=task.predictions
            )
            accuracy = label_accuracy(found, samples)
            metrics.update({f"{k}_accuracy": v for k, v in accuracy.items()})
            metrics["score"] = sum(accuracy.values()) / len(accuracy)
        texts = []
        for planned, real in written:
            texts += reconstructor.texts(params, loader(planned)[1], real)
        if texts:
            found = reconstruction_metrics(texts)
            metrics.update({f"greedy_{k}": v for k, v in found.items()})
        return metrics

    return evaluate
