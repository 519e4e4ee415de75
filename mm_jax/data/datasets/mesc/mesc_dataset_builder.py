"""Builds MESC with TFDS: the text always, media if the user has the videos."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Iterator

from mm_jax.data.datasets import common
from mm_jax.data.datasets.mesc import reader
from mm_jax.data.media import VIDEO_SUFFIXES, Clip, MediaError, inside
from mm_jax.data.records import Dialogue, dialogue_samples, merge_turns


def turn_clips(root: pathlib.Path, dialogue: Dialogue, turn: int) -> list[Clip]:
    """Lists a turn's clips: `{Dialogue_ID}_{Utterance_ID}.mp4`, or cuts of `S{season}E{episode}.*`.

    Raises MediaError for a name that leads out of the media root.
    """
    span = merge_turns(dialogue.utterances)[turn]
    clips = []
    for i in range(span.first, span.last + 1):
        clip = inside(root, f"{dialogue.id}_{i}.mp4")
        utterance = dialogue.utterances[i]
        if not clip.is_file():
            for suffix in VIDEO_SUFFIXES:
                episode = inside(root, utterance.media + suffix)
                if episode.is_file():
                    clips.append(Clip(episode, utterance.start, utterance.end))
                    break
            else:
                clips.append(Clip(clip))  # does not exist, and is counted as missing
        else:
            clips.append(Clip(clip))
    return clips


class Builder(common.SampleBuilder):
    """MESC: 3,721 train / 445 val / 454 test therapist turns."""

    def splits(self):
        config = self.builder_config
        splits = reader.read_splits(pathlib.Path(config.raw), clues=config.options["clues"])
        if config.options["check_counts"]:
            reader.check_counts(splits)
        return {
            name: functools.partial(pending_samples, dialogues, config.media)
            for name, dialogues in splits.items()
        }


def pending_samples(dialogues: list[Dialogue], media: str) -> Iterator[common.Pending]:
    """Yields samples with the clips of their client turns; `media` "" means text only."""
    for dialogue in dialogues:
        for sample in dialogue_samples(dialogue):
            if not media:
                yield common.Pending(sample)
                continue
            try:
                clips = turn_clips(pathlib.Path(media), dialogue, sample.turn - 1)
            except MediaError as error:
                yield common.Pending(sample, status=error.reason)
            else:
                yield common.Pending(sample, clips=tuple(clips))
