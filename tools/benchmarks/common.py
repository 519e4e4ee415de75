"""Builds the 12M-parameter Qwen2 of the benchmarks in both libraries, with random weights."""

from __future__ import annotations

SIZE = dict(
    vocab_size=8192,
    hidden_size=256,
    intermediate_size=1024,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=2048,
    tie_word_embeddings=False,
)


def tokens(rows: int, length: int):
    """Draws int64[rows, length], the same for both sides."""
    import numpy as np

    return np.random.default_rng(0).integers(10, SIZE["vocab_size"], (rows, length))


def text_batch(ids, targets: bool):
    """Makes a `Batch` of full rows of text; with `targets`, every token but the first is one."""
    import numpy as np

    from mm_jax.data.batch import Batch

    rows, length = ids.shape
    weights = np.full((rows, length), float(targets), np.float32)
    weights[:, 0] = 0
    none = np.zeros((rows, 0), np.int32)
    return Batch(
        tokens=ids.astype(np.int32),
        mask=np.ones((rows, length), bool),
        loss_weights=weights,
        frames=np.zeros((rows, 0, 1, 1, 3), np.uint8),
        fbank=np.zeros((rows, 0, 128), np.float32),
        fbank_frames=np.zeros(rows, np.int32),
        history_tokens=none,
        memory_index=none,
    )


def our_model():
    """Returns (abstract model on a mesh of one device, rngs -> model): only the language model."""
    import jax

    from mm_jax.models.abstract import abstract_model
    from mm_jax.models.decoder_config import DecoderConfig
    from mm_jax.models.multimood import MultiMood, MultiMoodConfig
    from mm_jax.models.sharding import make_mesh

    config = MultiMoodConfig(
        llm=DecoderConfig(**SIZE), vision=None, audio=None, compressor=None,
        video_token_id=-1, audio_token_id=-2, history_token_id=-3,
    )  # fmt: skip
    create = lambda rngs: MultiMood(config, rngs=rngs)  # noqa: E731
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    return abstract_model(create, mesh), create


def torch_model():
    import torch
    import transformers

    torch.set_num_threads(2)
    torch.manual_seed(0)
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZE, rope_theta=1e6))
