"""Sizes of released language models, for `plan` and for training without their weights.

Training from released weights (`init_from.language_model`) reads the sizes from the weights.
"""

QWEN3 = dict(
    family="qwen3",
    head_dim=128,
    num_key_value_heads=8,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    max_position_embeddings=40960,
    vocab_size=151936,
)
LLAMA3 = dict(rope_type="llama3", factor=8.0, original_max_position_embeddings=8192)
SIZES = {
    "smollm2-135m": dict(
        family="llama",
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        rms_norm_eps=1e-5,
        rope_theta=1e5,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        vocab_size=49152,
    ),
    "qwen3-0.6b": dict(
        QWEN3,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        tie_word_embeddings=True,
    ),
    "qwen3-1.7b": dict(
        QWEN3,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=28,
        num_attention_heads=16,
        tie_word_embeddings=True,
    ),
    "qwen3-8b": dict(
        QWEN3,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
    ),
    "llama3.1-8b": dict(
        family="llama",
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        rms_norm_eps=1e-5,
        rope_theta=5e5,
        max_position_embeddings=131072,
        rope_scaling=LLAMA3,
        vocab_size=128256,
    ),
}
