"""Trains a small compressor and language model from scratch on MESC text, on two CPU cores.

`configs/mesc_text.py:grpo` adds GRPO with rewards that need no weights and no judge: lexical
similarity and the share of right labels.
"""

from configs import base
from mm_jax.config.errors import one_of


def get_config(arg: str = ""):
    one_of("configs/mesc_text.py:ARGUMENT", arg, ("", "grpo"))
    c = base.get_config()
    c.data.folder = "data/mesc/text/1.0.0"
    c.data.template = "short"
    c.data.vocab_size = 3072
    c.data.previous_labels = 1
    c.model.parts = ("compressor",)
    c.model.remat = "none"
    c.model.llm.update(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        residual_dropout=0.1,
        vocab_multiple=64,
    )
    c.model.compressor.update(hidden_size=64, state_size=8, num_hidden_layers=2)
    # Nothing is pre-trained here, so the language model learns together with the compressor.
    trainable = ("language_model", "mamba_compressor")
    common = dict(trainable=trainable, ema_decay=0.99)
    c.stage.utterances.update(
        **common, learning_rate=2e-3, batch_size=64, epochs=1.0, weight_decay=0.05
    )
    c.stage.conversations.update(
        **common, learning_rate=1e-3, batch_size=16, epochs=1.0, weight_decay=0.05
    )
    supervised = dict(
        **common,
        weight_decay=0.1,
        text_only_prob=1.0,
        history_label_dropout=0.2,
        # Otherwise the common emotions are overfitted before the rare ones are learned.
        balanced_tasks=("client_emotion",),
        select_by="labels",
    )
    # Labels first: answers are short, so that many steps are cheap.
    c.stage.labels = base.stage(
        **supervised,
        with_response=False,
        label_weight=10.0,
        learning_rate=1e-3,
        batch_size=16,
        epochs=3.0,
        eval_every=116,
    )
    c.stage.sft.update(
        **supervised,
        label_weight=4.0,
        learning_rate=3e-4,
        batch_size=16,
        epochs=1.0,
        eval_every=116,
    )
    c.stages = ("utterances", "conversations", "labels", "sft")
    if arg == "grpo":
        c.stage.grpo = base.stage(
            objective="grpo",
            trainable=trainable,
            text_only_prob=1.0,
            learning_rate=1e-4,
            warmup=0.1,
            batch_size=16,
            steps=120,
            eval_every=40,
            eval_examples=96,
        )
        c.stage.grpo.rl.update(group=8, max_new_tokens=64, beta=0.02, chunks=1)
        # If cut-off replies were only masked out, replies would grow until most are cut off.
        c.stage.grpo.rl.truncated = "zero"
        c.stages = (*c.stages, "grpo")
        c.reward.update(trust=0.0, similarity_kind="lexical", labels=1.0)
    c.predict.batch_size = 32
    c.predict.max_new_tokens = 48
    return c
