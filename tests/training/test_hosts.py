"""Tests two processes of four devices each over gloo, and their checkpoints on other meshes."""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest
from jax.sharding import NamedSharding

from mm_jax.commands.train import EXIT_PREEMPTED
from mm_jax.config.errors import ConfigError
from mm_jax.models.sharding import batch_share, make_mesh
from mm_jax.rewards.base import FunctionReward
from mm_jax.training import hosts
from mm_jax.training.checkpoint import Checkpoints
from tests.conftest import ROOT
from tests.support.runs import config_file, letters, losses, train


@pytest.fixture
def small(config):
    config.stages = ("sft",)
    config.model.parts = ()
    config.stage.sft.update(steps=4, checkpoint_every=2, select_by="labels", eval_examples=0)
    config.mesh.update(data=2, fsdp=2, tensor=2)
    return config


def start_two(config, folder, workdir, *more):
    """Starts the same command in two processes; returns them with their logs."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    path = config_file(config, folder)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4"),
    }
    return [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "mm_jax", "train", f"--config={path}"),
                *(f"--workdir={workdir}", f"--coordinator=localhost:{port}"),
                *("--num_processes=2", f"--process_id={i}", *more),
            ],
            env=environment,
            cwd=ROOT,
            stdout=open(folder / f"log{i}", "w"),
            stderr=subprocess.STDOUT,
        )
        for i in range(2)
    ]


def finish(processes, folder, code=0):
    codes = [p.wait(300) for p in processes]
    logs = "\n".join((folder / f"log{i}").read_text()[-3000:] for i in range(2))
    assert codes == [code, code], logs
    return logs


def test_two_processes_train_as_one(small, tmp_path):
    """Checks for the losses of one process with eight devices; one process then resumes."""
    train(small, tmp_path / "one")
    finish(start_two(small, tmp_path, tmp_path / "two"), tmp_path)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert [step for step, _ in one] == [step for step, _ in two]
    for (_, a), (_, b) in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    # Begun by two processes and stopped, finished by one on another mesh.
    small.stage.sft.steps = 30
    processes = start_two(small, tmp_path, tmp_path / "stopped")
    deadline = time.monotonic() + 300
    path = tmp_path / "stopped" / "metrics.jsonl"
    while not (path.exists() and len(path.read_text().splitlines()) > 2):
        assert time.monotonic() < deadline
        assert all(p.poll() is None for p in processes), (tmp_path / "log0").read_text()[-3000:]
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)  # to one of them; both stop at one step
    finish(processes, tmp_path, EXIT_PREEMPTED)
    saved = Checkpoints(tmp_path / "stopped" / "checkpoints" / "sft").steps()[-1]
    assert 2 <= saved < 30
    assert [step for step, _ in losses(tmp_path / "stopped")][-1] == saved
    small.mesh.update(data=1, fsdp=4, tensor=2)
    train(small, tmp_path / "stopped", resume=True)
    assert [step for step, _ in losses(tmp_path / "stopped")] == list(range(1, 31))


def test_two_processes_reinforce_as_one(small, tmp_path):
    """Trains GRPO on (2, 2, 2): each process scores its share, and all learn from all responses."""
    small.stage.sft.update(objective="grpo", steps=2, checkpoint_every=0, select_by="loss")
    small.stage.sft.update(eval_examples=8, batch_size=8, learning_rate=1e-3, label_weight=1.0)
    small.stage.sft.rl.update(group=4, max_new_tokens=8, chunks=2, truncated="keep")
    small.stage.sft.rl.length_window = (0, 0)
    small.reward.update(trust=0.0, similarity=0.0, function="tests.support.runs:letters")
    train(small, tmp_path / "one")
    finish(start_two(small, tmp_path, tmp_path / "two"), tmp_path)
    one, two = (
        sorted(
            map(json.loads, (tmp_path / n / "samples.jsonl").read_text().splitlines()),
            key=lambda r: (r["step"], r["id"], r["sample"]),
        )
        for n in ("one", "two")
    )  # a chunk has rows of both processes, so the order differs
    assert [(r["step"], r["id"], r["sample"]) for r in one] == [
        (r["step"], r["id"], r["sample"]) for r in two
    ]
    first = [[r["completion"] for r in rows if r["step"] == 0] for rows in (one, two)]
    assert first[0] == first[1]
    assert [r["reward"] for r in one] == pytest.approx([r["reward"] for r in two])
    for (_, a), (_, b) in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, abs=1e-5)


CALLS = []


def too_few_scores(requests):
    """Returns too few scores from the third call on, in one of the processes."""
    CALLS.append(1)
    return letters(requests)[: len(requests) - jax.process_index() * (len(CALLS) > 2)]


def broken_pool(requests):
    """Fails like too_few_scores, but with an error that no reward should raise."""
    if len(too_few_scores(requests)) < len(requests):
        FunctionReward._score = None
    return letters(requests)


@pytest.mark.parametrize(
    ("function", "said"),
    [("too_few_scores", "reward {}: expected"), ("broken_pool", "rewards: TypeError")],
)
def test_a_reward_that_stops_one_process_stops_all(small, tmp_path, function, said):
    """Checks that they also save what they have trained."""
    small.stage.sft.update(objective="grpo", steps=3, select_by="loss", eval_examples=8)
    small.stage.sft.update(batch_size=8, checkpoint_every=0, label_weight=1.0)
    small.stage.sft.rl.update(group=2, max_new_tokens=4, chunks=1)
    function = f"tests.training.test_hosts:{function}"
    small.reward.update(trust=0.0, similarity=0.0, function=function)
    finish(start_two(small, tmp_path, tmp_path / "run"), tmp_path, code=2)
    for process in range(2):
        assert said.format(function) in (tmp_path / f"log{process}").read_text()
    assert Checkpoints(tmp_path / "run" / "checkpoints" / "sft").steps() == [1]


def test_process_0_ends_all(small, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    logs = finish(start_two(small, tmp_path, tmp_path / "taken"), tmp_path, code=2)
    assert "pass --resume or --overwrite" in logs
    assert "process 0 failed" in logs


def test_launchers_are_recognised():
    assert hosts.launcher({}) is None
    assert hosts.launcher({"SLURM_NTASKS": "4"}) is None  # an allocation, not a step
    assert hosts.launcher({"SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "n[1-4]"}) == "SLURM"
    assert hosts.launcher({"OMPI_COMM_WORLD_SIZE": "2"}) == "Open MPI"
    kubernetes = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
    assert hosts.launcher(kubernetes) is None
    assert hosts.launcher({**kubernetes, "JOB_COMPLETION_INDEX": "0"}) == "Kubernetes"


def test_half_given_addresses_are_refused():
    parser = argparse.ArgumentParser()
    hosts.add_arguments(parser)
    with pytest.raises(ConfigError, match="go together"):
        hosts.initialize(parser.parse_args(["--num_processes=2"]))
    full = ["--coordinator=localhost:1", "--num_processes=2", "--process_id=2"]
    with pytest.raises(ConfigError, match="--process_id: expected 0 to 1, got 2"):
        hosts.initialize(parser.parse_args(full))


@pytest.mark.parametrize(
    ("sizes", "shares"),
    [((8, 1, 1), {(0, 2), (1, 2)}), ((2, 2, 2), {(0, 2), (1, 2)}), ((1, 1, 8), {(0, 1)})],
)
def test_shares_of_a_batch(monkeypatch, sizes, shares):
    """Checks which share of a batch two processes of four devices each load, by mesh."""
    mesh = make_mesh(dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)))
    found = set()
    for process in range(2):
        mine = set(jax.devices()[4 * process : 4 * process + 4])

        def addressable(sharding, shape, mine=mine):
            every = sharding.devices_indices_map(shape)
            return {d: index for d, index in every.items() if d in mine}

        with monkeypatch.context() as patch:
            patch.setattr(NamedSharding, "addressable_devices_indices_map", addressable)
            found.add(batch_share(mesh))
    assert found == shares
