"""Builds ESConv with TFDS: the supporter's strategy and reply (text only).

Raw file: ESConv.json. The seeker is the client, the supporter the therapist. The split is that of
the authors' code: shuffled by Python's `random` with seed 13, then 15 % dev, 15 % test, 70 % train.
"""

from __future__ import annotations

import pathlib
import random

from mm_jax.config.errors import ConfigError
from mm_jax.config.files import read_json
from mm_jax.data.datasets.common import DataError
from mm_jax.data.datasets.corpus import Corpus, CorpusBuilder, Described, Entry
from mm_jax.data.labels import built_in
from mm_jax.data.records import CLIENT, THERAPIST, Dialogue, Utterance

SPEAKERS = {"seeker": CLIENT, "usr": CLIENT, "supporter": THERAPIST, "sys": THERAPIST}
SEED, SHARE = 13, 0.15


class Builder(CorpusBuilder):
    """ESConv: the customary split."""

    @classmethod
    def describe(cls, request):
        return Described("", built_in("esconv"), None)

    @staticmethod
    def read(config):
        path = pathlib.Path(config.raw) / "ESConv.json"
        if not path.is_file():
            raise DataError(f"ESConv: {path} does not exist; --raw must be its folder")
        listed = read_json(path)
        if not isinstance(listed, list) or not listed:
            raise DataError(f"{path}: expected a list of dialogues")
        order = list(range(len(listed)))
        random.Random(SEED).shuffle(order)
        count = int(SHARE * len(order))
        split_of = dict.fromkeys(order, "train")
        split_of |= dict.fromkeys(order[:count], "val")
        split_of |= dict.fromkeys(order[count : 2 * count], "test")
        entries = [
            read_entry(e, f"{path} dialogue {i}", i, split_of[i]) for i, e in enumerate(listed)
        ]
        return Corpus(built_in("esconv"), tuple(entries), is_inferred=False)


def read_entry(value: dict, where: str, number: int, split: str) -> Entry:
    """Reads a dialogue. Raises DataError."""
    said = []
    try:
        for i, turn in enumerate(value["dialog"]):
            at, speaker = f"{where} utterance {i}", SPEAKERS[turn["speaker"]]
            given = {"strategy": turn["annotation"]["strategy"]} if speaker == THERAPIST else {}
            labels = built_in("esconv").labels_of(given, speaker, at)
            said.append(Utterance(speaker, " ".join(turn["content"].split()), labels))
        problem, situation = (" ".join(value[k].split()) for k in ("problem_type", "situation"))
    except ConfigError as error:
        raise DataError(str(error)) from error
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{where}: not in the format of ESConv.json: {type(error).__name__}: {error}"
        ) from error
    return Entry(Dialogue(f"esconv{number}", tuple(said), problem, situation), where, split)
