"""Trains the conversation compressor on MESC text for longer than configs/mesc_text.py does: under
half an hour on two CPU cores. tools/compressor_report.py measures what its memory holds."""

from configs import base, mesc_text


def get_config(arg: str = ""):
    c = mesc_text.get_config()
    # With batches sorted by length no run learned both emotions and strategies in 1,000 steps.
    c.data.group_by_length = False
    # With dropout only nine lines of ten were read from the right one of four vectors.
    c.model.llm.residual_dropout = 0.0
    c.model.compressor.hidden_size = 128
    common = {k: c.stage.utterances[k] for k in ("trainable", "ema_decay", "weight_decay")}
    parts = dict(objective="compressor", eval_reconstructions=64, learning_rate=1e-3, warmup=0.1)
    parts.update(common, batch_size=16)
    # Label lines without their text come first: the model learns to read one memory vector, then to
    # find the right one among more and more. At twice the first stage's learning rate mostly only
    # one of the two kinds of label was learned.
    lines = dict(parts, with_response=False)
    c.stage.labels_of_1 = base.stage(**lines, unit_utterances=1)
    c.stage.labels_of_1.update(batch_size=32, learning_rate=1.5e-3, warmup=0.2)
    c.stage.labels_of_4 = base.stage(**lines, unit_utterances=4, epochs=2.0)
    c.stage.labels_of_16 = base.stage(**lines, unit_utterances=16, epochs=6.0)
    c.stage.labels_of_all = base.stage(**dict(lines, batch_size=8), epochs=7.0)
    # Then whole lines, in which label tokens still weigh more.
    c.stage.conversations.update(**dict(parts, batch_size=8), label_weight=10.0, epochs=3.0)
    c.stages = ("labels_of_1", "labels_of_4", "labels_of_16", "labels_of_all", "conversations")
    return c
