"""Reads the sound of a recording on its clock (see recording.py), whatever its rates on the way."""

from __future__ import annotations

import functools
import itertools
import pathlib
from collections.abc import Iterator, Sequence

import av
import numpy as np

from mm_jax.data.fbank import SAMPLE_RATE
from mm_jax.data.recording import (
    AV_ERRORS,
    SEEK_EARLIER,
    TOGETHER,
    Clip,
    Clock,
    MediaError,
    decoded,
    is_broadcast,
    open_container,
    packets_of,
    steady,
    track,
    zero_of,
)
from mm_jax.data.resampling import resample

PREROLL = 0.5  # seconds: what sound decoders need before their output is right
RATES = (1_000, 768_000)  # Hz; only damaged headers go beyond


def _mono(frame: av.AudioFrame) -> np.ndarray:
    """Returns float32[samples] in [-1, 1]: the mean of the channels."""
    data = frame.to_ndarray()
    if not frame.format.is_planar:
        data = data.reshape(-1, frame.layout.nb_channels).T
    if data.dtype == np.uint8:
        data = (data.astype(np.float32) - 128) / 128
    elif data.dtype.kind == "i":
        data = data.astype(np.float32) / -float(np.iinfo(data.dtype).min)
    return data.mean(axis=0, dtype=np.float32)


@functools.lru_cache(maxsize=8)
def _steady_sound(path: pathlib.Path, size: int, modified: int) -> bool:
    with open_container(path) as container:
        stream = track(container, "audio")
        stamps = [float(p.dts * p.time_base) for p in packets_of(container, stream) if p.dts]
        return steady(stamps, is_broadcast(container))


def _blocks(path: pathlib.Path, at: float | None) -> Iterator[tuple[float, int, np.ndarray, bool]]:
    """Decodes sound from about `at` seconds on (None: from the start of the file).

    Yields (seconds, rate in Hz, float32[samples], damaged before it).
    """
    with open_container(path) as container:
        stream = track(container, "audio")
        stream.thread_type = "NONE"
        clock, zero = Clock(is_broadcast(container)), zero_of(container, stream)
        if at is not None:
            container.seek(round((at + zero) / stream.time_base), stream=stream)
        damaged = False
        for packet in packets_of(container, stream):
            frames, bad = decoded(packet)
            # The first packet after a seek may begin within a block of sound.
            damaged |= bad and (at is None or clock.next is not None)
            for frame in frames:
                if not RATES[0] <= frame.sample_rate <= RATES[1]:
                    raise MediaError("corrupt", f"{path}: sound of {frame.sample_rate} Hz")
                stamp = None if frame.time is None else frame.time - zero
                time = clock.time(stamp, frame.samples / frame.sample_rate)
                yield time, frame.sample_rate, _mono(frame), damaged
                damaged = False


def _blocks_from(clip: Clip) -> Iterator[tuple[float, int, np.ndarray, bool]]:
    """Decodes sound that begins at or before the clip does, by a seek that came out early."""
    path = clip.path
    if clip.start > PREROLL and path.is_file():
        stat = path.stat()
        if _steady_sound(path, stat.st_size, stat.st_mtime_ns):
            for earlier in SEEK_EARLIER:
                at = clip.start - PREROLL - earlier
                blocks = _blocks(path, at) if at > 0 else iter(())
                first = next(blocks, None)
                if first is not None and first[0] <= clip.start:
                    return itertools.chain([first], blocks)
    return _blocks(clip.path, None)


def sound_start(clip: Clip) -> float:
    """Returns when the sound of a clip begins, in seconds of its file, as `read_sound` reads it: at
    the clip's start, or later. Raises MediaError."""
    try:
        first = next(_blocks_from(clip), None)
    except AV_ERRORS as error:
        raise MediaError("corrupt", f"{clip.path}: {error}") from error
    if first is None:
        raise MediaError("no sound", str(clip.path))
    return max(first[0], clip.start)


def read_sound(clip: Clip) -> tuple[np.ndarray, bool]:
    """Decodes the sound of a clip.

    Returns float32[samples], mono 16 kHz in [-1, 1], and whether the file is damaged. Rate and
    channels may change on the way. Gaps between sounds are silence, so that times are kept. Raises
    MediaError.
    """
    pieces: list[np.ndarray] = []
    run: list[np.ndarray] = []  # blocks of one rate that follow each other
    begin, rate, damaged = 0.0, SAMPLE_RATE, False

    def place(at):
        """Resamples the run and pads to `at`, where the next one begins."""
        if run:
            pieces.append(resample(np.concatenate(run), rate))
            run.clear()
        if pieces:
            missing = round((at - begin) * SAMPLE_RATE) - sum(map(len, pieces))
            pieces.append(np.zeros(max(0, missing), np.float32))

    end = np.inf if clip.end is None else clip.end
    expected = None
    try:
        for time, block_rate, block, bad in _blocks_from(clip):
            damaged |= bad
            if expected is None:
                begin = expected = time
            # Times of single blocks are less exact than the number of samples so far.
            gap = time - expected > TOGETHER
            expected = time if gap else expected
            if expected >= end:
                break
            if gap or block_rate != rate:
                place(expected)
            rate = block_rate
            run.append(block)
            expected += len(block) / block_rate
    except MediaError:
        raise
    except AV_ERRORS as error:
        if not (pieces or run):
            raise MediaError("corrupt", f"{clip.path}: {error}") from error
        damaged = True
    if not (pieces or run):
        reason = "outside the recording" if clip.start > 0 else "no sound"
        raise MediaError("corrupt" if damaged else reason, str(clip.path))
    if run:
        place(begin)  # no silence after the last sound
    wave = np.concatenate(pieces)
    first = max(0, round((clip.start - begin) * SAMPLE_RATE))
    wave = wave[first:] if clip.end is None else wave[first : round((end - begin) * SAMPLE_RATE)]
    if len(wave) == 0:
        raise MediaError("outside the recording", f"{clip.path} from {clip.start} s")
    return wave, damaged


def read_sounds(clips: Sequence[Clip]) -> tuple[list[np.ndarray], list[Clip], list[str]]:
    """Decodes the sound of several clips.

    Returns the sounds, the clips they are of, and the reasons why others have none; "damaged" is
    the reason of those that are whole but for some part.
    """
    sounds, heard, reasons = [], [], []
    for clip in clips:
        try:
            wave, damaged = read_sound(clip)
        except MediaError as error:
            reasons.append(error.reason)
        else:
            sounds.append(wave)
            heard.append(clip)
            reasons += ["damaged"] * damaged
    return sounds, heard, reasons
