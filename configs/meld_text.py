"""Trains a small language model from scratch on MELD text, on two CPU cores.

    python -m mm_jax prepare --dataset=meld --raw=DIR
    python -m mm_jax train --config=configs/meld_text.py --workdir=RUN

The emotions of earlier utterances are not shown, as is the custom with this data set.
"""

from configs import base


def get_config(arg: str = ""):
    c = base.get_config()
    c.data.folder = "data/meld/text/1.0.0"
    c.data.template = "short"
    c.data.vocab_size = 3072
    c.data.history = "text"
    c.data.history_tokens = 64
    c.data.history_labels = "none"
    c.data.token_bucket = 128
    c.model.parts = ()
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
    c.stages = ("sft",)
    c.stage.sft.update(
        trainable=("language_model",),
        text_only_prob=1.0,
        label_weight=10.0,
        learning_rate=1e-3,
        weight_decay=0.1,
        ema_decay=0.99,
        batch_size=32,
        epochs=3.0,
        eval_every=156,
        select_by="labels",
    )
    c.predict.batch_size = 64
    return c
