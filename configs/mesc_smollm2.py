"""Fine-tunes SmolLM2-135M-Instruct on MESC text, on two CPU cores.

    python -m mm_jax train --config=configs/mesc_smollm2.py --workdir=RUN \
        --config.init_from.language_model=SmolLM2-135M-Instruct.Q4_1.gguf

`configs/mesc_smollm2.py:grpo` adds GRPO with rewards that need no weights and no judge.
`configs/mesc_smollm2.py:compressor` pre-trains a compressor against the frozen language model, as
the paper does, and then fine-tunes both: the newest utterances are text, older ones memory.
"""

from configs import base
from mm_jax.config.errors import one_of


def get_config(arg: str = ""):
    one_of("configs/mesc_smollm2.py:ARGUMENT", arg, ("", "grpo", "compressor"))
    c = base.get_config("smollm2-135m")
    c.data.folder = "data/mesc/text/1.0.0"
    c.data.template = "short"
    c.data.history = "text"
    c.data.history_tokens = 64
    c.data.previous_labels = 1
    c.data.max_length = 480
    # More than twice as fast as float32 on a CPU that multiplies bfloat16 (AMX).
    c.precision = "bfloat16"
    c.model.parts = ()
    c.model.remat = "none"
    # Four rows at a time: as fast as sixteen, in a third of the memory.
    common = dict(trainable=("language_model",), text_only_prob=1.0, accumulation=4)
    c.stage.sft.update(
        **common,
        history_label_dropout=0.3,
        label_weight=5.0,
        learning_rate=3e-4,  # 5e-4 was worse on val
        warmup=0.05,
        epochs=2.0,
        eval_every=116,
        select_by="labels",
    )
    c.stage.sft.lora.update(rank=32, alpha=64.0)
    c.stages = ("sft",)
    if arg == "grpo":
        c.stage.grpo = base.stage(
            **common,
            objective="grpo",
            learning_rate=1e-4,
            warmup=0.1,
            batch_size=8,
            steps=32,
            eval_examples=96,
        )
        c.stage.grpo.lora.update(rank=32, alpha=64.0)
        # Replies of fewer than ten words, or cut off, get the lowest reward.
        c.stage.grpo.rl.update(group=8, max_new_tokens=64, beta=0.02, chunks=1, truncated="zero")
        c.stage.grpo.rl.length_window = (10, 0)
        c.stages = (*c.stages, "grpo")
        c.reward.update(trust=0.0, similarity_kind="lexical", labels=1.0)
    if arg == "compressor":
        c.data.history = "both"
        c.model.parts = ("compressor",)
        c.model.compressor.update(hidden_size=256, num_hidden_layers=4)
        parts = dict(objective="compressor", trainable=("mamba_compressor",), learning_rate=1e-3)
        parts.update(warmup=0.1, batch_size=16, accumulation=4, eval_reconstructions=64)
        c.stage.utterances = base.stage(**parts, unit_utterances=1, epochs=1.0)
        c.stage.conversations = base.stage(**parts, unit_utterances=8, epochs=2.0)
        c.stage.sft.trainable = ("language_model", "mamba_compressor")
        c.stages = ("utterances", "conversations", "sft")
    c.predict.batch_size = 32
    c.predict.max_new_tokens = 64
    return c
