"""Reads a person's own conversation: earlier utterances, and the turn that is to be answered."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Iterable, Sequence

import numpy as np

from mm_jax.config.errors import ConfigError, require
from mm_jax.config.files import parse_json, well_formed
from mm_jax.data.fbank import SAMPLE_RATE
from mm_jax.data.labels import LabelSpace
from mm_jax.data.media import (
    Clip,
    MediaSpec,
    load_media,
    prepare_frame,
    uniform_frame_indices,
    waveform_fbank,
)
from mm_jax.data.recording import MediaError
from mm_jax.data.records import CLIENT, THERAPIST, Sample, Utterance, merge_turns
from mm_jax.data.resampling import resample

SPEAKERS = {"client": CLIENT, "therapist": THERAPIST}
_SPEAKER = re.compile(r"\s*(\w+)\s*:(.*)", re.DOTALL)


def parse_history(text: str, space: LabelSpace) -> tuple[Utterance, ...]:
    """Reads utterances from lines "Client: ..." (which may be wrapped), or from a JSON list of
    {"speaker", "text"} with labels (see `LabelSpace.labels_of`). Raises ConfigError naming the
    entry."""
    if text.lstrip()[:1] not in ("[", "{"):
        return utterances_of(_line_entries(text), space)
    try:
        found = parse_json(text)
    except ValueError as error:
        raise ConfigError(f"not JSON: {error}") from error
    require(isinstance(found, list), f"expected a JSON list, got {type(found).__name__}")
    return history_of(found, space)


def history_of(entries: Sequence[dict], space: LabelSpace) -> tuple[Utterance, ...]:
    """Reads utterances from {"speaker", "text"} each, with labels. Raises ConfigError naming the
    entry."""
    for i, entry in enumerate(entries):
        require(
            isinstance(entry, dict) and {"speaker", "text"} <= set(entry),
            f"entry {i}: expected an object with speaker and text, got {entry!r:.60}",
        )
    return utterances_of(((f"entry {i}", e) for i, e in enumerate(entries)), space)


def utterances_of(entries: Iterable[tuple[str, dict]], space: LabelSpace) -> tuple[Utterance, ...]:
    """Reads utterances from (where, entry) pairs, and numbers their turns."""
    utterances = []
    for where, entry in entries:
        for name in ("speaker", "text"):
            value = entry.get(name)
            require(isinstance(value, str), f"{where}: {name}: expected text, got {value!r}")
        speaker = SPEAKERS.get(entry["speaker"].strip().lower())
        require(
            speaker is not None,
            f"{where}: speaker: expected Client or Therapist, got {entry['speaker']!r}",
        )
        labels = space.labels_of(entry, speaker, where)
        utterances.append(Utterance(speaker, well_formed(entry["text"].strip()), labels))
    return tuple(
        dataclasses.replace(utterances[i], turn=turn)
        for turn, span in enumerate(merge_turns(utterances))
        for i in range(span.first, span.last + 1)
    )


def _line_entries(text: str) -> list[tuple[str, dict]]:
    entries: list[tuple[str, dict]] = []
    for number, line in enumerate(text.split("\n"), 1):
        match = _SPEAKER.match(line)
        if match:
            entries.append((f"line {number}", {"speaker": match[1], "text": match[2]}))
        elif line.strip():
            require(
                bool(entries),
                f"line {number}: expected 'Client: ...' or 'Therapist: ...', got {line[:60]!r}",
            )
            entries[-1][1]["text"] += " " + line.strip()
    return entries


Recording = str | pathlib.Path | np.ndarray


def own_sample(
    spec: MediaSpec,
    text: str = "",
    video: Recording | None = None,
    audio: Recording | None = None,
    history: tuple[Utterance, ...] = (),
    problem: str = "",
    situation: str = "",
    sampling_rate: int = SAMPLE_RATE,
) -> Sample:
    """Builds the sample of a client turn, without targets.

    video: a file, whose sound is used too, or its pictures uint8[n, h, w, 3]. audio: a file, or
    float[samples] in [-1, 1] at `sampling_rate` Hz. Raises ConfigError for what cannot be used.
    """
    require(
        bool(text) or video is not None or audio is not None,
        "expected at least one of text, video and audio",
    )
    sample = Sample(
        id="own",
        dialogue_id="own",
        client_text=well_formed(text),
        problem_type=well_formed(problem),
        situation=well_formed(situation),
        history=history,
    )
    if isinstance(video, np.ndarray):
        require(
            video.dtype == np.uint8 and video.ndim == 4 and video.shape[-1] == 3 and video.size > 0,
            f"video: expected pictures uint8[n, h, w, 3], got {video.dtype}{list(video.shape)}",
        )
        chosen = video[uniform_frame_indices(spec.num_frames, len(video))]
        frames = np.stack([prepare_frame(image, spec.image_size) for image in chosen])
        sample = dataclasses.replace(sample, frames=frames, video_status="ok")
    elif video is not None:
        media = load_media([Clip(pathlib.Path(video))], spec)
        check_readable("video", video, media.video_status)
        fields = ("frames", "fbank", "video_status", "audio_status")
        sample = dataclasses.replace(sample, **{f: getattr(media, f) for f in fields})
    if isinstance(audio, np.ndarray):
        require(
            audio.dtype.kind == "f" and audio.ndim == 1,
            f"audio: expected float[samples] of one channel, got {audio.dtype}{list(audio.shape)}",
        )
        wave = resample(audio.astype(np.float32), sampling_rate)
        try:
            bank = waveform_fbank(wave, spec, of_video=False)
        except MediaError as error:
            raise ConfigError(f"audio: {error}") from error
        sample = dataclasses.replace(sample, fbank=bank, audio_status="ok")
    elif audio is not None:
        media = load_media([Clip(pathlib.Path(audio))], spec, video=False)
        check_readable("audio", audio, media.audio_status)
        sample = dataclasses.replace(sample, fbank=media.fbank, audio_status="ok")
    return sample


def check_readable(kind: str, path: str | pathlib.Path, status: str) -> None:
    """Raises ConfigError for a file that could not be used, with what to do about it."""
    say = {
        "missing": "no such file",
        "empty file": "the file is empty",
        "corrupt": f"not a {kind} file that FFmpeg can decode, or damaged",
        "no video stream": "it has no moving pictures; pass a sound file as audio",
        "no audio stream": "it has no sound",
        "too short": "its sound is shorter than 0.175 s",
    }
    require(status == "ok", f"{kind} {path}: {say.get(status, status)}")
