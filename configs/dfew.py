"""DFEW, the single-label task, one fold: the 7B network without history (see `dfew`).

Start it from trained weights with --config.init_from.model=FOLDER.
"""

from configs import base


def get_config(arg: str = ""):
    c = base.get_config(arg)
    c.data.folder = "data/dfew/fold1_f8_s384/1.0.0"
    c.data.label_space = "dfew"
    c.data.history_labels = "none"
    c.model.parts = ("vision", "audio")
    c.stages = ("sft",)
    c.stage.sft.update(
        trainable=("language_model", "mm_projector", "mm_projector_a"),
        epochs=3.0,
        select_by="labels",
    )
    return c
