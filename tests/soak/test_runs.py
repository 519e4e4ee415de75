"""Kills runs a hundred times, fills their disk, and starts two at one folder (40 minutes)."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT, tiny_config
from tests.support.runs import config_file

pytestmark = pytest.mark.slow

KILLS = 20  # of every objective
# What a clock decides, and so differs between runs.
TIMES = re.compile(r"second|tok|mfu|time|memory|_ms|overlap|wait|per_s|attempts|circuit")
OBJECTIVES = ("sft", "compressor", "preference", "grpo", "ppo")


def stage_config(folder, objective):
    """Returns a config of one stage of the smallest model, which saves after every second step."""
    c = tiny_config(folder)
    c.model.parts = ("compressor",)
    c.mesh.update(data=1, fsdp=1, tensor=1)
    c.stages = ("stage",)
    with c.unlocked():
        name = "utterances" if objective == "compressor" else "sft"
        c.stage.stage = c.stage[name].copy_and_resolve_references()
    stage = c.stage.stage
    stage.update(objective=objective, steps=160, checkpoint_every=2, eval_every=80)
    if objective in ("preference", "grpo", "ppo"):
        stage.update(text_only_prob=1.0, label_weight=1.0, steps=60, eval_every=30)
        stage.rl.update(group=4, max_new_tokens=6, truncated="keep", chunks=1)
        stage.rl.length_window = (0, 0)
        c.reward.update(trust=0.0, similarity=0.0, function="tests.support.runs:letters")
    if objective == "grpo":
        stage.rl.inner_epochs = 2
    if objective == "ppo":
        stage.rl.update(critic="own", beta=0.0)
    return c


class Run:
    """Starts `train --resume` as its own process, again and again."""

    def __init__(self, path, workdir):
        self.command = [sys.executable, "-m", "mm_jax", "train", f"--config={path}", "--resume"]
        self.command.append(f"--workdir={workdir}")
        self.workdir, self.log = workdir, workdir.with_suffix(".log")

    def start(self):
        environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
        with open(self.log, "a") as log:
            return subprocess.Popen(self.command, env=environment, cwd=ROOT, stdout=log, stderr=log)

    def records(self):
        """Returns what the run has written, without what a clock decides."""
        path = self.workdir / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        return [{k: v for k, v in row.items() if not TIMES.search(k)} for row in rows]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_killed_at_random_moments_nothing_is_lost(synthetic, tmp_path, objective):
    path = config_file(stage_config(synthetic.folder, objective), tmp_path)
    whole, parts = (Run(path, tmp_path / name) for name in ("whole", "parts"))
    assert whole.start().wait(1200) == 0, whole.log.read_text()[-3000:]
    dice, kills = random.Random(0), 0
    while kills < KILLS:
        before, process = parts.records(), parts.start()
        deadline = time.monotonic() + 300
        while parts.records() == before and process.poll() is None:
            assert time.monotonic() < deadline, parts.log.read_text()[-3000:]
            time.sleep(0.01)
        time.sleep(dice.uniform(0, 0.7))
        if process.poll() is not None:
            assert process.returncode == 0, parts.log.read_text()[-3000:]
            break  # it had finished
        process.kill()
        process.wait()
        kills += 1
    assert parts.start().wait(1200) == 0, parts.log.read_text()[-3000:]
    print(f"{objective}: {kills} kills, {len(whole.records())} records")
    assert kills >= KILLS // 2
    assert parts.records() == whole.records()
    if (whole.workdir / "samples.jsonl").exists():
        samples = [(r.workdir / "samples.jsonl").read_text().splitlines() for r in (whole, parts)]
        kept = [[re.sub(r'"seconds": [^,}]+', "", line) for line in own] for own in samples]
        assert kept[0] == kept[1]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
def test_a_disk_that_fills_at_random_moments_costs_nothing_but_time(synthetic, tmp_path):
    path = config_file(stage_config(synthetic.folder, "sft"), tmp_path)
    whole, disk = Run(path, tmp_path / "whole"), tmp_path / "disk"
    assert whole.start().wait(1200) == 0, whole.log.read_text()[-3000:]
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=500k", "tmpfs", str(disk)], check=True)
    parts, dice, full = Run(path, disk / "parts"), random.Random(0), 0
    parts.log = tmp_path / "parts.log"
    try:
        size = 0.5
        for _ in range(40):
            status = parts.start().wait(1200)
            if status == 0:
                break
            said = parts.log.read_text()
            assert status == 2, said[-3000:]
            assert "Traceback" not in said, said[-3000:]
            full += 1
            size += dice.uniform(0.02, 0.3)
            remount = ["mount", "-o", f"remount,size={int(size * 1e6)}", str(disk)]
            subprocess.run(remount, check=True)
        assert status == 0
        assert full >= 3
        print(f"the disk was full {full} times")
        assert parts.records() == whole.records()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_two_processes_at_one_folder(synthetic, tmp_path):
    path = config_file(stage_config(synthetic.folder, "sft"), tmp_path)
    whole, run = (Run(path, tmp_path / name) for name in ("whole", "run"))
    assert whole.start().wait(1200) == 0
    first = run.start()
    while not run.records():
        assert first.poll() is None, run.log.read_text()[-3000:]
        time.sleep(0.05)
    for _ in range(5):
        assert run.start().wait(300) == 2
        assert f"is in use by process {first.pid} on" in run.log.read_text()
    assert first.wait(1200) == 0
    assert run.records() == whole.records()
    shutil.rmtree(run.workdir)
