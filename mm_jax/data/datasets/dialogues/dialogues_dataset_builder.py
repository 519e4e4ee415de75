"""Builds people's own dialogues or clips with TFDS, from the files that corpus.py reads."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Iterator, Sequence

from mm_jax.data.datasets import common
from mm_jax.data.datasets.dialogues.corpus import Entry, read_corpus, samples_of, split_entries
from mm_jax.data.labels import LabelSpace
from mm_jax.data.media import Clip, inside


class Builder(common.SampleBuilder):
    """Therapist turns, or single utterances of clients where only those have labels."""

    def splits(self):
        config = self.builder_config
        root, corpus = pathlib.Path(config.raw), read_corpus(pathlib.Path(config.raw))
        options = {name: config.options[name] for name in ("val_share", "fold", "seed")}
        lacking = "none given" if corpus.has_media else ""
        return {
            name: functools.partial(pending_samples, root, entries, corpus.space, lacking)
            for name, entries in split_entries(corpus, **options).items()
        }


def pending_samples(
    root: pathlib.Path, entries: Sequence[Entry], space: LabelSpace, lacking: str
) -> Iterator[common.Pending]:
    """Yields samples with the clips of the client's utterances that have one."""
    for entry in entries:
        for sample, said in samples_of(entry.dialogue, space):
            clips = tuple(
                Clip(inside(root, u.media), u.start, u.end or None) for u in said if u.media
            )
            yield common.Pending(sample, clips, status="" if clips else lacking)
