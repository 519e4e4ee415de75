"""Fine-tunes Qwen3-0.6B (or `configs/mesc_qwen3.py:1.7b`) on MESC text, on one GPU.

The whole history is in the prompt as far as it fits into 1,024 tokens; older utterances are read by
a compressor, which is pre-trained against the frozen language model.
"""

from configs import base
from mm_jax.config.errors import one_of

RELEASES = {"0.6b": "Qwen/Qwen3-0.6B", "1.7b": "Qwen/Qwen3-1.7B"}


def get_config(arg: str = ""):
    arg = arg or "0.6b"
    one_of("configs/mesc_qwen3.py:ARGUMENT", arg, list(RELEASES))
    c = base.get_config(f"qwen3-{arg}")
    c.init_from.language_model = RELEASES[arg]
    c.data.folder = "data/mesc/text/1.0.0"
    c.data.history = "both"
    c.data.history_tokens = 1024
    c.data.previous_labels = 1
    c.model.parts = ("compressor",)
    c.stage.sft.update(
        trainable=("language_model", "mamba_compressor"),
        text_only_prob=1.0,
        history_label_dropout=0.3,
        label_weight=4.0,
        epochs=3.0,
        eval_every=116,
        select_by="labels",
    )
    return c
