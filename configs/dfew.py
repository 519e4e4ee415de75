"""DFEW, one fold, from scratch: client emotion from video and sound with a small network.

python -m mm_jax train --config=configs/dfew.py --workdir=runs/dfew_fold1
"""

from configs import demo


def get_config(arg: str = ""):
    c = demo.get_config(arg)
    c.data.folder = "data/dfew/fold1_f8_s96/1.0.0"  # prepare --num_frames=8 --image_size=96
    c.data.label_space = "dfew"
    c.data.vocab_size = 400
    c.data.token_bucket = 512
    c.data.fbank_bucket = 512
    c.model.parts = ("vision", "audio")
    c.model.vision.update(image_size=96, patch_size=12)
    c.model.llm.update(hidden_size=128, intermediate_size=256)
    c.stages = ("sft",)
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
