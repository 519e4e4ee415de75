"""Makes sampled frames and filter banks of video and audio files, in memory.

Several clips (the utterances of one turn) form one timeline. recording.py and sound.py read files.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np

from mm_jax.data.fbank import (
    MIN_SAMPLES,
    NUM_MEL_BINS,
    PATCH_FRAMES,
    SAMPLE_RATE,
    fbank,
    released_waveform,
    take_clips,
)
from mm_jax.data.recording import (
    AV_ERRORS,
    VIDEO_SUFFIXES,
    Clip,
    MediaError,
    VideoReader,
    has_video,
)
from mm_jax.data.resampling import resize
from mm_jax.data.sound import read_sounds

PAD_COLOUR = 127  # SigLIP's mean colour, int(0.5 * 255)


@dataclasses.dataclass(frozen=True)
class MediaSpec:
    """Specifies how media become arrays.

    num_frames: frames per sample; image_size: their side in pixels. audio_mode: "whole" takes the
    sound once (above `max_audio_seconds`, evenly spread 2 s clips of that total length); "released"
    does what the released code does (8 clips of 2 s, padded to 30 s).
    """

    num_frames: int = 8
    image_size: int = 384
    max_audio_seconds: float = 30.0
    audio_mode: str = "whole"

    def __post_init__(self):
        if self.audio_mode not in ("whole", "released"):
            raise ValueError(
                f"media audio_mode: expected 'whole' or 'released', got {self.audio_mode!r}"
            )
        if self.num_frames < 1 or self.image_size < 1:
            raise ValueError("media num_frames and image_size must be at least 1")


@dataclasses.dataclass(frozen=True)
class Media:
    """Decoded media: frames uint8[F, S, S, 3], raw fbank float32[A, 128]; length 0 if absent."""

    frames: np.ndarray
    fbank: np.ndarray
    video_status: str
    audio_status: str
    clip_errors: tuple[str, ...] = ()


def inside(root: pathlib.Path, name: str) -> pathlib.Path:
    """Returns `root / name`. Raises MediaError for names that lead out of the media root."""
    path = pathlib.PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or pathlib.PureWindowsPath(name).drive:
        raise MediaError("outside the media root", name)
    return root / path


def media_files(
    root: pathlib.Path, pattern: str = "*", suffixes: Sequence[str] = VIDEO_SUFFIXES
) -> dict[str, pathlib.Path]:
    """Maps the names, without suffix, of files under `root` to their paths.

    Suffixes count in any case. Of two files of one name the suffix that is listed first wins.
    """
    found = [p for p in sorted(root.glob(pattern)) if p.suffix.lower() in suffixes]
    found.sort(key=lambda p: suffixes.index(p.suffix.lower()), reverse=True)
    return {p.stem: p for p in found if not p.name.startswith("._")}  # macOS' shadow files


def uniform_frame_indices(num_frames: int, count: int) -> np.ndarray:
    """Returns int64[num_frames]: centres of equal segments of `count` frames (spec section 3)."""
    size = (count - 1) / num_frames
    centres = (np.arange(num_frames) + 0.5) * size
    return np.round(centres + 1e-6).astype(np.int64)


def fps_frame_indices(fps: int, count: int, per_second: int = 1) -> np.ndarray:
    """Returns int64[n]: the middle frame of every `1 / per_second` s (the released `fps` mode)."""
    step = min(fps // per_second, count)
    return np.arange(step // 2, count, step, dtype=np.int64)


def pad_to_square(image: np.ndarray, colour: int = PAD_COLOUR) -> np.ndarray:
    """Pads uint8[h, w, 3] to a square, with the picture in the middle (rounding down)."""
    h, w = image.shape[:2]
    side = max(h, w)
    out = np.full((side, side, 3), colour, np.uint8)
    top, left = (side - h) // 2, (side - w) // 2
    out[top : top + h, left : left + w] = image
    return out


def prepare_frame(image: np.ndarray, size: int) -> np.ndarray:
    """Pads uint8[h, w, 3] to a square and resizes it to `size` (Pillow's bicubic)."""
    return resize(pad_to_square(image), size, size)


def decode_video(clips: Sequence[Clip], spec: MediaSpec) -> tuple[np.ndarray, list[str]]:
    """Samples frames uint8[F, S, S, 3] uniformly from clips; also lists the reasons of bad clips.

    Raises MediaError if no clip can be used.
    """
    good, errors = [], []
    for clip in clips:
        try:
            good.append(VideoReader(clip))
        except MediaError as error:
            errors.append(error.reason)
    while good:
        counts = [len(clip.times) for clip in good]
        ends = np.cumsum(counts)
        indices = uniform_frame_indices(spec.num_frames, int(ends[-1]))
        owner = np.searchsorted(ends, indices, side="right")
        frames, bad = [], None
        for i, clip in enumerate(good):
            local = indices[owner == i] - (ends[i] - counts[i])
            if len(local) == 0:
                continue
            try:
                frames += [prepare_frame(f, spec.image_size) for f in clip.decode(local)]
            except AV_ERRORS:
                bad = i
                break
        if bad is None:
            return np.stack(frames), errors + ["damaged" for clip in good if clip.damaged]
        del good[bad]
        errors.append("corrupt")
    raise MediaError(errors[0] if errors else "missing")


def decode_audio(clips: Sequence[Clip], spec: MediaSpec) -> tuple[np.ndarray, list[str]]:
    """Computes the raw fbank float32[A, 128] of joined clips; also lists the reasons of bad clips.

    In mode "whole", A is cut down to whole BEATs patches of 16 frames. Raises MediaError if no clip
    has sound, or if the sound is shorter than one patch (0.175 s).
    """
    waves, heard, errors = read_sounds(clips)
    if not waves:
        raise MediaError(errors[0] if errors else "missing")
    wave = np.concatenate(waves)
    of_video = spec.audio_mode == "released" and has_video(heard[0].path)
    return waveform_fbank(wave, spec, of_video), errors


def waveform_fbank(wave: np.ndarray, spec: MediaSpec, of_video: bool) -> np.ndarray:
    """Computes the raw fbank float32[A, 128] of float32[samples] at 16 kHz by `spec.audio_mode`."""
    if spec.audio_mode == "released":
        return fbank(released_waveform(wave, of_video))
    if len(wave) < MIN_SAMPLES:
        raise MediaError("too short", f"{len(wave) / SAMPLE_RATE:.3f} s, one patch is 0.175 s")
    if len(wave) > spec.max_audio_seconds * SAMPLE_RATE:
        wave = take_clips(wave, max(1, int(spec.max_audio_seconds // 2)))
    bank = fbank(wave)
    return bank[: len(bank) // PATCH_FRAMES * PATCH_FRAMES]


def load_media(
    clips: Sequence[Clip], spec: MediaSpec, video: bool = True, audio: bool = True
) -> Media:
    """Decodes what it can of `clips`; never raises for a bad file.

    Each modality is returned whole, or with length 0 and the reason in its status.
    """
    frames = np.zeros((0, spec.image_size, spec.image_size, 3), np.uint8)
    bank = np.zeros((0, NUM_MEL_BINS), np.float32)
    video_status = audio_status = "not requested"
    clip_errors: list[str] = []
    if video:
        try:
            frames, errors = decode_video(clips, spec)
            video_status = "ok"
            clip_errors += [f"video: {e}" for e in errors]
        except MediaError as error:
            video_status = error.reason
    if audio:
        try:
            bank, errors = decode_audio(clips, spec)
            audio_status = "ok"
            clip_errors += [f"audio: {e}" for e in errors]
        except MediaError as error:
            audio_status = error.reason
    return Media(frames, bank, video_status, audio_status, tuple(clip_errors))
