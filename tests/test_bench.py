"""The GPU benchmarks run, small and on a CPU: on a rented device there is no time to mend them."""

import json

from tests.conftest import ROOT
from tools import bench_gpu


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
    assert set(grpo["share"]) == {"reshard", "rollout", "score", "update"}
    assert abs(sum(grpo["share"].values()) - 1) < 1e-6
