"""Configures the paper's run: the 7B network, its three stages, and settings (spec 3 and 4).

Every field with its meaning is in docs/config.md; what is not set here is the schema's default.
`configs/base.py:grpo` and `configs/base.py:ppo` add reinforcement after SFT; `:qwen3-8b` or another
of configs/decoders.py takes its language model in place of Qwen2-7B; `:grpo,qwen3-8b` does both.
"""

from ml_collections import ConfigDict

from configs.decoders import SIZES
from mm_jax.config.errors import one_of
from mm_jax.config.load import defaults
from mm_jax.config.stage import Stage


def stage(**overrides) -> ConfigDict:
    """Returns a training stage."""
    c = defaults(Stage)
    c.update(overrides)
    return c


def get_config(arg: str = "") -> ConfigDict:
    words = [word for word in arg.split(",") if word]
    for word in words:
        one_of("configs/base.py:ARGUMENT", word, ("grpo", "ppo", *SIZES))
    c = defaults()
    for name in set(words) & set(SIZES):
        c.model.llm.update(SIZES[name])
    reinforced = [word for word in words if word not in SIZES]
    c.stages = ("utterances", "conversations", "sft", *reinforced)
    compressor = dict(objective="compressor", trainable=("mamba_compressor",), batch_size=8)
    c.stage.utterances = stage(**compressor, unit_utterances=1, learning_rate=2.5e-5, epochs=3.0)
    c.stage.conversations = stage(**compressor, learning_rate=1e-4, epochs=2.0)
    c.stage.sft = stage()
    for objective in ("grpo", "ppo"):
        c.stage[objective] = stage(objective=objective, learning_rate=1e-5)
    return c
