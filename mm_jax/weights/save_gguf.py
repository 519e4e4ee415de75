"""Writes a language model as a GGUF file, for llama.cpp and what is built on it (the inverse of
`gguf.py`)."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import pathlib
from collections.abc import Mapping

import gguf
import numpy as np

from mm_jax.models.decoder_config import DecoderConfig, RopeScaling, inverse_frequencies
from mm_jax.weights.gguf import LAYER_NAMES, NAMES, ROPE_FACTORS, ROPE_NAMES, half_split
from mm_jax.weights.tensors import Tensor, WeightsError

logging.getLogger("gguf").setLevel(logging.WARNING)
FILE_TYPES = {"float16": "MOSTLY_F16", "bfloat16": "MOSTLY_BF16"}
FILE_TYPES |= {"float32": "ALL_F32", "q8_0": "MOSTLY_Q8_0"}
KINDS = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "q8_0": "Q8_0"}


@dataclasses.dataclass(frozen=True)
class Words:
    """What a file says of its tokenizer: a byte-level BPE's tokenizer.json, llama.cpp's name of how
    it cuts text, and the chat's tokens."""

    spec: dict
    cut: str
    template: str
    end_id: int
    pad_id: int
    bos_id: int | None


def kind_of(shape: tuple[int, ...], kind: str) -> gguf.GGMLQuantizationType:
    """Returns how a tensor is stored in a file of `kind`: vectors in float32, and rows that are no
    whole blocks in float16."""
    name = KINDS[kind] if len(shape) > 1 else "F32"
    if name == "Q8_0" and shape[-1] % 32:
        name = "F16"
    return gguf.GGMLQuantizationType[name]


def stored_bytes(shape: tuple[int, ...], kind: str) -> int:
    block, size = gguf.GGML_QUANT_SIZES[kind_of(shape, kind)]
    return math.prod(shape) // block * size


def write_gguf(
    path: pathlib.Path,
    title: str,
    config: DecoderConfig,
    tensors: Mapping[str, Tensor],
    words: Words,
    kind: str,
) -> None:
    """Writes a file of matrices of `kind` (of KINDS) and float32 vectors, one tensor at a time.

    `tensors` have the keys of the family's own layout. Raises WeightsError.
    """
    if config.hidden_act != "silu":
        raise WeightsError(f"weights: GGUF: expected hidden_act silu, got {config.hidden_act}")
    family = {"mistral": "llama"}.get(config.family, config.family)
    writer = gguf.GGUFWriter(path, family)
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[kind]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_name(title)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_vocab_size(config.vocab_size)
    _add_words(writer, words, config.vocab_size)
    scaling, factors = config.rope_scaling, None
    if scaling.rope_type == "llama3":
        plain = dataclasses.replace(config, rope_scaling=RopeScaling())
        divisors = inverse_frequencies(plain)[0] / inverse_frequencies(config)[0]
        factors = np.asarray(divisors, np.float32)
    elif scaling.rope_type != "default":
        if scaling.attention_factor or not scaling.truncate:
            raise WeightsError(
                "weights: GGUF: rope_scaling: attention_factor and truncate=False cannot be written"
            )
        writer.add_string(f"{family}.rope.scaling.type", scaling.rope_type)
        stored = ROPE_NAMES if scaling.rope_type == "yarn" else {"factor": "factor"}
        for name, field in stored.items():
            value = getattr(scaling, field)
            add = writer.add_uint32 if isinstance(value, int) else writer.add_float32
            add(f"{family}.rope.scaling.{name}", value)
    names = {key: stored for stored, key in {**NAMES, **LAYER_NAMES}.items()}
    chosen = {}
    for key, tensor in tensors.items():
        chosen[key] = kind_of(tensor.shape, kind)
        shape, dtype = tensor.shape, {"F32": np.float32, "F16": np.float16}.get(chosen[key].name)
        if dtype is None:
            shape, dtype = gguf.quant_shape_to_byte_shape(shape, chosen[key]), np.uint8
        writer.add_tensor_info(
            _stored_name(key, names),
            shape,
            np.dtype(dtype),
            stored_bytes(tensor.shape, kind),
            chosen[key],
        )
    if factors is not None:
        writer.add_tensor_info(ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for key, tensor in tensors.items():
        array = tensor.array().astype(np.float32)
        part = key.split(".")[-2]
        if family == "llama" and part in heads:
            array = array[np.argsort(half_split(heads[part], config.head_dim))]
        writer.write_tensor_data(gguf.quants.quantize(array, chosen[key]))
    if factors is not None:
        writer.write_tensor_data(factors)
    for file in writer.fout:
        file.flush()
        os.fsync(file.fileno())
    writer.close()


def _stored_name(key: str, names: dict[str, str]) -> str:
    stem, leaf = key.rsplit(".", 1)
    if stem in names:
        return f"{names[stem]}.{leaf}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{names[part]}.{leaf}"


def _add_words(writer: gguf.GGUFWriter, words: Words, rows: int) -> None:
    """Writes the vocabulary, filled up to the table's rows, and the chat's tokens."""
    model, kind = words.spec["model"], gguf.TokenType
    texts = {i: text for text, i in model["vocab"].items()}
    kinds = dict.fromkeys(texts, kind.NORMAL)
    for token in words.spec["added_tokens"]:
        texts[token["id"]] = token["content"]
        kinds[token["id"]] = kind.CONTROL if token["special"] else kind.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(words.cut)
    writer.add_token_list([texts.get(i, f"[PAD{i}]") for i in range(rows)])
    writer.add_token_types([kinds.get(i, kind.UNUSED) for i in range(rows)])
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    writer.add_token_merges(merges)
    writer.add_eos_token_id(words.end_id)
    writer.add_pad_token_id(words.pad_id)
    if words.bos_id is not None:
        writer.add_bos_token_id(words.bos_id)
    writer.add_add_bos_token(False)  # the chat template writes it
    writer.add_add_space_prefix(False)
    writer.add_chat_template(words.template)
