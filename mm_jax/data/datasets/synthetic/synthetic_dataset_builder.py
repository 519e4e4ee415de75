"""Builds the synthetic data set with TFDS: writes raw clips, then reads them like real ones."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterator

from mm_jax.data.datasets import common
from mm_jax.data.datasets.schema import MESC_UTTERANCE_COLUMNS, read_stored_labels
from mm_jax.data.datasets.synthetic.generator import write_raw
from mm_jax.data.media import Clip
from mm_jax.data.records import Dialogue, Utterance, dialogue_samples, merge_turns

SPLIT_SHARES = {"train": 0.7, "val": 0.15, "test": 0.15}


def read_dialogues(root: pathlib.Path) -> list[tuple[Dialogue, dict[int, str]]]:
    """Lists (dialogue, {utterance index: cue}) of a raw folder."""
    out = []
    for entry in json.loads((root / "dialogues.json").read_text()):
        cues = {int(k): v for k, v in entry.pop("cues").items()}
        utterances = []
        for said in entry.pop("utterances"):
            columns = {c: said.pop(c) for c in MESC_UTTERANCE_COLUMNS}
            labels = read_stored_labels(MESC_UTTERANCE_COLUMNS, columns, said["speaker"])
            utterances.append(Utterance(**said, labels=labels))
        out.append((Dialogue(utterances=tuple(utterances), **entry), cues))
    return out


class Builder(common.SampleBuilder):
    """Splits dialogues 70 / 15 / 15 into train, val and test; client utterances have clips."""

    def splits(self):
        config = self.builder_config
        root = pathlib.Path(config.raw)
        if not (root / "dialogues.json").is_file():
            write_raw(root, config.options["size"], config.options["seed"])
        dialogues = read_dialogues(root)
        splits, start = {}, 0
        for name, share in SPLIT_SHARES.items():
            stop = len(dialogues) if name == "test" else start + round(share * len(dialogues))
            part = dialogues[start:stop]
            splits[name] = functools.partial(pending_samples, root, part)
            start = stop
        return splits


def pending_samples(
    root: pathlib.Path, dialogues: list[tuple[Dialogue, dict[int, str]]]
) -> Iterator[common.Pending]:
    for dialogue, cues in dialogues:
        spans = merge_turns(dialogue.utterances)
        for sample in dialogue_samples(dialogue):
            span = spans[sample.turn - 1]
            names = [f"{dialogue.id}_{i}.mp4" for i in range(span.first, span.last + 1)]
            yield common.Pending(
                dataclasses.replace(sample, cue=cues[span.last]),
                clips=tuple(Clip(root / "clips" / name) for name in names),
            )
