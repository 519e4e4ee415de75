"""Configures one fold of DFEW, client emotion from video and sound; `dfew` runs all five.

configs/dfew.py is a small network from scratch; configs/dfew.py:7b is the network of
configs/base.py, to be started from trained weights with --config.init_from.model=FOLDER.
"""

from configs import base, demo
from mm_jax.config.errors import one_of


def get_config(arg: str = ""):
    one_of("configs/dfew.py:ARGUMENT", arg, ("", "7b"))
    c = base.get_config() if arg else demo.get_config()
    c.data.history_labels = "none"
    c.model.parts = ("vision", "audio")
    c.stages = ("sft",)
    c.stage.sft.select_by = "labels"
    if arg:
        c.data.folder = "data/dfew/fold1_f8_s384/1.0.0"
        c.stage.sft.update(
            trainable=("language_model", "mm_projector", "mm_projector_a"), epochs=3.0
        )
        return c
    c.data.folder = "data/dfew/fold1_f8_s96/1.0.0"  # prepare --num_frames=8 --image_size=96
    c.data.vocab_size = 400
    c.model.vision.update(image_size=96, patch_size=12)
    c.model.llm.update(hidden_size=128, intermediate_size=256)
    c.stage.sft.update(
        trainable=(
            "language_model",
            "vision_tower",
            "mm_projector",
            "audio_tower",
            "mm_projector_a",
        ),
        label_weight=1.0,
        text_only_prob=0.0,
        learning_rate=5e-4,
        epochs=10.0,
    )
    return c
