"""The conversation compressor on MESC text, longer than configs/mesc_text.py trains it: under half
an hour on two CPU cores. tools/compressor_report.py says what its memory holds."""

from configs import mesc_text


def get_config(arg: str = ""):
    c = mesc_text.get_config()
    c.stages = ("utterances", "conversations")
    c.stage.utterances.update(epochs=3.0, learning_rate=3e-3, eval_every=249)
    c.stage.conversations.update(epochs=4.0, eval_every=96)
    for name in c.stages:
        # With 4 the rarer emotions are not told apart, with 30 the strategies are not learnt.
        c.stage[name].update(label_weight=10.0, eval_reconstructions=64)
    return c
