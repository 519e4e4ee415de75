"""Compiles what the first turns need, before anybody waits for them."""

from __future__ import annotations

import dataclasses

import numpy as np

from mm_jax.data.fbank import NUM_MEL_BINS
from mm_jax.data.media import MediaSpec
from mm_jax.data.records import CLIENT, Sample, Utterance
from mm_jax.generation.live import Live, Turn

SECONDS = 5  # of a clip, as people record


def warm(live: Live, spec: MediaSpec) -> None:
    """Answers made-up turns: with words, in a conversation, and with a clip in either; alone and
    many at once."""
    blank = Sample(id="warm", dialogue_id="warm", client_text="Hello.")
    frames = np.zeros((spec.num_frames, spec.image_size, spec.image_size, 3), np.uint8)
    bank = np.zeros((SECONDS * 96, NUM_MEL_BINS), np.float32)
    parts = live.predictor.prompter.parts
    samples = [blank]
    if "compressor" in parts or live.predictor.prompter.history != "memory":
        for words in ("Hello.", "And then? " * 20):  # a short line and a long one
            line = (Utterance(CLIENT, words),)
            samples.append(dataclasses.replace(blank, history=line))
    if "vision" in parts or "audio" in parts:
        clip = dict(frames=frames, fbank=bank, video_status="ok", audio_status="ok")
        samples += [dataclasses.replace(sample, **clip) for sample in samples[:2]]
    names = iter(range(-1, -1000, -1))  # never those of real turns
    most = live.engine.sizes[-1]
    for several in (*([sample] for sample in samples), samples[:1] * most, samples * most):
        answer(live, [Turn(next(names), sample, limit=8) for sample in several])


def answer(live: Live, turns: list[Turn]) -> None:
    for turn in turns:
        live.submit(turn)
    while not live.is_idle:
        live.step()
