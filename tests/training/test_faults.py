"""Tests runs that are stopped, killed, out of disk space, or resumed with other settings."""

import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time

import pytest

from mm_jax.__main__ import main as command_line
from mm_jax.commands.train import EXIT_PREEMPTED
from mm_jax.config.errors import ConfigError
from mm_jax.config.load import read_config, resolve
from mm_jax.run.folder import open_workdir
from mm_jax.run.lock import RunLock
from mm_jax.training import supervised
from mm_jax.training.checkpoint import CheckpointError, Checkpoints
from mm_jax.training.runner import Preempted
from tests.conftest import ROOT
from tests.support.runs import config_file, losses, train


@pytest.fixture
def small(config):
    """Returns a config of one stage of the smallest model."""
    config.stages = ("utterances",)
    config.model.parts = ("compressor",)
    config.model.llm.residual_dropout = 0.1
    config.stage.utterances.update(steps=6, checkpoint_every=2, eval_every=0)
    return config


def test_sigterm_saves_and_exits_with_its_own_code(small, tmp_path, monkeypatch):
    train(small, tmp_path / "whole")
    original = supervised.Window.add

    def add(self, step, batch, metrics):
        original(self, step, batch, metrics)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    arguments = ["train", f"--config={config_file(small, tmp_path)}", f"--workdir={tmp_path}/parts"]
    with monkeypatch.context() as patch:
        patch.setattr(supervised.Window, "add", add)
        with pytest.raises(SystemExit) as stopped:
            command_line(arguments)
    assert stopped.value.code == EXIT_PREEMPTED == 75
    assert Checkpoints(tmp_path / "parts" / "checkpoints" / "utterances").steps() == [3]
    assert command_line([*arguments, "--resume"]) == 0
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_sigterm_in_a_stages_last_step_ends_the_run(small, tmp_path, monkeypatch):
    with small.unlocked():
        small.stage.more = small.stage.utterances.copy_and_resolve_references()
    small.stages = ("utterances", "more")
    for name in small.stages:
        small.stage[name].steps = 2
    original = supervised.Window.add

    def add(self, step, batch, metrics):
        original(self, step, batch, metrics)
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(supervised.Window, "add", add)
        with pytest.raises(Preempted, match="utterances: stopped by SIGTERM; step 2 is saved"):
            train(small, tmp_path)
    assert not (tmp_path / "checkpoints" / "more").exists()
    train(small, tmp_path, resume=True)
    assert json.loads((tmp_path / "stages.json").read_text()) == {"utterances": 2, "more": 2}


def test_a_run_folder_has_one_process_at_a_time(small, tmp_path, capsys):
    """Starts a second process at a run; a killed one's lock holds nobody up."""
    workdir = tmp_path / "run"
    arguments = ["train", f"--config={config_file(small, tmp_path)}", f"--workdir={workdir}"]
    code = (
        "import sys, time, pathlib; from mm_jax.run.lock import RunLock; "
        "lock = RunLock(pathlib.Path(sys.argv[1])); lock.acquire(); print('held', flush=True); "
        "time.sleep(600)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(workdir)], stdout=subprocess.PIPE, cwd=ROOT, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        assert command_line(arguments) == 2
        said = capsys.readouterr().err
        assert f"{workdir} is in use by process {holder.pid} on {socket.gethostname()}" in said
        assert [p.name for p in workdir.iterdir()] == [".lock"]
    finally:
        holder.kill()
        holder.wait()
    assert command_line(arguments) == 0
    assert not (workdir / ".lock").exists()
    lock = RunLock(workdir)
    lock.acquire()
    assert command_line([*arguments, "--resume"]) == 2
    lock.release()
    assert command_line([*arguments, "--resume"]) == 0


def test_checkpoints_between_evaluations_are_never_the_best(small, tmp_path):
    small.keep_checkpoints = 2
    train(small, tmp_path / "run")
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints" / "utterances", keep=2)
    assert checkpoints.steps() == [4, 6]
    assert checkpoints.best_step() == 6
    checkpoints.close()


def test_a_full_disk_leaves_the_earlier_checkpoint(small, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    original = Checkpoints.save
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def save(self, state, *args, **kwargs):
        if int(state.step) == 4:
            self.wait()
            # No file may grow beyond this (pytest keeps what is logged in one).
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
        original(self, state, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save)
        try:
            with pytest.raises(CheckpointError, match=r"not be written.* checkpoint: step 2;"):
                train(small, workdir)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    train(small, workdir, resume=True)
    train(small, tmp_path / "whole")
    assert losses(workdir) == losses(tmp_path / "whole")


def test_resuming_on_another_mesh_and_what_may_change(small, tmp_path, monkeypatch):
    train(small, tmp_path / "whole")
    original = Checkpoints.save

    def stop(self, state, *args, **kwargs):
        original(self, state, *args, **kwargs)
        self.wait()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            train(small, tmp_path / "parts")
    small.stage.utterances.learning_rate = 1.0
    with pytest.raises(ConfigError, match=r"in \['stage\.utterances\.learning_rate'\]; only mesh"):
        train(small, tmp_path / "parts", resume=True)
    small.stage.utterances.learning_rate = 2e-3
    small.mesh.update(data=2, fsdp=2, tensor=2)
    small.log_every = 2
    train(small, tmp_path / "parts", resume=True)
    whole = dict(losses(tmp_path / "whole"))
    parts = dict(losses(tmp_path / "parts"))
    assert set(parts) == {1, 2, 4, 6}
    for step in (4, 6):  # means of two steps
        assert parts[step] == pytest.approx((whole[step - 1] + whole[step]) / 2, rel=1e-4)
    saved = json.loads((tmp_path / "parts" / "config.json").read_text())
    assert saved["mesh"] == {"data": 2, "fsdp": 2, "tensor": 2}


def test_stages_may_be_added_to_a_run(small, tmp_path):
    open_workdir(resolve(small), tmp_path, resume=False, overwrite=False)
    more = small.copy_and_resolve_references()
    more.stages = ("utterances", "sft")
    more.stage.sft.learning_rate = 0.5
    more.reward.trust = 0.25
    open_workdir(resolve(more), tmp_path, resume=True, overwrite=False)
    assert read_config(tmp_path / "config.json").stages == ("utterances", "sft")
    for stages, rate in ((("sft", "utterances"), 0.5), (("utterances", "sft"), 0.6)):
        more.stages, more.stage.sft.learning_rate = stages, rate
        with pytest.raises(ConfigError, match="may be added at the end"):
            open_workdir(resolve(more), tmp_path, resume=True, overwrite=False)


@pytest.mark.slow
def test_killed_at_random_moments_nothing_is_lost(small, tmp_path):
    """Kills a run twenty times (kill -9), also while saving; its losses stay the same."""
    small.mesh.update(data=1, fsdp=1, tensor=1)
    small.stage.utterances.update(steps=600, checkpoint_every=3, eval_every=200)
    path = config_file(small, tmp_path)
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    parts = tmp_path / "parts"

    def start(workdir):
        command = [sys.executable, "-m", "mm_jax", "train", f"--config={path}", "--resume"]
        return subprocess.Popen(
            [*command, f"--workdir={workdir}"], env=environment, cwd=ROOT, stdout=log, stderr=log
        )

    def written():
        return losses(parts)[-1:] if (parts / "metrics.jsonl").exists() else []

    dice = random.Random(0)
    with open(tmp_path / "log", "w") as log:
        assert start(tmp_path / "whole").wait(600) == 0
        for _ in range(20):
            before, process = written(), start(parts)
            deadline = time.monotonic() + 300
            while written() == before and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(dice.uniform(0, 0.5))
            assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
            process.kill()
            process.wait()
        assert start(parts).wait(600) == 0
    assert losses(parts) == losses(tmp_path / "whole")
