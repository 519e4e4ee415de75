"""The conversation compressor on MESC text, longer than configs/mesc_text.py trains it: under half
an hour on two CPU cores. tools/compressor_report.py says what its memory holds."""

from configs import base, mesc_text


def get_config(arg: str = ""):
    c = mesc_text.get_config()
    # One shape for all utterances; most steps are theirs.
    c.data.update(token_bucket=64, history_bucket=64, memory_bucket=8)
    # After 1,000 steps of batches sorted by length no run knew both emotions and strategies.
    c.data.group_by_length = False
    # First to read one memory vector, then to find the right one among ever more.
    common = {k: c.stage.utterances[k] for k in ("trainable", "ema_decay", "weight_decay")}
    parts = dict(objective="compressor", **common, batch_size=16, learning_rate=2e-3, warmup=0.1)
    c.stage.fours = base.stage(**parts, unit_utterances=4, epochs=3.0)
    c.stage.eights = base.stage(**parts, unit_utterances=8, epochs=2.0)
    # Emotions are learnt at small rates and strategies at large ones, hence the slow warm-up.
    c.stage.utterances.update(batch_size=32, epochs=2.0, learning_rate=3e-3, warmup=0.3)
    c.stage.conversations.update(batch_size=8, epochs=2.0)
    c.stages = ("utterances", "fours", "eights", "conversations")
    for name in c.stages:
        # In sorted batches 4 taught no rare emotions and 30 no strategies.
        c.stage[name].update(label_weight=10.0, eval_reconstructions=64)
    return c
