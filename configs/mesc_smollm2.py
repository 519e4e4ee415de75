"""Fine-tunes SmolLM2-135M-Instruct on MESC text, on two CPU cores.

    python -m mm_jax train --config=configs/mesc_smollm2.py --workdir=RUN \
        --config.init_from.language_model=SmolLM2-135M-Instruct.Q4_1.gguf
"""

from configs import base
from mm_jax.config.errors import one_of


def get_config(arg: str = ""):
    one_of("configs/mesc_smollm2.py:ARGUMENT", arg, ("",))
    c = base.get_config()
    c.data.folder = "data/mesc/text/1.0.0"
    c.data.template = "short"
    c.data.history = "text"
    c.data.history_tokens = 64
    c.data.previous_labels = 1
    c.data.token_bucket = 96
    c.model.parts = ()
    c.model.remat = "none"
    c.stage.sft.update(
        trainable=("language_model",),
        text_only_prob=1.0,
        history_label_dropout=0.3,
        label_weight=5.0,
        learning_rate=5e-4,
        warmup=0.05,
        batch_size=16,
        # Four rows at a time: as fast as sixteen, in a third of the memory.
        accumulation=4,
        epochs=2.0,
        eval_every=116,
        select_by="labels",
    )
    c.stage.sft.lora.update(rank=32, alpha=64.0)
    c.stages = ("sft",)
    c.predict.batch_size = 32
    c.predict.max_new_tokens = 64
    return c
