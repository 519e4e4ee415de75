"""Trains a small language model from scratch on MELD text, on two CPU cores.

    python -m mm_jax prepare --dataset=meld --raw=DIR
    python -m mm_jax train --config=configs/meld_text.py --workdir=RUN

The emotions of earlier utterances are not shown, as is the custom with this data set.
"""

from configs import mesc_text


def get_config(arg: str = ""):
    c = mesc_text.get_config(arg)
    c.data.folder = "data/meld/text/1.0.0"
    c.data.history = "text"
    c.data.history_tokens = 64
    c.data.history_labels = "none"
    c.data.previous_labels = 0
    c.model.parts = ()
    c.stages = ("sft",)
    c.stage.sft.update(
        trainable=("language_model",),
        history_label_dropout=0.0,
        balanced_tasks=(),
        label_weight=10.0,
        learning_rate=1e-3,
        batch_size=32,
        epochs=3.0,
        eval_every=156,
    )
    c.predict.batch_size = 64
    return c
