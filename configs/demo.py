"""Configures the whole chain on synthetic data, with every part tiny: minutes on two CPU cores."""

from configs import base


def get_config(arg: str = ""):
    c = base.get_config()
    c.data.folder = "demo/data/synthetic/n360_seed0_f4_s48/1.0.0"
    c.data.template = "short"
    c.data.vocab_size = 1024
    c.data.shapes = 1  # compiling another takes longer than the padding does
    c.data.group_by_length = False
    c.model.remat = "none"
    c.model.llm.update(
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        vocab_multiple=64,
    )
    c.model.vision.update(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=48,
        patch_size=8,
    )
    c.model.audio.update(
        embed_dim=48,
        encoder_layers=2,
        encoder_embed_dim=64,
        encoder_ffn_embed_dim=128,
        encoder_attention_heads=4,
        conv_pos=16,
        conv_pos_groups=4,
        num_buckets=32,
        max_distance=100,
    )
    c.model.compressor.update(hidden_size=64, state_size=8, num_hidden_layers=2)
    text = ("language_model", "mamba_compressor")
    c.stages = ("utterances", "sft", "grpo")
    c.log_every = 4
    c.stage.utterances.update(
        trainable=text, learning_rate=2e-3, batch_size=32, steps=40, epochs=1.0
    )
    # Nothing is pre-trained here, so the towers are trained too.
    c.stage.sft.update(
        trainable=(
            *text,
            "vision_tower",
            "mm_projector",
            "audio_tower",
            "mm_projector_a",
        ),
        label_weight=4.0,
        modality_probs=(0.2, 0.2, 0.6),
        text_only_prob=0.15,
        learning_rate=1.5e-3,
        batch_size=16,
        epochs=5.0,
        warmup=0.05,
        weight_decay=0.02,
        select_by="labels",
    )
    # Rewards: the stub judge that `demo` starts, and lexical similarity.
    c.stage.grpo = base.stage(
        objective="grpo",
        trainable=(*text, "mm_projector", "mm_projector_a"),
        learning_rate=2.5e-4,
        batch_size=16,
        steps=40,
        warmup=0.1,
        eval_examples=96,
    )
    c.stage.grpo.rl.update(group=8, max_new_tokens=56, beta=0.02, chunks=1)
    c.reward.similarity_kind = "lexical"
    c.reward.judge.model = "stub-rules"
    c.predict.batch_size = 32
    c.predict.max_new_tokens = 32
    return c
