"""TFDS builder of MESC: text always, media where the user has the videos."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Iterator

from mm_jax.data.datasets import common
from mm_jax.data.datasets.mesc import reader
from mm_jax.data.media import VIDEO_SUFFIXES, Clip, MediaError, inside
from mm_jax.data.records import Dialogue, Sample, dialogue_samples, merge_turns


def turn_clips(root: pathlib.Path, dialogue: Dialogue, turn: int) -> list[Clip]:
    """The clips of a turn: `{Dialogue_ID}_{Utterance_ID}.mp4`, or cuts of `S{season}E{episode}.*`.

    Raises MediaError where a name would leave the media root.
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
                clips.append(Clip(clip))  # counted as missing
        else:
            clips.append(Clip(clip))
    return clips


class Builder(common.SampleBuilder):
    """MESC: 3,721 train / 445 val / 454 test therapist turns."""

    def splits(self, counters):
        config = self.builder_config
        raw = pathlib.Path(config.raw)
        splits = reader.read_splits(raw, clues=config.options["clues"])
        if config.options["check_counts"]:
            reader.check_counts(splits)
        return {
            name: functools.partial(self._samples, dialogues, counters[name])
            for name, dialogues in splits.items()
        }

    def _samples(self, dialogues: list[Dialogue], counter: common.MediaCounter) -> Iterator[Sample]:
        config = self.builder_config
        for dialogue in dialogues:
            for sample in dialogue_samples(dialogue):
                if not config.media:
                    yield sample
                    continue
                try:
                    clips = turn_clips(pathlib.Path(config.media), dialogue, sample.turn - 1)
                except MediaError as error:
                    status = dict(video_status=error.reason, audio_status=error.reason)
                    yield counter.record(dataclasses.replace(sample, **status))
                    continue
                yield counter.attach(sample, clips, config.spec)
