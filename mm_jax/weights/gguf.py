"""Reads a language model from a GGUF file (llama.cpp's format), quantised or not.

Kernels are dequantised row by row as they are read. llama.cpp stores the rows of Llama's query and
key kernels in another order (pairs of a rotation side by side), which is undone here.
"""

from __future__ import annotations

import functools
import pathlib

import gguf
import ml_dtypes
import numpy as np

from mm_jax.models.decoder_config import DecoderConfig, inverse_frequencies
from mm_jax.weights.tensors import Tensor, WeightsError, summary

FAMILIES = ("llama", "qwen2", "qwen3")  # general.architecture; Mistral's files say llama
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_NAMES = {
    "factor": "factor",
    "original_context_length": "original_max_position_embeddings",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}
ROPE_FACTORS = "rope_freqs.weight"
# How Llama 3.1 and 3.2 were scaled; a file holds only the divisors that follow from it.
LLAMA3 = dict(
    rope_type="llama3",
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)


def open_gguf(path: pathlib.Path) -> tuple[DecoderConfig, dict[str, Tensor]]:
    """Opens a file; reads only its header. Tensors have the keys of the family's own layout.

    Raises WeightsError.
    """
    try:
        reader = gguf.GGUFReader(path)
        values = {name: field.contents() for name, field in reader.fields.items()
                  if not name.startswith("tokenizer.")}  # fmt: skip
    except Exception as error:  # a damaged file raises whatever its numbers lead to
        raise WeightsError(f"weights: {path} is no GGUF file: {summary(error)}") from error
    if values.get("split.count", 1) > 1:
        raise WeightsError(
            f"weights: {path} is one of {values['split.count']} parts; join them with llama.cpp's "
            "gguf-split --merge"
        )
    family = values.get("general.architecture")
    if family not in FAMILIES:
        raise WeightsError(
            f"weights: {path}: general.architecture: expected one of {list(FAMILIES)}, got "
            f"{family!r}"
        )
    found = {t.name: t for t in reader.tensors}
    if "token_embd.weight" not in found:
        raise WeightsError(f"weights: {path} has no token_embd.weight; a part of a model?")
    config = read_config(path, family, values, found)
    tensors, unknown = {}, []
    for name, stored in found.items():
        key = key_of(name)
        if key is None:
            unknown.append(name)
        elif name != ROPE_FACTORS:
            tensors[key] = tensor_of(path, key, stored, config)
    if unknown:
        raise WeightsError(f"weights: {path}: unexpected tensors: {', '.join(unknown[:20])}")
    return config, tensors


def read_config(path: pathlib.Path, family: str, values: dict, found: dict) -> DecoderConfig:
    def value(name: str, default=None):
        if (full := f"{family}.{name}") not in values and default is None:
            raise WeightsError(f"weights: {path} lacks {full}")
        found = values.get(full, default)
        # Stored in 32 bits: the number that was meant is the shortest one that rounds to it.
        return float(str(np.float32(found))) if isinstance(found, float) else found

    heads = value("attention.head_count")
    hf = dict(
        model_type=family,
        vocab_size=int(found["token_embd.weight"].shape[1]),
        hidden_size=value("embedding_length"),
        intermediate_size=value("feed_forward_length"),
        num_hidden_layers=value("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=value("attention.head_count_kv", heads),
        head_dim=value("attention.key_length", value("embedding_length") // heads),
        rms_norm_eps=value("attention.layer_norm_rms_epsilon"),
        rope_theta=value("rope.freq_base", 10000.0),
        max_position_embeddings=value("context_length"),
        tie_word_embeddings="output.weight" not in found,
        sliding_window=values.get(f"{family}.attention.sliding_window"),
        use_sliding_window=True,
    )
    rotated = value("rope.dimension_count", hf["head_dim"])
    if rotated != hf["head_dim"]:
        raise WeightsError(f"weights: {path}: {family}.rope.dimension_count: expected the head's "
                           f"{hf['head_dim']}, got {rotated}")  # fmt: skip
    kind = value("rope.scaling.type", "none")
    if kind != "none":
        prefix = f"{family}.rope.scaling."
        stored = {k.removeprefix(prefix): k for k in values if k.startswith(prefix)}
        unknown = sorted(set(stored) - {"type", "finetuned", *ROPE_NAMES})
        if unknown:
            raise WeightsError(f"weights: {path}: unexpected {prefix}{', '.join(unknown)}")
        own = {ROPE_NAMES[k]: value(f"rope.scaling.{k}") for k in stored if k in ROPE_NAMES}
        hf["rope_scaling"] = {"rope_type": kind, **own}
    if ROPE_FACTORS in found:
        divisors = np.asarray(found[ROPE_FACTORS].data, np.float32)
        hf["rope_scaling"] = {**LLAMA3, "factor": float(divisors.max())}
    try:
        config = DecoderConfig.from_hf_config(hf)
        plain = DecoderConfig.from_hf_config({**hf, "rope_scaling": None})
    except ValueError as error:
        raise WeightsError(f"weights: {path}: {error}") from error
    if ROPE_FACTORS in found:
        computed = inverse_frequencies(plain)[0] / inverse_frequencies(config)[0]
        if not np.allclose(computed, divisors, rtol=1e-4):
            raise WeightsError(
                f"weights: {path}: {ROPE_FACTORS}: expected those of Llama 3.1 (low 1, high 4, "
                "8,192 positions), got others"
            )
    return config


def key_of(name: str) -> str | None:
    """Returns a tensor's key in the family's own layout, or None for an unknown one."""
    if name == ROPE_FACTORS:
        return name
    stem, _, leaf = name.rpartition(".")
    if leaf not in ("weight", "bias"):
        return None
    if stem in NAMES:
        return f"{NAMES[stem]}.{leaf}"
    block, _, rest = stem.partition(".")
    layer, _, part = rest.partition(".")
    if block != "blk" or not layer.isdigit() or part not in LAYER_NAMES:
        return None
    return f"model.layers.{layer}.{LAYER_NAMES[part]}.{leaf}"


PLAIN = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


def tensor_of(path: pathlib.Path, key: str, stored, config: DecoderConfig) -> Tensor:
    """Returns a tensor whose rows are dequantised as they are read."""
    kind = stored.tensor_type
    shape = tuple(int(n) for n in reversed(stored.shape))
    dtype = np.dtype(PLAIN.get(kind.name, np.float32))
    order = None
    if config.family == "llama" and ".q_proj." in key:
        order = half_split(config.num_attention_heads, config.head_dim)
    if config.family == "llama" and ".k_proj." in key:
        order = half_split(config.num_key_value_heads, config.head_dim)
    if order is not None and len(order) != shape[0]:
        raise WeightsError(f"weights: {path}: {key}: expected {len(order)} rows, got {shape[0]}")

    def rows(start: int, stop: int) -> np.ndarray:
        if len(shape) == 1:
            whole = gguf.quants.dequantize(stored.data, kind).reshape(shape)
            return (whole if order is None else whole[order])[start:stop].astype(dtype)
        chosen = stored.data[start:stop] if order is None else stored.data[order[start:stop]]
        return gguf.quants.dequantize(chosen, kind).reshape(-1, *shape[1:]).astype(dtype)

    try:
        rows(0, 1)
    except NotImplementedError as error:
        raise WeightsError(f"weights: {path}: {key}: quantisation {kind.name}: {error}") from error
    return Tensor(shape, dtype, rows)


@functools.lru_cache
def half_split(heads: int, width: int) -> np.ndarray:
    """Returns the stored row of each row: within a head, row 2 i + j of the file is ours j, i."""
    pairs = np.arange(heads * width).reshape(heads, width // 2, 2)
    return pairs.transpose(0, 2, 1).reshape(-1)
