"""The conversation compressor on MESC text, longer than configs/mesc_text.py trains it: half an
hour on two CPU cores. tools/compressor_report.py says what its memory holds."""

from configs import mesc_text


def get_config(arg: str = ""):
    c = mesc_text.get_config()
    c.stages = ("utterances", "conversations")
    c.stage.utterances.update(epochs=4.0, label_weight=4.0, learning_rate=3e-3, eval_every=249)
    c.stage.conversations.update(epochs=2.0, label_weight=4.0)
    for name in c.stages:
        c.stage[name].eval_reconstructions = 64
    return c
