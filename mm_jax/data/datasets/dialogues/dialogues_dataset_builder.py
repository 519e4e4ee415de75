"""Builds people's own dialogues or clips with TFDS, from the files that files.py reads."""

from __future__ import annotations

import pathlib
import re

from mm_jax.config.errors import require
from mm_jax.data.datasets.corpus import CorpusBuilder, Described
from mm_jax.data.datasets.dialogues.files import read_folder


class Builder(CorpusBuilder):
    """The dialogues of dialogues.jsonl, or the clips of clips.csv."""

    @classmethod
    def describe(cls, request):
        corpus = read_folder(request.raw, bool(request.transcribe))
        folds = bool(corpus.entries[0].fold)
        require(folds or request.fold == 1, f"--fold: the clips in {request.raw} have no fold")
        name = re.sub(r"[^\w.-]+", "_", request.raw.resolve().name)
        name += f"_fold{request.fold}" if folds else ""
        name += f"_seed{request.seed}" if request.seed else ""
        return Described(name, corpus.space, request.raw if corpus.has_media else None)

    @staticmethod
    def read(config):
        return read_folder(pathlib.Path(config.raw), bool(config.transcribe))
