"""Tests the train command: exact resume, frozen parts, selection, guards, and run folders."""

import importlib.machinery
import json
import shutil
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mm_jax.config.errors import ConfigError
from mm_jax.config.load import load_config, read_config, resolve, save_config
from mm_jax.data.batch import Shape
from mm_jax.data.datasets.common import SampleSource
from mm_jax.data.pipeline import Item, evaluation_batches
from mm_jax.data.shapes import Shapes
from mm_jax.models.abstract import init_params
from mm_jax.run import build
from mm_jax.run.folder import open_workdir
from mm_jax.training import supervised
from mm_jax.training.checkpoint import Checkpoints
from mm_jax.training.optimizer import make_optimizer
from mm_jax.training.runner import NonFiniteError, with_media
from mm_jax.training.state import TrainState, merged_params
from tests.conftest import ROOT
from tests.support.runs import leaves, open_run, train
from tools import compressor_report


class StoppedError(Exception):
    pass


def stop_after(monkeypatch, stage, step):
    """Makes the run die right after a checkpoint of `stage` was written."""
    original = Checkpoints.save

    def save(self, state, params, data, meta, metrics):
        original(self, state, params, data, meta, metrics)
        if (meta["stage"], int(state.step)) == (stage, step):
            self.wait()
            raise StoppedError

    monkeypatch.setattr(Checkpoints, "save", save)


@pytest.mark.parametrize("stage", ["utterances", "sft"])
def test_resumed_training_is_bitwise_the_same(config, tmp_path, monkeypatch, stage):
    config.stages = (stage,)
    config.stage[stage].update(steps=4, eval_every=2, ema_decay=0.9)
    config.model.parts = ("compressor",) if stage == "utterances" else ("audio",)
    config.model.llm.residual_dropout = 0.1  # dropout keys must resume too
    train(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, stage, 2)
        with pytest.raises(StoppedError):
            train(config, tmp_path / "parts")
    train(config, tmp_path / "parts", resume=True)
    whole, parts = (leaves(config, tmp_path / n, stage) for n in ("whole", "parts"))
    for path in whole:
        np.testing.assert_array_equal(whole[path], parts[path])
    logs = [(tmp_path / n / "metrics.jsonl").read_text().splitlines() for n in ("whole", "parts")]
    losses = [[json.loads(x).get("loss") for x in log] for log in logs]
    assert losses[0] == losses[1]
    assert len([x for x in losses[0] if x is not None]) == 4


def test_without_warm_up_the_first_step_has_the_whole_rate():
    stage = load_config(str(ROOT / "configs" / "base.py")).stage.sft
    stage.learning_rate = 0.5
    for share, rates in ((0.0, (0.5, 0.5)), (0.1, (0.0, 0.5)), (0.001, (0.0, 0.5))):
        stage.warmup = share
        _, schedule = make_optimizer(stage, 20)
        peak = max(1, round(share * 20)) if share else 0
        assert (float(schedule(0)), float(schedule(peak))) == rates


def test_inference_sees_the_moving_average_of_the_weights():
    stage = load_config(str(ROOT / "configs" / "base.py")).stage.sft
    params = nnx.State({"language_model": {"w": {"kernel": nnx.Param(jnp.array([4.0, -2.0]))}}})

    def final(ema_decay):
        with stage.unlocked():
            stage.update(learning_rate=0.5, ema_decay=ema_decay)
        tx, _ = make_optimizer(stage, 20)
        opt_state, trainable, seen = tx.init(params), params, []
        for _ in range(20):
            updates, opt_state = tx.update(
                trainable, opt_state, trainable, norm=optax.global_norm(trainable)
            )
            trainable = optax.apply_updates(trainable, updates)
            seen.append(np.asarray(jax.tree.leaves(trainable)[0]))
        state = TrainState(trainable, opt_state, jnp.int32(20), nnx.State({}))
        return seen, np.asarray(jax.tree.leaves(merged_params(state))[0])

    seen, plain = final(0.0)
    np.testing.assert_array_equal(plain, seen[-1])
    seen_again, averaged = final(0.5)
    np.testing.assert_array_equal(seen, seen_again)
    expected = np.array([4.0, -2.0])
    for i, values in enumerate(seen):
        d = min(0.5, (1 + i) / (10 + i))
        expected = d * expected + (1 - d) * values
    np.testing.assert_allclose(averaged, expected, rtol=1e-6)
    assert np.abs(averaged - plain).max() > 1e-3


def test_stages_in_order_with_frozen_parts(config, tmp_path, capsys):
    """Checks that pre-training changes only the compressor, and SFT starts from its parameters."""
    config.model.parts = ("audio", "compressor")  # vision takes half of the compiling
    config.stage.utterances.update(trainable=("mamba_compressor",), eval_reconstructions=8)
    config.stage.sft.update(trainable=("language_model",), steps=2)
    workdir = tmp_path / "run"
    train(config, workdir)
    first = leaves(config, workdir, "utterances")
    last = leaves(config, workdir, "sft")
    session = open_run(config, workdir)
    start = init_params(session.create, session.abstract, config.seed)
    start = {path: np.asarray(v.get_value()) for path, v in start.flat_state()}

    def changed(a, b):
        return {p[0] for p in a if not np.array_equal(a[p], b[p])}

    assert changed(start, first) == {"mamba_compressor"}
    assert changed(first, last) == {"language_model"}
    assert json.loads((workdir / "stages.json").read_text()) == {"utterances": 2, "sft": 2}
    assert read_config(workdir / "config.json") == resolve(config)
    train(config, workdir, resume=True)  # nothing left to do
    assert list((workdir / "tensorboard").iterdir())
    log = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
    (val,) = [r for r in log if r["stage"] == "utterances" and "val_loss" in r]
    for name in ("rouge_l", "emotions", "strategies"):  # after two steps nothing is recalled yet
        assert 0 <= val[f"val_greedy_{name}"] < 0.5
    assert not any("val_greedy_rouge_l" in r for r in log if r["stage"] == "sft")
    written = tmp_path / "report.json"
    arguments = ["--checkpoint", str(workdir), "--limit", "9", "--json", str(written)]
    assert compressor_report.main(arguments) == 0
    report = json.loads(written.read_text())
    assert (report["stage"], report["utterances"], report["units"]) == ("utterances", 1, 9)
    assert len(report["token_accuracy"]) == 4
    assert all(0 < share < 1 for share in report["token_accuracy"].values())
    assert list(report["caption_accuracy"]) == list(report["token_accuracy"])[:3]
    assert set(report["greedy"]) == {"rouge_l", "emotions", "strategies"}
    assert "another's memory" in capsys.readouterr().out
    config.data.max_length = 20  # nothing fits
    save_config(resolve(config), workdir / "config.json")
    assert compressor_report.main(arguments) == 2
    assert "expected at least 2 units of val that fit, got 0" in capsys.readouterr().err


def test_a_compressor_stage_decodes_no_media(config):
    light = SampleSource(config.data.folder, "val", light=True)
    resolved = resolve(config)
    assert with_media(resolved, "utterances", light) is light
    whole = with_media(resolved, "sft", light)
    assert (whole.split, whole.light) == ("val", False)


def test_evaluation_fills_its_last_batch_with_other_items():
    """Checks it because every row needs another's memory to be compared with."""
    items = [Item(str(n), n, 0, Shape(n, 0, 0, 0, 0)) for n in (5, 3, 1, 4, 2)]
    shapes = Shapes((Shape(8, 0, 0, 0, 0),))
    batches = evaluation_batches(items, 4, "text", shapes)
    assert [[item.record for item in planned.items] for planned, _ in batches] == [
        [1, 2, 3, 4],
        [5, 1, 2, 3],
    ]
    assert [real for _, real in batches] == [4, 1]
    ((planned, real),) = evaluation_batches(items[:1], 3, "text", shapes)
    assert (len(planned.items), real) == (3, 1)


def test_run_folders_are_never_overwritten_by_accident(config, tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="--resume or --overwrite"):
        train(config, workdir)
    with pytest.raises(ConfigError, match="is not a run folder"):
        train(config, workdir, overwrite=True)
    assert (workdir / "thesis.txt").exists()
    shutil.rmtree(workdir)
    open_workdir(resolve(config), workdir, resume=False, overwrite=False)
    config.seed = 5
    with pytest.raises(ConfigError, match=r"differs from .* in \['seed'\]"):
        open_workdir(resolve(config), workdir, resume=True, overwrite=False)


class FakeWandb(types.ModuleType):
    """Stands in for the package: keeps what it is told."""

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None, origin="fake")
        self.errors = types.SimpleNamespace(Error=OSError)
        self.started, self.logged, self.metrics, self.finished = [], [], {}, 0

    def init(self, **options):
        self.started.append(options)
        return self

    def define_metric(self, name, step_metric=None, hidden=None):
        if "*" in name[:-1]:
            raise self.errors.Error(f"glob suffixes only: {name}")
        self.metrics[name] = step_metric

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.finished += 1


def test_metrics_go_to_wandb_on_request(config, tmp_path, monkeypatch):
    config.stages = ("utterances",)
    config.model.parts = ("compressor",)
    config.stage.utterances.update(steps=2)
    config.log_every = 1
    workdir = tmp_path / "run"
    with pytest.raises(ConfigError, match="--wandb=study: needs `pip install wandb`"):
        train(config, workdir, wandb_project="study")
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    train(config, workdir, wandb_project="study")
    train(config, workdir, resume=True, wandb_project="study")
    first, second = fake.started
    assert (first["project"], first["resume"]) == ("study", "allow")
    assert first["id"] == second["id"]
    assert first["config"]["stages"] == ["utterances"]
    assert fake.metrics["utterances/*"] == "utterances/step"
    steps = [r["utterances/step"] for r in fake.logged if "utterances/loss" in r]
    assert steps == [1, 2]
    assert fake.finished == 2


def test_overwriting_a_linked_folder_empties_what_the_link_leads_to(config, tmp_path):
    there, link = tmp_path / "big disk", tmp_path / "run"
    (there / "checkpoints").mkdir(parents=True)
    link.symlink_to(there)
    (there / "config.json").write_text("{}")
    (there / "others").symlink_to(tmp_path)
    open_workdir(resolve(config), link, resume=False, overwrite=True)
    assert link.is_symlink()
    assert [p.name for p in there.iterdir()] == ["config.json"]
    assert tmp_path.is_dir()


def test_a_label_space_that_is_not_the_data_set_s_is_refused(config, tmp_path):
    config.data.label_space = "dfew"
    config.stages = ("sft",)
    with pytest.raises(ConfigError) as error:
        train(config, tmp_path / "run")
    assert "data.label_space=dfew: the data set at " in str(error.value)
    assert "has other labels or tasks: mesc with client_emotion, " in str(error.value)
    assert not (tmp_path / "run").exists()


def test_non_finite_loss_stops_and_names_the_batch(config, tmp_path, monkeypatch):
    config.stages = ("utterances",)
    config.stage.utterances.update(steps=4)
    config.log_every = 4
    original = supervised.make_train_step

    def poisoned(*args):
        step = original(*args)

        def run(*state_and_batch):
            new, metrics = step(*state_and_batch)
            bad = jax.numpy.where(new[2] == 3, jax.numpy.nan, metrics["loss"])
            return new, {**metrics, "loss": bad}

        run.lower = step.lower
        return run

    monkeypatch.setattr(supervised, "make_train_step", poisoned)
    with pytest.raises(NonFiniteError, match=r"first at step 2 \(window 0\.\.3\)"):
        train(config, tmp_path / "run")
    (entry,) = json.loads((tmp_path / "run" / "nonfinite_batches.json").read_text())
    assert entry["step"] == 2
    assert len(entry["ids"]) == 8
    assert not Checkpoints(tmp_path / "run" / "checkpoints" / "utterances").steps()


def test_best_checkpoint_is_kept_and_found(config, tmp_path, monkeypatch):
    config.stages = ("utterances",)
    config.stage.utterances.update(steps=3, eval_every=1)
    scores = iter([0.1, 0.9, 0.5])
    fake = supervised.Evaluation(lambda params: {"score": next(scores), "loss": 1.0})
    monkeypatch.setattr(supervised, "make_evaluation", lambda *args: fake)
    train(config, tmp_path / "run")
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints" / "utterances")
    assert checkpoints.best_step() == 2
    assert checkpoints.steps() == [2, 3]  # the best and the newest
    checkpoints.close()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("stage.sft.trainable", ("lm",), r"stage\.sft\.trainable: expected one of"),
        ("stage.sft.batch_size", 7, r"batch_size: 7 is not a multiple of 8"),
        ("stage.sft.batch_size", 4000, r"4000 is more than the \d+ usable train examples"),
        ("stage.utterances.select_by", "labels", "predict no labels"),
        ("data.folder", "nowhere", "no built data set at nowhere"),
        ("model.vision.image_size", 48, "was built with image_size 32"),
        ("model.llm.num_attention_heads", 5, "not a multiple of num_attention_heads 5"),
        ("mesh.data", 3, "3 places for 8 devices"),
        ("data.history_labels", "predicted", "needs data.history_predictions"),
        ("model.parts", ("vision", "audio"), "needs 'compressor' in model.parts"),
        ("stage.sft.ema_decay", 1.0, r"ema_decay: expected 0 <= value < 1, got 1\.0"),
        ("data.previous_labels", -1, r"data\.previous_labels: expected at least 0, got -1"),
        ("stage.sft.warmup", 2.0, r"warmup: expected 0 to 1, got 2\.0"),
        ("stage.sft.b2", 1.0, r"b2: expected 0 <= value < 1, got 1\.0"),
        ("stage.sft.clip_norm", -1.0, r"clip_norm: expected above 0, got -1\.0"),
        ("data.shapes", 0, r"data\.shapes: expected at least 1, got 0"),
        ("data.max_length", -5, r"data\.max_length: expected at least 0, got -5"),
        ("predict.batch_size", 0, r"predict\.batch_size: expected at least 1, got 0"),
        ("predict.top_p", 0.0, r"predict\.top_p: expected 0 < value <= 1, got 0\.0"),
        ("stage.utterances.label_weight", 0.0, r"label_weight: expected above 0, got 0\.0"),
        (
            "model.compressor.state_size",
            0,
            r"model\.compressor\.state_size: expected at least 1, got 0",
        ),
    ],
)
def test_impossible_configs_are_refused_before_training(config, tmp_path, key, value, message):
    *parents, last = key.split(".")
    node = config
    for name in parents:
        node = node[name]
    node[last] = value
    if key.startswith("stage.sft"):
        config.stages = ("sft",)
    with pytest.raises(ConfigError, match=message):
        train(config, tmp_path / "run")


def test_a_damaged_file_of_predictions_names_its_line(tmp_path):
    path = tmp_path / "predictions.jsonl"
    path.write_text('{"id": "a", "predicted": {"strategy": "others"}}\n{"id": "b"\n')
    with pytest.raises(ConfigError, match=r"history_predictions: .*jsonl line 2: expected one of"):
        build.read_label_predictions(str(path))


def test_a_config_of_another_version_is_refused(config, tmp_path):
    path = tmp_path / "config.json"
    save_config(resolve(config), path)
    values = json.loads(path.read_text())
    values["reward"]["learned"] = values["reward"].pop("reward_model")  # as version 0.1 named it
    del values["reward"]["judge"]["history_turns"]  # and what it did not have
    path.write_text(json.dumps(values))
    assert read_config(path) == resolve(config)
    del values["stage"]["sft"]["ema_decay"]
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"ema_decay.*another version of mm_jax"):
        read_config(path)
    values["stage"]["sft"].update(ema_decay=0.0, emma=1)
    path.write_text(json.dumps(values))
    message = r"stage\.sft\.emma: no such field; did you mean .*another version of mm_jax"
    with pytest.raises(ConfigError, match=message):
        read_config(path)


def test_nf4_needs_whole_blocks(config):
    config.stages = ("sft",)
    config.stage.sft.lora.update(rank=4, base="nf4")
    with pytest.raises(ConfigError, match=r"multiples of 64, got 32 and 48"):
        resolve(config)
    config.model.llm.update(hidden_size=64, intermediate_size=192)
    resolve(config)


def test_the_compressor_can_have_a_learning_rate_of_its_own():
    stage = load_config(str(ROOT / "configs" / "base.py")).stage.sft
    leaf = lambda: {"w": {"kernel": nnx.Param(jnp.array([4.0, -2.0]))}}  # noqa: E731
    params = nnx.State({"language_model": leaf(), "mamba_compressor": leaf()})

    def steps(compressor):
        stage.update(learning_rate=0.01, compressor_learning_rate=compressor)
        tx, _ = make_optimizer(stage, 10)
        opt_state, trainable = tx.init(params), params
        for _ in range(3):
            updates, opt_state = tx.update(
                params, opt_state, trainable, norm=optax.global_norm(params)
            )
            trainable = optax.apply_updates(trainable, updates)
        return [np.asarray(v) - np.array([4.0, -2.0]) for v in jax.tree.leaves(trainable)]

    model, compressor = steps(0.0)
    np.testing.assert_array_equal(model, compressor)
    own_model, own_compressor = steps(0.002)
    np.testing.assert_array_equal(own_model, model)
    np.testing.assert_allclose(own_compressor, model / 5, rtol=1e-4)
