"""Tests `plan` in separate processes: it compiles ahead of time for virtual devices."""

import os
import re
import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest

from mm_jax import planning
from mm_jax.__main__ import main
from mm_jax.commands.plan import parse_bytes, parse_mesh
from mm_jax.config import load as config_load
from mm_jax.config.errors import ConfigError
from mm_jax.run.host_memory import memory_limit
from tests.conftest import ROOT
from tests.support.runs import config_file


def plan(*arguments):
    """Runs the command; returns (exit status, standard output, standard error)."""
    found = subprocess.run(
        [sys.executable, "-m", "mm_jax", "plan", *arguments],
        capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": "", "TF_CPP_MIN_LOG_LEVEL": "0"},
    )  # fmt: skip
    return found.returncode, found.stdout, found.stderr


def gigabytes(text, row):
    return float(re.search(rf"{row} +([\d.]+) GB", text)[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ("--config=configs/base.py", "--mesh=data:1,fsdp:4,tensor:1",
         "--config.stage.sft.accumulation=4"),
        ("--config=configs/base.py", "--mesh=data:1,fsdp:1,tensor:1",
         "--config.stage.sft.accumulation=16", "--config.stage.sft.lora.rank=64"),
        ("--config=configs/base.py:grpo", "--mesh=data:1,fsdp:4,tensor:1",
         "--config.stage.grpo.accumulation=4", "--config.stage.grpo.rl.max_new_tokens=256"),
    ],
    ids=["full fine-tuning on 4 x 80 GB", "LoRA on 80 GB", "GRPO on 4 x 80 GB"],
)  # fmt: skip
def test_the_7b_network_fits(more):
    """Plans the paper's settings: batch 16, 16 frames, 2,048 text tokens and the media; in GRPO 8
    responses of 256 tokens."""
    status, out, error = plan("--hbm=80GB", "--vocab_size=151650", *more)
    assert status == 0, error
    assert gigabytes(out, "total per device") < 72
    assert "Involuntary full rematerialization" not in error
    assert "tokens[16, 4096]" in out


def test_what_does_not_fit_is_refused_with_what_would(config, tmp_path):
    config.stages, config.model.parts = ("sft",), ()
    path = config_file(config, tmp_path)
    arguments = (f"--config={path}", "--mesh=data:1,fsdp:2,tensor:1", "--text_tokens=512")
    status, priced, _ = plan(*arguments, "--device=RTX4090", "--price=2", "--steps=3600")
    assert status == 0
    total = gigabytes(priced, "total per device")
    assert 0 < total < 2
    status, _, error = plan(*arguments, f"--hbm={0.7 * total}GB")
    assert status == 2
    assert "does not fit" in error
    assert "accumulation=" in error
    least = re.search(r"the least change that fits on 2 of these \((.*) GB, planned", error)
    assert float(least[1]) <= 0.7 * total * 0.92 + 0.05
    options = shlex.split(error.partition("planned, not estimated):\n")[2].splitlines()[0])
    status, _, error = plan(*arguments[:2], *options, f"--hbm={0.7 * total}GB", "--text_tokens=512")
    assert status == 0, error
    assert "GB of 24" in priced
    hours, price = re.search(
        r"3600 steps: ([\d.]+) hours on 2 RTX4090, ([\d.]+) at 2", priced
    ).groups()
    moved = re.search(r"update +fsdp +all-gather +(\d+) +([\d.]+) GB +([\d.]+) s", priced)
    assert int(moved[1]) > 0
    assert "32 GB/s inside a host of 8, 50 GB/s between hosts" in priced
    computing = float(re.search(r"2 RTX4090: ([\d.]+) s", priced)[1])
    seconds = float(re.search(r"([\d.]+) s where nothing does", priced)[1])
    assert seconds >= computing
    assert float(hours) == pytest.approx(seconds, abs=0.06)
    assert float(price) == pytest.approx(float(hours) * 4, abs=0.25)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--frames=-3", "--frames: expected at least 1, got -3"),
        ("--audio_seconds=-1", "--audio_seconds: expected at least 0"),
        ("--price=-1", "--price: expected 0 or more"),
        ("--network=0", "--network: expected more than 0"),
        ("--mesh=data:1,fsdp:128,tensor:1", "--mesh: expected at most 64 devices"),
        ("--mesh=data:1,fsdp:0", "--mesh: expected sizes"),
    ],
)
def test_impossible_sizes_are_named(option, message, capsys):
    arguments = ["plan", f"--config={ROOT}/configs/demo.py", "--mesh=data:1,fsdp:1,tensor:1"]
    assert main([*arguments, option]) == 2
    assert message in capsys.readouterr().err


def test_reinforcement_is_planned_phase_by_phase(config, tmp_path):
    config.stages, config.model.parts = ("sft", "ppo"), ()
    config.stage.ppo = config.stage.sft.copy_and_resolve_references()
    config.stage.ppo.update(objective="ppo", select_by="loss", text_only_prob=1.0, label_weight=1.0)
    config.stage.ppo.rl.update(critic="own", group=4, max_new_tokens=16)
    path = config_file(config, tmp_path)
    arguments = (f"--config={path}", "--mesh=data:1,fsdp:2,tensor:1", "--text_tokens=512")
    status, out, error = plan(*arguments, "--hbm=1GB")
    assert status == 0, error
    peaks = [gigabytes(out, f"peak while {phase}") for phase in ("sampling", "scoring", "update")]
    assert gigabytes(out, "total per device") == max(peaks) > 0
    assert gigabytes(out, "rollout cache") >= 0
    assert "responses[8, 4, 16]" in out


def test_the_least_change_of_reinforcement_starts_with_smaller_chunks(config, monkeypatch):
    """A plan of PPO takes a minute to compile; here it is a sum that falls with each change."""
    config.stages = ("sft", "ppo")
    config.stage.ppo = config.stage.sft.copy_and_resolve_references()
    config.stage.ppo.update(objective="ppo", select_by="loss", text_only_prob=1.0, label_weight=1.0)
    config.stage.ppo.rl.update(critic="own", group=4, max_new_tokens=16, minibatches=2)
    planned = []

    def make_plan(config, name, mesh, example, vocab_size):
        stage = config.stage[name]
        planned.append((stage.accumulation, stage.rl.chunks, stage.lora.rank))
        return SimpleNamespace(total=80 // stage.accumulation + 20 * (stage.lora.rank == 0))

    monkeypatch.setattr(planning, "make_plan", make_plan)
    example = planning.Longest(512, 1, 0, 0, 0)
    mesh = {"data": 1, "fsdp": 2, "tensor": 1}
    how = (config_load.resolve(config), None, mesh, example, 500)
    change, plan = planning.least_change(*how, 60)
    assert change == "--config.stage.ppo.rl.chunks=4 --config.stage.ppo.accumulation=2"
    assert plan.total == 60
    change, _ = planning.least_change(*how, 40)
    assert "--config.stage.ppo.lora.rank=16" in change
    assert planning.least_change(*how, 39) is None
    assert (2, 4, 0) in planned


def test_sizes_are_parsed():
    assert parse_mesh("fsdp:4") == {"data": 1, "fsdp": 4, "tensor": 1}
    assert parse_bytes("80GB") == 80e9
    assert parse_bytes("1.5GiB") == 1.5 * 2**30
    for bad in ("model:2", "fsdp:-1", "fsdp"):
        with pytest.raises(ConfigError, match="--mesh: expected"):
            parse_mesh(bad)
    with pytest.raises(ConfigError, match="--hbm: expected"):
        parse_bytes("lots")


def test_a_cpu_is_planned_with_its_own_memory_and_without_a_time(tmp_path, config, capsys):
    config.stages, config.model.parts = ("sft",), ()
    path = config_file(config, tmp_path)
    arguments = [f"--config={path}", "--vocab_size=500", "--text_tokens=256", "--device=CPU"]
    one = "--mesh=data:1,fsdp:1,tensor:1"
    status, out, _ = plan(*arguments, one)
    assert status == 0, out
    available = re.search(r"GB of (\d+)", out)[1]
    assert int(available) == round(memory_limit() / 1e9)
    assert "TFLOP per step" in out
    assert "tokens/s" not in out
    status, _, error = plan(*arguments, one, "--hbm=0.001GB")
    assert status == 2
    assert "does not fit" in error
    assert "devices (about" not in error
    for option, message in (
        ("--mesh=data:1,fsdp:2,tensor:1", "--mesh: a CPU is one place"),
        ("--price=2", "--price: the time of a step on a CPU is not estimated"),
    ):
        assert main(["plan", *arguments, one, option]) == 2
        assert message in capsys.readouterr().err
