"""Trains a tiny model from scratch on a small data set of one's own, in a minute or two.

For data of more than a few hundred turns start from a released language model instead:
configs/mesc_smollm2.py, configs/mesc_qwen3.py.
"""

from configs import demo


def get_config(arg: str = ""):
    c = demo.get_config(arg)
    c.data.folder = ""  # what `prepare` prints
    c.data.history = "text"
    c.data.history_tokens = 96
    c.model.parts = ("vision", "audio")
    c.stages = ("sft",)
    trainable = tuple(m for m in c.stage.sft.trainable if m != "mamba_compressor")
    c.stage.sft.update(trainable=trainable, batch_size=8, steps=40, eval_every=0)
    c.predict.update(batch_size=8, max_new_tokens=24)
    return c
