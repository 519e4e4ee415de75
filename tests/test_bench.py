"""Tests that bench.py (our side) and bench_gpu.py run, in small and on a CPU."""

import json
import math

import pytest

from tests.conftest import ROOT
from tools import bench_gpu
from tools.benchmarks import common, generate, generate_mixed, grpo, mamba, train_step


@pytest.fixture
def small_sizes(monkeypatch):
    for field, size in dict(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2
    ).items():
        monkeypatch.setitem(common.SIZE, field, size)
    monkeypatch.setitem(mamba.SIZE, "hidden_size", 32)
    monkeypatch.setitem(mamba.SIZE, "num_hidden_layers", 1)
    monkeypatch.setitem(generate.SHAPE, "batch", 2)
    monkeypatch.setitem(generate.SHAPE, "new", 4)
    for field, size in dict(prompts=6, slots=2, longest_prompt=32, longest_reply=8).items():
        monkeypatch.setitem(generate_mixed.SHAPE, field, size)
    monkeypatch.setattr(generate_mixed, "QUANTILES", (2, 5, *[7] * 10))
    monkeypatch.setitem(train_step.SHAPE, "batch", 2)
    monkeypatch.setitem(train_step.SHAPE, "length", 32)


def test_our_side_of_the_benchmarks_answers(small_sizes):
    assert generate.ours()() == {"tokens": 2 * 4}
    said = generate_mixed.ours("static")()
    assert said["tokens"] == sum(generate_mixed.work()[1])
    assert 0 < said["between_tokens_median"] < said["first_token_median"]
    run = train_step.ours()
    first = run()["loss"]
    assert 0 < run()["loss"] < first < 2 * math.log(64)
    said = grpo.ours(prompt=8, new=4, group=2)()
    assert said["tokens"] == grpo.PROMPTS * 2 * 4
    assert abs(said["kl"]) < 1e-5  # the reference is where it starts
    assert min(v for k, v in said.items() if k.startswith("seconds/")) > 0
    assert min(mamba.ours(length=16)().values()) >= 0


def test_gpu_benchmarks_answer(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    sizes = "--vocab_size=400 --text_tokens=32 --audio_seconds=1 --utterances=4 --history_tokens=64"
    adapted = ["lora.rank=4", "batch_size=2", "accumulation=2"]
    overrides = [f"--config.stage.{name}.{field}" for name in ("sft", "grpo") for field in adapted]
    rl = ("max_new_tokens=4", "group=2", "chunks=1")
    bench_gpu.main(
        [
            *["scan", "sft", "grpo", "--scan=1x40x8x4", "--tokens=64", "--config=configs/demo.py"],
            *sizes.split(),
            "--config.model.parts=('audio','compressor')",
            *overrides,
            *(f"--config.stage.grpo.rl.{field}" for field in rl),
        ]
    )
    scan, sft, grpo = map(json.loads, capsys.readouterr().out.splitlines())
    assert [scan["benchmark"], sft["benchmark"], grpo["benchmark"]] == ["scan", "sft", "grpo"]
    assert 0 < max(scan["errors"].values()) < 1e-5
    assert 0 < sft["loss"] < 10
    assert grpo["tokens_decoded"] == 2 * 2 * 4
    assert abs(grpo["sampler_gap"]) < 1e-4
    assert set(grpo["share"]) == {"reshard", "prefill", "rollout", "score", "update"}
    assert abs(sum(grpo["share"].values()) - 1) < 1e-6
