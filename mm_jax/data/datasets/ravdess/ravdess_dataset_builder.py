"""Builds RAVDESS with TFDS: acted emotions in single clips of speech, split by actor.

Raw files: 01-01-06-01-02-01-12.mp4 (or .wav) in any folder: modality, channel, emotion, intensity,
statement, repetition, actor. Songs are left out; of one take the file with picture and sound is
taken, else that of the sound, else that of the picture.
"""

from __future__ import annotations

import pathlib
import re

from mm_jax.data.datasets.common import DataError
from mm_jax.data.datasets.corpus import Corpus, CorpusBuilder, Described, clip_entries
from mm_jax.data.labels import built_in

NAME = re.compile(r"(\d\d)-(\d\d)-(\d\d)-(\d\d)-(\d\d)-(\d\d)-(\d\d)")
SPEECH = "01"
EMOTIONS = ("neutral", "calm", "happy", "sad", "angry", "fearful", "disgust", "surprised")
STATEMENTS = {"01": "Kids are talking by the door.", "02": "Dogs are sitting by the door."}
ORDER = {"01": 0, "03": 1, "02": 2}  # modality -> what is preferred


class Builder(CorpusBuilder):
    """RAVDESS: actors are in one split each."""

    @classmethod
    def describe(cls, request):
        return Described(f"seed{request.seed}", built_in("ravdess"), request.raw)

    @staticmethod
    def read(config):
        def take(name: str):
            if not (match := NAME.fullmatch(name)) or match[2] != SPEECH:
                return None
            modality, _, emotion, *_, statement, _, actor = match.groups()
            known = modality in ORDER and statement in STATEMENTS
            if not known or not 1 <= int(emotion) <= len(EMOTIONS):
                raise DataError(f"RAVDESS: {name}: unknown modality, emotion or statement")
            labels = {"emotion": EMOTIONS[int(emotion) - 1]}
            return name[3:], actor, STATEMENTS[statement], labels, ORDER[modality]

        entries = clip_entries(pathlib.Path(config.raw), take, "01-01-06-01-02-01-12.mp4")
        return Corpus(built_in("ravdess"), entries, is_inferred=False)
