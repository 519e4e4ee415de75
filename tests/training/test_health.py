"""Tests a run's health metrics: losses by modality, norms by part, FLOPs, memory, traces."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mm_jax.models.beats import Beats, BeatsConfig
from mm_jax.models.decoder import Decoder
from mm_jax.models.decoder_config import DecoderConfig
from mm_jax.models.mamba import Mamba, MambaConfig
from mm_jax.models.multimood import MultiMoodConfig
from mm_jax.models.siglip import Siglip, SiglipConfig
from mm_jax.models.stc import StcConfig, StcConnector
from mm_jax.run import flops
from mm_jax.training.metrics_writer import MetricsWriter, keep_records
from tests.support.runs import train


def xla_flops(module, *shapes) -> float:
    """Returns XLA's count of a forward pass; right where scans have one step (one-layer models)."""
    graph, state = nnx.split(nnx.eval_shape(lambda: module(nnx.Rngs(0))))
    compiled = jax.jit(lambda s, *a: nnx.merge(graph, s)(*a)).lower(state, *shapes).compile()
    return compiled.cost_analysis()["flops"]


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


QWEN2 = DecoderConfig(512, 256, 512, 1, 4, 2)
SIGLIP = SiglipConfig(128, 256, 1, 4, image_size=64, patch_size=8)
BEATS = BeatsConfig(16, 64, 1, 128, 256, 4, 16, 4, 32, 100)
MAMBA = MambaConfig(512, 256, 16, 1)
STC = StcConfig(64, 128)


@pytest.mark.parametrize(
    ("module", "shapes", "expected"),
    [
        (
            lambda r: Decoder(QWEN2, rngs=r),
            (array(2, 256, 256), array(2, 256, dtype=bool)),
            # XLA counts the whole square of attention, our formula half of it.
            lambda: (q := flops.decoder_flops(QWEN2, 2, 256))["matrices"] + 2 * q["attention"],
        ),
        (
            lambda r: Siglip(SIGLIP, rngs=r),
            (array(3, 64, 64, 3),),
            lambda: flops.siglip_flops(SIGLIP, 3, 1),
        ),
        (
            lambda r: Beats(BEATS, rngs=r),
            (array(2, 160, 128), array(2, dtype=jnp.int32)),
            lambda: flops.beats_flops(BEATS, 2, 160),
        ),
        (
            lambda r: StcConnector(STC, rngs=r),
            (array(2, 4, 64, 64),),
            lambda: flops.stc_flops(STC, 2, 4, 8),
        ),
        (
            lambda r: Mamba(MAMBA, rngs=r),
            (array(2, 128, dtype=jnp.int32),),
            lambda: flops.mamba_flops(MAMBA, 2, 128),
        ),
    ],
    ids=["qwen2", "siglip", "beats", "stc", "mamba"],
)
def test_analytic_flops_agree_with_xla(module, shapes, expected):
    # XLA also counts element-wise work, and one step of the selective scan only.
    assert 0.85 < expected() / xla_flops(module, *shapes) <= 1.04


def test_training_flops_by_what_is_trained():
    config = MultiMoodConfig(
        llm=QWEN2, vision=SIGLIP, audio=BEATS, compressor=MAMBA, vision_select_layer=-1
    )
    shapes = {
        "tokens": (2, 128),
        "frames": (2, 4, 64, 64, 3),
        "fbank": (2, 160, 128),
        "history_tokens": (2, 64),
        "memory_index": (2, 4),
    }
    forward = flops.forward_flops(config, shapes)
    everything = flops.train_flops(config, shapes, forward)
    assert everything == pytest.approx(3 * sum(forward.values()))
    # The language model frozen: gradients still run through it to the compressor's memory.
    frozen = flops.train_flops(config, shapes, ("mamba_compressor",))
    rest = sum(v for k, v in forward.items() if k not in ("language_model", "mamba_compressor"))
    assert frozen == pytest.approx(
        2 * forward["language_model"] + 3 * forward["mamba_compressor"] + rest
    )
    full = DecoderConfig()
    parts = flops.decoder_flops(full, 4, 2048)
    assert 3 * sum(parts.values()) == pytest.approx(3.58e14, rel=0.06)  # 6 x 7.6e9 x 8192 tokens


def test_mfu_needs_a_known_device():
    assert flops.mfu(989e12, 2.0, 1, "NVIDIA H100 80GB HBM3") == pytest.approx(0.5)
    assert flops.mfu(1.0, 1.0, 1, "cpu") is None


def test_a_run_reports_its_health(config, tmp_path):
    config.stages = ("sft",)
    config.model.parts = ("audio", "compressor")
    config.stage.sft.update(steps=3, modality_probs=(1.0, 0.0, 0.0), text_only_prob=0.5)
    config.profile_steps = (1, 2)
    train(config, tmp_path / "run")
    records = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    records = [r for r in records if "loss" in r]
    for r in records:
        assert {"loss/text", "loss/audio"} & set(r)
        assert not {"loss/video", "loss/audio_video"} & set(r)
        by_part = [v for k, v in r.items() if k.startswith("grad_norm/")]
        assert len(by_part) == 4  # language model, compressor, audio tower and projector
        assert np.sqrt(np.sum(np.square(by_part))) == pytest.approx(r["grad_norm"], rel=1e-4)
        assert 0 <= r["data_wait_share"] < 1
        assert r["tflops_per_second_per_device"] > 0
        assert 0.1 < r["host_memory_gib"] < 30
        assert "mfu" not in r  # the peak of a CPU is not known
    assert any("loss/text" in r and "loss/audio" in r for r in records)
    assert list((tmp_path / "run" / "profile" / "sft").rglob("*.xplane.pb"))


def test_rewinding_forgets_lost_steps_and_broken_lines(tmp_path):
    writer = MetricsWriter(tmp_path)
    for stage, step in (("a", 1), ("a", 2), ("b", 1), ("b", 2)):
        writer.write(stage, step, {"loss": step})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"stage": "b", "st')
    writer.rewind("b", 1)
    writer.write("b", 2, {"loss": 7})
    writer.close()
    rows = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(r["stage"], r["step"], r["loss"]) for r in rows] == [
        ("a", 1, 1), ("a", 2, 2), ("b", 1, 1), ("b", 2, 7)
    ]  # fmt: skip


def test_a_shared_prefix_of_one_is_a_whole_row():
    """Checks that FLOPs with one response equal one long row's, less the prompt's head."""
    whole = flops.decoder_flops(QWEN2, 2, 256 + 64)
    expected = whole["matrices"] + whole["attention"] + whole["head"] * 64 / (256 + 64)
    assert flops.shared_prefix_flops(QWEN2, 2, 256, 1, 64) == pytest.approx(expected)
    # With eight responses the prompt is still counted once.
    eight = flops.shared_prefix_flops(QWEN2, 2, 256, 8, 64)
    assert eight < 8 * expected


def test_records_that_a_kill_cut_off_are_dropped(tmp_path):
    path = tmp_path / "samples.jsonl"
    rows = [{"step": n, "text": "Größe"} for n in range(4)]
    lines = [json.dumps(row, ensure_ascii=False).encode() for row in rows]
    within_a_character = lines[3][: lines[3].index("ö".encode()) + 1]
    for last in (within_a_character, lines[3][:5], lines[3]):  # complete except for its newline
        path.write_bytes(b"\n".join([*lines[:3], last]))
        keep_records(path, lambda row: row["step"] != 1)
        kept = path.read_text(encoding="utf-8")
        assert kept.endswith("\n")
        whole = [0, 2, 3] if last == lines[3] else [0, 2]
        assert [json.loads(line) for line in kept.splitlines()] == [rows[n] for n in whole]
