"""Tests the torch code that goes into exported folders against the reference's golden values."""

import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

from tests.conftest import GOLDEN, ROOT
from tools.parity.compare import Component
from tools.parity.whole import expand, scatter

CODE = ROOT / "mm_jax" / "weights" / "torch"


@pytest.fixture(scope="module")
def golden():
    return Component(GOLDEN / "multimood_full")


@pytest.fixture(scope="module")
def ids(golden):
    """The placeholders' ids: beyond the table, so that embedding one would fail."""
    vocab = golden.config["qwen2"]["vocab_size"]
    return SimpleNamespace(
        video_token_id=vocab, audio_token_id=vocab + 1, history_token_id=vocab + 2
    )


@pytest.fixture(scope="module")
def folder(golden, ids, tmp_path_factory):
    """Writes the golden weights with the torch code next to them."""
    out = tmp_path_factory.mktemp("torch") / "golden_folder"
    out.mkdir()
    c = golden.config
    m = c["multimodal"]
    config = {
        "model_type": "mm_jax",
        "architectures": ["MmJaxForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_mm_jax.MmJaxConfig",
            "AutoModelForCausalLM": "modeling_mm_jax.MmJaxForCausalLM",
        },
        "text_config": {"model_type": "qwen2", **c["qwen2"]},
        "vision_config": {"model_type": "siglip_vision_model", **c["siglip"]},
        "audio_config": c["beats"],
        "compressor_config": {
            "model_type": "mamba",
            **c["mamba"],
            "vocab_size": c["tokenizer_len"],
        },
        "vision_select_layer": m["mm_vision_select_layer"],
        "connector_type": m["mm_projector_type"],
        **vars(ids),
    }
    (out / "config.json").write_text(json.dumps(config))
    shutil.copy(golden.folder / "weights.safetensors", out / "model.safetensors")
    for file in CODE.glob("*.py"):
        shutil.copy(file, out)
    return out


@pytest.fixture(scope="module")
def model(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


def inputs(batch) -> dict[str, torch.Tensor]:
    """Turns one of our batches into what the model takes."""
    found = {"input_ids": batch.tokens, "attention_mask": batch.mask}
    if batch.frames.shape[1]:
        found["frames"] = batch.frames.transpose(0, 1, 4, 2, 3)
    if batch.fbank.shape[1]:
        found |= {"fbank": batch.fbank, "fbank_frames": batch.fbank_frames}
    if batch.memory_index.shape[1]:
        found |= {"history_ids": batch.history_tokens, "memory_index": batch.memory_index}
    tensors = {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in found.items()}
    return {k: v if v.is_floating_point() else v.long() for k, v in tensors.items()}


def test_logits_and_replies_are_the_references(golden, ids, model):
    model.eval()
    replies = 0
    for case, about in golden.config["cases"].items():
        batch, rows = expand(golden, case, about, ids)
        given = inputs(batch)
        with torch.no_grad():
            got = model(**given).logits.numpy()
        intended = f"{case}/intended_logits"
        want = golden[intended if intended in golden.io else f"{case}/logits"]
        mask = scatter(batch.mask[..., None], rows, (*want.shape[:2], 1))[..., 0].astype(bool)
        error = np.abs(scatter(got, rows, want.shape) - want)[mask].max()
        assert error < 1e-4, case
        for match in golden.cases(re.escape(case) + r"/generated_\d+"):
            name = match[0]
            if len(batch.tokens) == 1:  # rows of several would need padding on the left
                steps = golden[name].shape[1]
                out = model.generate(**given, max_new_tokens=steps, do_sample=False)
                np.testing.assert_array_equal(out[:, -steps:].numpy(), golden[name])
                replies += 1
    assert replies >= 6


def test_gradients_are_the_references(golden, ids, model):
    model.train()
    compared = 0
    for case in ("his_av", "mixed_right"):
        batch, _ = expand(golden, case, golden.config["cases"][case], ids)
        labels = torch.from_numpy(batch.labels).long()
        model.zero_grad()
        model(**inputs(batch), labels=labels).loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        for match in golden.cases(re.escape(case) + r"/grad/(.+)"):
            want = golden[match[0]]
            error = np.abs(grads[match[1]].numpy() - want).max()
            assert error < 1e-3 * np.abs(want).max(), match[0]
            compared += 1
    assert compared == 21


def test_placeholders_without_media_are_refused(golden, ids, model):
    batch, _ = expand(golden, "v", golden.config["cases"]["v"], ids)
    given = inputs(batch)
    frames = given.pop("frames")
    with pytest.raises(ValueError, match="video: input_ids have placeholders, but no video"):
        model(**given)
    given["input_ids"] = torch.full((1, 99), ids.video_token_id)
    given["attention_mask"] = torch.ones(1, 99)
    with pytest.raises(ValueError, match="video: 99 placeholders in a row, 8 features"):
        model(**given, frames=frames)
