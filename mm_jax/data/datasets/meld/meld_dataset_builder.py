"""Builds MELD with TFDS: emotion and sentiment of every utterance in scenes of Friends.

Raw files: {train,dev,test}_sent_emo.csv; clips dia{D}_utt{U}.mp4 in the folders of MELD.Raw. All
people are clients, and their names are a part of the text.
"""

from __future__ import annotations

import collections
import csv
import io
import pathlib

from mm_jax.config.errors import ConfigError, require
from mm_jax.config.files import read_text
from mm_jax.data.datasets.common import DataError
from mm_jax.data.datasets.corpus import Corpus, CorpusBuilder, Described, Entry
from mm_jax.data.labels import built_in
from mm_jax.data.media import media_files
from mm_jax.data.records import CLIENT, Dialogue, Utterance

FILES = {"train": "train_sent_emo.csv", "val": "dev_sent_emo.csv", "test": "test_sent_emo.csv"}
FOLDERS = {"train": "train_splits", "val": "dev_splits_complete"}
FOLDERS["test"] = "output_repeated_splits_test"
COLUMNS = ("Utterance", "Speaker", "Emotion", "Sentiment", "Dialogue_ID", "Utterance_ID")
EXPECTED = {"train": 9989, "val": 1109, "test": 2610}  # utterances
# Bytes of Windows' cp1252 that were once read as Latin-1: apostrophes, dashes, ellipses.
REPAIRED = {code: bytes([code]).decode("cp1252", "replace") for code in range(0x80, 0xA0)}


class Builder(CorpusBuilder):
    """MELD: the released train, dev and test."""

    clips_are = ", ".join(f"{folder}/dia0_utt0.mp4" for folder in FOLDERS.values())

    @classmethod
    def describe(cls, request):
        options = dict(check_counts=request.check_counts)
        return Described("", built_in("meld"), request.media, options)

    @staticmethod
    def read(config):
        root, media = pathlib.Path(config.raw), pathlib.Path(config.media)
        entries = []
        for split, name in FILES.items():
            clips = clips_of_split(media, split) if config.media else None
            entries += read_split(root / name, split, clips)
        count = collections.Counter(e.split for e in entries for _ in e.dialogue.utterances)
        require(
            count == EXPECTED or not config.options["check_counts"],
            f"MELD: expected {EXPECTED} utterances, got {dict(count)} (pass --no-check_counts to "
            "build a data set of another size on purpose)",
        )
        return Corpus(built_in("meld"), tuple(entries), is_inferred=False)


def clips_of_split(media: pathlib.Path, split: str) -> dict[str, str]:
    """Maps "dia0_utt0" to paths below `media`. Of two files of one utterance in test the one named
    final_videos_test... is whole; others begin with "._" and are no clips."""
    folder, found = media / FOLDERS[split], {}
    for name, path in sorted(media_files(folder).items()):  # "dia..." before "final_videos_..."
        found[name.removeprefix("final_videos_test")] = str(path.relative_to(media))
    return found


def read_split(path: pathlib.Path, split: str, clips: dict[str, str] | None) -> list[Entry]:
    """Reads a split's dialogues. Raises DataError naming the line."""
    if not path.is_file():
        raise DataError(f"MELD: {path} does not exist; --raw must be the folder of {path.name}")
    said: dict[str, list[Utterance]] = {}
    with io.StringIO(read_text(path), newline="") as file:
        reader = csv.DictReader(file)
        missing = [c for c in COLUMNS if c not in (reader.fieldnames or ())]
        if missing:
            raise DataError(f"{path}: missing columns {missing}; got {reader.fieldnames}")
        seen = set()
        for row in reader:
            where = f"{path} line {reader.line_num}"
            name = f"dia{row['Dialogue_ID']}_utt{row['Utterance_ID']}"
            if name in seen:
                raise DataError(f"{where}: {name} is listed twice")
            seen.add(name)
            text = (row["Utterance"] or "").translate(REPAIRED).strip()
            speaker = (row["Speaker"] or "").translate(REPAIRED).strip()
            given = {"emotion": row["Emotion"], "sentiment": row["Sentiment"]}
            try:
                labels = built_in("meld").labels_of(given, CLIENT, where)
            except ConfigError as error:
                raise DataError(str(error)) from error
            if len(labels) < len(given) or not text:
                raise DataError(f"{where}: expected Utterance, Emotion and Sentiment")
            clip = "" if clips is None else clips.get(name, f"{FOLDERS[split]}/{name}.mp4")
            utterance = Utterance(CLIENT, f"{speaker}: {text}", labels, media=clip)
            said.setdefault(row["Dialogue_ID"], []).append(utterance)
    return [
        Entry(Dialogue(f"{split}{number}", tuple(own)), f"{path} dialogue {number}", split)
        for number, own in said.items()
    ]
