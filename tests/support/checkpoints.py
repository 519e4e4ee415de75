"""Builds small checkpoints of every layout with transformers and torch, for the tests."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

from mm_jax.data import tokenizer
from tests.conftest import GOLDEN

WORDS = ["I feel sad about my exam.", "What worries you most?", "Client: Therapist: (joy)"] * 30


def small_tokenizer(folder: pathlib.Path) -> tokenizer.Tokenizer:
    tok = tokenizer.train(WORDS, 320)
    tok.save(folder)
    return tok


def randomise(model: torch.nn.Module, seed: int = 0, scale: float = 0.3) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator) * (scale if p.dim() > 1 else 0.2)
            p.copy_(noise + (p.dim() == 1))
    return model.eval()


def decoder(
    folder: pathlib.Path,
    *,
    family: str = "qwen2",
    tied: bool = False,
    vocab: int = 352,
    layers: int = 2,
    scale: float = 0.3,
    dtype=torch.float32,
    **save,
):
    own = {"qwen3": {"head_dim": 12}, "mistral": {"sliding_window": None}}
    config = transformers.AutoConfig.for_model(
        family,
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_theta=5e5,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
        **own.get(family, {}),
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    model = randomise(model, scale=scale).to(dtype)
    model.save_pretrained(folder, **save)
    small_tokenizer(folder)
    return model


def siglip(folder: pathlib.Path, layers: int = 3, scale: float = 0.3):
    config = transformers.SiglipVisionConfig(
        hidden_size=24,
        intermediate_size=36,
        num_hidden_layers=layers,
        num_attention_heads=3,
        image_size=20,
        patch_size=5,
    )
    model = randomise(transformers.SiglipVisionModel(config), scale=scale)
    model.save_pretrained(folder)
    return model


def mamba(folder: pathlib.Path, vocab: int = 60, layers: int = 2, scale: float = 0.3):
    config = transformers.MambaConfig(
        vocab_size=vocab, hidden_size=16, state_size=6, num_hidden_layers=layers, time_step_rank=2
    )
    model = randomise(transformers.MambaForCausalLM(config), scale=scale)
    model.save_pretrained(folder)
    return model


def beats(path: pathlib.Path) -> dict[str, torch.Tensor]:
    """Writes the released file: {"cfg", "model"}."""
    weights = load_file(GOLDEN / "beats" / "weights.safetensors")
    config = json.loads((GOLDEN / "beats" / "config.json").read_text())["model"]
    torch.save({"cfg": config, "model": weights}, path)
    return weights


def multimood(
    folder: pathlib.Path,
    *,
    compressor: bool = True,
    side_files: bool = False,
    projector: str = "linear",
    rows: int = 352,
    dtype=torch.float32,
) -> dict[str, torch.Tensor]:
    """Writes the reference's golden weights as a released folder, with tables of `rows` rows, and
    returns what is in it. `side_files`: tower and projectors in torch files, as in
    VideoLLaMA2.1-7B-AV."""
    folder.mkdir(parents=True)
    weights = load_file(GOLDEN / "multimood_full" / "weights.safetensors")
    c = json.loads((GOLDEN / "multimood_full" / "config.json").read_text())
    generator = torch.Generator().manual_seed(1)
    for key in list(weights):
        if key in (
            "model.embed_tokens.weight",
            "lm_head.weight",
            "model.mamba_compressor.mamba.embeddings.weight",
        ):
            more = torch.randn(
                (rows - len(weights[key]), weights[key].shape[1]), generator=generator
            )
            weights[key] = torch.cat([weights[key], more * 0.3])
        if not compressor and "mamba_compressor" in key:
            del weights[key]
    if projector == "mlp2x_gelu":
        first = weights.pop("model.mm_projector_a.weight"), weights.pop("model.mm_projector_a.bias")
        width = len(first[1])
        weights["model.mm_projector_a.0.weight"], weights["model.mm_projector_a.0.bias"] = first
        weights["model.mm_projector_a.2.weight"] = torch.randn((width, width), generator=generator)
        weights["model.mm_projector_a.2.bias"] = torch.randn(width, generator=generator)
    weights = {k: v.to(dtype).contiguous() for k, v in weights.items()}
    config = {
        **c["qwen2"],
        **c["multimodal"],
        "model_type": "videollama2_qwen2",
        "vocab_size": rows,
        "mm_vision_tower": "siglip",
        "mm_audio_tower": "audio_tower.bin",
        "mm_projector_a_type": projector,
    }
    (folder / "siglip").mkdir()
    (folder / "siglip" / "config.json").write_text(
        json.dumps({"model_type": "siglip_vision_model", **c["siglip"]})
    )
    (folder / "config.json").write_text(json.dumps(config))
    if compressor:
        (folder / "compressor_config.json").write_text(json.dumps(c["mamba"]))
    main = dict(weights)
    if side_files:
        prefix = "model.audio_tower."
        tower = {k.removeprefix(prefix): main.pop(k) for k in list(main) if k.startswith(prefix)}
        torch.save({"cfg": c["beats"], "model": tower}, folder / "audio_tower.bin")
        for name in ("mm_projector", "mm_projector_a"):
            part = {k: main.pop(k) for k in list(main) if k.startswith(f"model.{name}.")}
            torch.save(part, folder / f"{name}.bin")
    else:
        (folder / "audio_config.json").write_text(json.dumps(c["beats"]))
    save_file(main, folder / "model.safetensors", {"format": "pt"})
    small_tokenizer(folder)
    return weights


def as_numpy(weights: dict[str, torch.Tensor]) -> dict[str, bytes]:
    """Returns key -> bytes."""
    return {k: v.contiguous().view(torch.uint8).numpy().tobytes() for k, v in weights.items()}


def stored(folder: pathlib.Path) -> dict[str, bytes]:
    """Returns key -> bytes of all safetensors in a folder, by the safetensors library."""
    out = {}
    for file in sorted(folder.glob("*.safetensors")):
        out.update(as_numpy(load_file(file)))
    return out


def random_ids(rows: int, length: int, vocab: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocab, (rows, length))
