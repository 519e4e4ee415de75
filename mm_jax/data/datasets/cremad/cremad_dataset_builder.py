"""Builds CREMA-D with TFDS: acted emotions in single clips, split by actor.

Raw files: 1001_DFA_ANG_XX.flv (or .mp4, .wav) in any folder: actor, sentence, emotion, level.
"""

from __future__ import annotations

import pathlib
import re

from mm_jax.data.datasets.common import DataError
from mm_jax.data.datasets.corpus import Corpus, CorpusBuilder, Described, clip_entries
from mm_jax.data.labels import built_in

NAME = re.compile(r"(\d{4})_([A-Z]{3})_([A-Z]{3})_([A-Z0-9]{1,2})")
EMOTIONS = {"ANG": "anger", "DIS": "disgust", "FEA": "fear", "HAP": "happy", "NEU": "neutral"}
EMOTIONS["SAD"] = "sad"
SENTENCES = {
    "IEO": "It's eleven o'clock.",
    "TIE": "That is exactly what happened.",
    "IOM": "I'm on my way to the meeting.",
    "IWW": "I wonder what this is about.",
    "TAI": "The airplane is almost full.",
    "MTI": "Maybe tomorrow it will be cold.",
    "IWL": "I would like a new alarm clock.",
    "ITH": "I think I have a doctor's appointment.",
    "DFA": "Don't forget a jacket.",
    "ITS": "I think I've seen this before.",
    "TSI": "The surface is slick.",
    "WSI": "We'll stop in a couple of minutes.",
}


class Builder(CorpusBuilder):
    """CREMA-D: actors are in one split each."""

    @classmethod
    def describe(cls, request):
        return Described(f"seed{request.seed}", built_in("cremad"), request.raw)

    @staticmethod
    def read(config):
        def take(name: str):
            if not (match := NAME.fullmatch(name)):
                return None
            actor, sentence, emotion, _ = match.groups()
            if emotion not in EMOTIONS or sentence not in SENTENCES:
                raise DataError(f"CREMA-D: {name}: unknown emotion or sentence")
            return name, actor, SENTENCES[sentence], {"emotion": EMOTIONS[emotion]}, 0

        entries = clip_entries(pathlib.Path(config.raw), take, "1001_DFA_ANG_XX.flv")
        return Corpus(built_in("cremad"), entries, is_inferred=False)
