"""train: run the stages of a config, with checkpoints, resume and selection on the val split."""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import functools
import json
import logging
import pathlib
import shutil

import jax
from ml_collections import ConfigDict
from tqdm.contrib.logging import logging_redirect_tqdm

from mm_jax import build
from mm_jax.config import (
    ConfigError,
    flatten,
    load_config,
    read_config,
    require,
    save_config,
)
from mm_jax.data.datasets.common import SampleSource
from mm_jax.data.pipeline import (
    Item,
    Loader,
    PlannedBatch,
    Task,
    TrainPlan,
    WorkerError,
    list_items,
    plan_batch,
)
from mm_jax.data.prompts import Prompter
from mm_jax.evaluation.predict import Predictor, label_accuracy
from mm_jax.rewards.build import make_pool, reward_weights
from mm_jax.rewards.pool import RewardFailureError
from mm_jax.rl.loop import PolicyRun, run_policy_stage
from mm_jax.rl.rollout import Scoring
from mm_jax.training import hosts
from mm_jax.training.checkpoint import CheckpointError, Checkpoints
from mm_jax.training.flops import train_flops
from mm_jax.training.loop import NonFiniteError, Preempted, SupervisedRun, run_stage
from mm_jax.training.metrics_writer import MetricsWriter
from mm_jax.training.sharding import batch_parallelism, batch_share, make_mesh, put_whole_batch
from mm_jax.training.state import Abstract, abstract_model, init_params, make_eval_step

log = logging.getLogger(__name__)

# Fields that a resumed run may change: where and how it runs, not what it computes. (Another mesh
# or accumulation adds in another order: results then agree up to round-off and dropout masks.)
MAY_CHANGE = (
    "mesh.*",
    "stage.*.accumulation",
    "stage.*.checkpoint_every",
    "model.remat",
    "data.reader_threads",
    "data.reader_processes",
    "data.prefetch",
    "log_every",
    "profile_steps",
    "keep_checkpoints",
    "predict.*",
    "reward.judge.base_url",
    "reward.second_judge.base_url",
    "reward.similarity_url",
)
EXIT_PREEMPTED = 75  # of a run that SIGTERM stopped after saving (EX_TEMPFAIL: start it again)
USER_ERRORS = (CheckpointError, NonFiniteError, RewardFailureError, WorkerError)
STAGES_FILE = "stages.json"
MEDIA_FILE = "media_spec.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="configs/NAME.py[:arg]")
    parser.add_argument("--workdir", required=True, type=pathlib.Path, help="folder of the run")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="go on with the run in workdir")
    existing.add_argument("--overwrite", action="store_true", help="delete the run in workdir")
    hosts.add_arguments(parser)


def main(args: argparse.Namespace, overrides: list[str]) -> None:
    config = load_config(args.config, overrides)
    hosts.initialize(args)
    try:
        train(config, args.workdir, resume=args.resume, overwrite=args.overwrite)
    except Preempted as stopped:
        log.warning("%s; go on with --resume (exit status %d)", stopped, EXIT_PREEMPTED)
        raise SystemExit(EXIT_PREEMPTED) from None


def open_workdir(config: ConfigDict, workdir: pathlib.Path, resume: bool, overwrite: bool) -> None:
    """Creates or takes up a run folder. A folder that holds anything else is never deleted."""
    known = (workdir / "config.json").is_file()
    if workdir.exists() and any(workdir.iterdir()):
        if overwrite:
            require(known, f"--overwrite: {workdir} is no run folder; not deleted")
            shutil.rmtree(workdir)
        elif not resume:
            raise ConfigError(f"--workdir: {workdir} is not empty; pass --resume or --overwrite")
    if resume and known:
        before = read_config(workdir / "config.json")
        old, new = flatten(before), flatten(config)
        changed = sorted(
            k for k in {**old, **new} if json.dumps(old.get(k)) != json.dumps(new.get(k))
        )
        free = MAY_CHANGE + added_stages(before, config)
        fixed = [k for k in changed if not any(fnmatch.fnmatch(k, p) for p in free)]
        require(
            not fixed,
            f"--resume: the config differs from {workdir}/config.json in {fixed}; only "
            f"{', '.join(MAY_CHANGE)} may change, and stages may be added at the end",
        )
        for key in changed:
            log.info("--resume: %s changed from %s to %s", key, old.get(key), new.get(key))
    workdir.mkdir(parents=True, exist_ok=True)
    save_config(config, workdir / "config.json")


def added_stages(before: ConfigDict, config: ConfigDict) -> tuple[str, ...]:
    """Patterns of the fields that stages added behind those of `before` bring with them."""
    old, new = before.stages, config.stages
    if new[: len(old)] != old:
        return ()
    patterns = [f"stage.{name}.*" for name in new[len(old) :]]
    if not any(before.stage[name].objective in ("grpo", "ppo") for name in old):
        patterns.append("reward.*")  # nothing has used it
    return ("stages", *patterns) if len(new) > len(old) else ()


@dataclasses.dataclass
class Session:
    """Everything a command needs to work with the model of a run."""

    config: ConfigDict
    workdir: pathlib.Path
    tokenizer: object
    model_config: object
    prompter: object
    abstract: Abstract
    create: object

    @classmethod
    def open(cls, config: ConfigDict, workdir: pathlib.Path) -> Session:
        build.validate(config)
        tok = build.run_tokenizer(config, workdir)
        model_config = build.model_config(config, tok)
        create = build.create_model(config, model_config)
        try:
            mesh = make_mesh(config.mesh.to_dict())
        except ValueError as error:
            raise ConfigError(str(error)) from error
        return cls(
            config,
            workdir,
            tok,
            model_config,
            build.prompter(config, model_config, tok),
            abstract_model(create, mesh),
            create,
        )

    def predictor(self) -> Predictor:
        return Predictor(
            self.abstract,
            self.prompter,
            build.buckets(self.config),
            self.config.predict,
            self.config.seed,
        )

    def stage_params(self, name: str, step: int | None = None):
        """Parameters of a stage's checkpoint (the best by default)."""
        checkpoints = Checkpoints(self.workdir / "checkpoints" / name)
        try:
            step = checkpoints.best_step() if step is None else step
            params = checkpoints.restore_params(step, self.abstract.params, self.abstract.shardings)
        finally:
            checkpoints.close()
        return params, step


def train(
    config: ConfigDict, workdir: pathlib.Path, resume: bool = False, overwrite: bool = False
) -> None:
    """Runs every stage of `config` that `workdir` has not finished."""
    build.validate(config)
    spec = build.data_spec(config.data.folder)
    sources = {s: SampleSource(config.data.folder, s, light=True) for s in ("train", "val")}

    def prepare_workdir() -> None:
        open_workdir(config, workdir, resume, overwrite)
        (workdir / MEDIA_FILE).write_text(json.dumps(dataclasses.asdict(spec)))
        build.run_tokenizer(config, workdir)

    hosts.on_first(prepare_workdir)
    session = Session.open(config, workdir)
    build.check_media(config.data.folder, session.model_config)
    log_model(session)
    finished = read_stages(workdir)
    writer = MetricsWriter(workdir)
    try:
        for name in config.stages:
            if name in finished:
                log.info("%s: finished before, best step %d", name, finished[name])
            else:
                finished[name] = train_stage(session, sources, name, writer)
                hosts.on_first(functools.partial(write_stages, workdir, finished))
    finally:
        writer.close()


def read_stages(workdir: pathlib.Path) -> dict[str, int]:
    """Finished stage -> its best step."""
    path = workdir / STAGES_FILE
    return json.loads(path.read_text()) if path.is_file() else {}


def write_stages(workdir: pathlib.Path, finished: dict[str, int]) -> None:
    partial = workdir / (STAGES_FILE + ".partial")
    partial.write_text(json.dumps(finished, indent=1))
    partial.rename(workdir / STAGES_FILE)


def log_model(session: Session) -> None:
    counts: dict[str, int] = {}
    for path, variable in session.abstract.params.flat_state():
        counts[path[0]] = counts.get(path[0], 0) + variable.size
    shown = ", ".join(f"{k} {v:,}" for k, v in counts.items())
    log.info("parameters: %s; vocabulary %d", shown, len(session.tokenizer))


def train_stage(
    session: Session, sources: dict[str, SampleSource], name: str, writer: MetricsWriter
) -> int:
    config = session.config
    stage = config.stage[name]
    policy = stage.objective in ("grpo", "ppo")
    check_batch_size(stage, name, batch_parallelism(session.abstract.mesh))
    task = build.stage_task(config, stage)
    prompter = build.stage_prompter(session.prompter, stage, sources["train"])
    items, refused = list_items(sources["train"], task, prompter)
    if refused:
        log.warning("%s: train examples left out: %s", name, dict(refused))
    require(
        len(items) >= stage.batch_size,
        f"stage.{name}.batch_size: {stage.batch_size} is more than the {len(items)} usable train "
        f"examples (left out: {dict(refused)})",
    )
    seed = config.seed * 1000 + config.stages.index(name)
    steps = stage.steps or max(1, round(stage.epochs * (len(items) // stage.batch_size)))
    buckets = build.buckets(config)
    plan = TrainPlan(items, task, stage.batch_size, seed, steps, buckets)
    log.info("%s: %d examples, %d steps of %d", name, len(items), steps, stage.batch_size)
    share, shares = batch_share(session.abstract.mesh)
    source = SampleSource(config.data.folder, "train")
    loader = Loader(source, task, prompter, buckets, host=share, hosts=shares)
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
    )

    def initial():
        before = build.stage_before(config, name)
        if not before:
            return init_params(session.create, session.abstract, config.seed)
        return session.stage_params(before)[0]

    with logging_redirect_tqdm():  # log lines stand above the progress bar
        if policy:
            return train_policy(session, sources, common, task, initial, writer)
        run = SupervisedRun(
            evaluate=make_evaluation(session, sources["val"], name, prompter),
            step_flops=functools.partial(
                train_flops,
                session.model_config,
                trainable=tuple(stage.trainable),
                adapters=stage.lora.rank > 0,
            ),
            profile=tuple(config.profile_steps),
            **common,
        )
        return run_stage(run, session.abstract, initial, session.workdir, writer)


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
    batches = val_batches(sources["val"], val_task, session.prompter, stage, rows)
    if jax.process_count() > 1:
        val_loader = dataclasses.replace(
            val_loader, host=common["loader"].host, hosts=common["loader"].hosts
        )
    pool = make_pool(config.reward, session.workdir, replies)
    run = PolicyRun(
        **common,
        options=build.policy_options(config, stage, session.tokenizer),
        samples=lambda planned: [source[item.record] for item in planned.items],
        val=[
            (planned, real, [val_source[item.record] for item in planned.items])
            for planned, real in batches
        ],
        val_loader=val_loader,
        scoring=Scoring(
            decode=session.tokenizer.decode,
            label_space=config.data.label_space,
            pool=pool,
            weights=reward_weights(config.reward),
            reward=config.reward,
            rl=stage.rl,
        ),
    )
    try:
        return run_policy_stage(run, session.abstract, initial, session.workdir, writer)
    finally:
        pool.close()


def val_batches(
    light: SampleSource, task: Task, prompter: Prompter, stage: ConfigDict, rows: int
) -> list[tuple[PlannedBatch, int]]:
    """Batches of the val split for an evaluation (see `evaluation_batches`), at most
    `stage.eval_examples` rows, evenly spread so that a limited one still sees the whole split."""
    items, _ = list_items(light, task, prompter)
    require(len(items) > 0, "the val split has no usable example")
    limit = stage.eval_examples or len(items)
    items = [items[i * len(items) // limit] for i in range(min(limit, len(items)))]
    modality = "text" if stage.text_only_prob == 1.0 else "av"
    return evaluation_batches(items, rows, modality)


def make_evaluation(session: Session, light: SampleSource, name: str, prompter: Prompter):
    """`params -> metrics` on the val split: token loss, and label accuracies where asked for."""
    config, stage = session.config, session.config.stage[name]
    task = dataclasses.replace(build.stage_task(config, stage), label_dropout=0.0)
    modality = "text" if stage.text_only_prob == 1.0 else "av"
    source = SampleSource(config.data.folder, "val")
    loader = Loader(source, task, prompter, build.buckets(config))
    batches = val_batches(light, task, prompter, stage, stage.batch_size // stage.accumulation)
    eval_step = make_eval_step(session.abstract)
    predictor = session.predictor() if stage.select_by == "labels" else None
    regime = config.data.history_labels

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
            accuracy = label_accuracy(found)
            metrics.update({f"{k}_accuracy": v for k, v in accuracy.items()})
            metrics["score"] = sum(accuracy.values()) / len(accuracy)
        return metrics

    return evaluate


def evaluation_batches(
    items: list[Item], rows: int, modality: str
) -> list[tuple[PlannedBatch, int]]:
    """Batches sorted by length and the number of real rows; the last is filled up with repeats."""
    items = sorted(items, key=lambda i: sum(i.lengths))
    batches = []
    for start in range(0, len(items), rows):
        part = items[start : start + rows]
        full = part + [part[0]] * (rows - len(part))
        batches.append((plan_batch(full, [modality] * rows, [False] * rows), len(part)))
    return batches
