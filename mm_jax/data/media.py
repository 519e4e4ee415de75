"""Decodes video and audio files to frames and filter banks, in memory, with PyAV and numpy.

A clip is decoded by seeking to the key frames before the sampled frames; only the sampled frames
are converted to RGB. Several clips (the utterances of one turn) form one timeline.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import pathlib
from collections.abc import Sequence

import av
import numpy as np
from PIL import Image, UnidentifiedImageError

from mm_jax.config.errors import UserError
from mm_jax.data import fbank as fbank_lib
from mm_jax.data.fbank import MIN_SAMPLES, PATCH_FRAMES, SAMPLE_RATE

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".m4a", ".aac")
VIDEO_SUFFIXES = (".mp4", ".mkv", ".mov", ".avi", ".webm", ".m4v", ".mpg", ".ts")
PAD_COLOUR = 127  # SigLIP's mean colour, int(0.5 * 255)
AV_ERRORS = (av.FFmpegError, OSError, ValueError, EOFError)


class MediaError(UserError, ValueError):
    """Reports a clip that cannot be used; `reason` is short, so that it can be counted."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}{': ' if detail else ''}{detail}")
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class Clip:
    """A file, or its seconds [start, end); `end` None means to the end of the file."""

    path: pathlib.Path
    start: float = 0.0
    end: float | None = None


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
    square = Image.fromarray(pad_to_square(image))
    return np.asarray(square.resize((size, size), Image.Resampling.BICUBIC))


def open_container(path: pathlib.Path):
    """Opens a media file. Raises MediaError if it is missing, empty or corrupt."""
    if not path.is_file():
        raise MediaError("missing", str(path))
    if path.stat().st_size == 0:
        raise MediaError("empty file", str(path))
    try:
        return av.open(str(path))
    except AV_ERRORS as error:
        raise MediaError("corrupt", f"{path}: {error}") from error


@dataclasses.dataclass(frozen=True)
class VideoIndex:
    """The presentation times in seconds of all frames and of the key frames, both ascending."""

    times: tuple[float, ...]
    keys: tuple[float, ...]
    frame_seconds: float


@functools.lru_cache(maxsize=8)
def _video_index(path: pathlib.Path, size: int, modified: int) -> VideoIndex:
    with open_container(path) as container:
        if not container.streams.video:
            raise MediaError("no video stream", str(path))
        stream = container.streams.video[0]
        base = float(stream.time_base)
        try:
            packets = [(p.pts, p.is_keyframe) for p in container.demux(stream) if p.pts is not None]
        except AV_ERRORS as error:
            raise MediaError("corrupt", f"{path}: {error}") from error
        rate = float(stream.average_rate or stream.guessed_rate or 25)
    if not packets:
        raise MediaError("corrupt", f"{path}: no frames")
    packets.sort()
    times = tuple(pts * base for pts, _ in packets)
    return VideoIndex(times, tuple(pts * base for pts, key in packets if key), 1 / rate)


def video_index(path: pathlib.Path) -> VideoIndex:
    """Reads the frame times of a file from its packets, without decoding. Raises MediaError.

    Results of recent files are cached, so that many cuts of one episode read it once.
    """
    if not path.is_file():
        raise MediaError("missing", str(path))
    stat = path.stat()
    return _video_index(path, stat.st_size, stat.st_mtime_ns)


class _VideoClip:
    """Finds the frame times of a clip, and decodes some of its frames in ascending order."""

    def __init__(self, clip: Clip):
        self.path = clip.path
        self.index = video_index(clip.path)
        self.half = self.index.frame_seconds / 2
        times = self.index.times
        start = clip.start if clip.start > 0 else times[0]
        end = times[-1] + 2 * self.half if clip.end is None else clip.end
        if start >= times[-1] + 2 * self.half:
            raise MediaError("outside the recording", f"{clip.path} from {clip.start} s")
        first = bisect.bisect_left(times, start - self.half)
        stop = bisect.bisect_left(times, end - self.half)
        # A cut shorter than one frame gets the frame that is on screen at its start.
        self.times = times[first:stop] or times[max(0, first - 1) :][:1]

    def decode(self, indices: Sequence[int]) -> list[np.ndarray]:
        """Decodes the RGB frames uint8[h, w, 3] at ascending `indices` (repeats allowed)."""
        keys, out = self.index.keys, []
        times = [self.times[i] for i in indices]
        wanted = set(times)
        with open_container(self.path) as container:
            stream = container.streams.video[0]
            stream.thread_type = "NONE"
            base = float(stream.time_base)

            def decoded():
                for packet in container.demux(stream):
                    # Frames that no other frame refers to are decoded only if they are wanted.
                    shown = packet.pts is None or packet.pts * base in wanted
                    stream.codec_context.skip_frame = "DEFAULT" if shown else "NONREF"
                    yield from packet.decode()

            latest, image, now = None, None, -np.inf
            frames = decoded()
            for t in times:
                key = bisect.bisect_right(keys, t + 1e-6) - 1
                if key > 0 and keys[key] > now + self.half:
                    container.seek(round(keys[key] / stream.time_base), stream=stream)
                    frames = decoded()
                try:
                    while now < t - self.half:
                        latest, image = next(frames), None
                        now = latest.time if latest.time is not None else t
                except (StopIteration, *AV_ERRORS) as error:
                    if latest is None:
                        raise MediaError("corrupt", f"{self.path}: {error}") from error
                    frames = iter(())  # the file ends early: repeat its last good frame
                if image is None:
                    image = latest.to_ndarray(format="rgb24")
                out.append(image)
        return out


def decode_video(clips: Sequence[Clip], spec: MediaSpec) -> tuple[np.ndarray, list[str]]:
    """Samples frames uint8[F, S, S, 3] uniformly from clips; also lists the reasons of bad clips.

    Raises MediaError if no clip can be used.
    """
    good, errors = [], []
    for clip in clips:
        try:
            good.append(_VideoClip(clip))
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
            except (MediaError, *AV_ERRORS):
                bad = i
                break
        if bad is None:
            return np.stack(frames), errors
        del good[bad]
        errors.append("corrupt")
    raise MediaError(errors[0] if errors else "missing")


def decode_waveform(clip: Clip) -> np.ndarray:
    """Decodes the sound of a clip as float32[samples], mono 16 kHz in [-1, 1]."""
    if clip.path.suffix.lower() in (".wav", ".flac", ".ogg") and clip.path.is_file():
        return _load_audio_file(clip)
    pieces = []
    with open_container(clip.path) as container:
        if not container.streams.audio:
            raise MediaError("no audio stream", str(clip.path))
        stream = container.streams.audio[0]
        stream.thread_type = "NONE"
        resampler = av.AudioResampler(format="flt", layout="mono", rate=SAMPLE_RATE)
        first = None
        try:
            if clip.start > 0:
                container.seek(int(clip.start / stream.time_base), stream=stream)
            for frame in container.decode(stream):
                if first is None:
                    first = frame.time or 0.0
                if clip.end is not None and (frame.time or 0.0) >= clip.end:
                    break
                pieces += [f.to_ndarray()[0] for f in resampler.resample(frame)]
        except AV_ERRORS as error:
            if not pieces:
                raise MediaError("corrupt", f"{clip.path}: {error}") from error
        pieces += [f.to_ndarray()[0] for f in resampler.resample(None)] if pieces else []
    if not pieces:
        raise MediaError("no sound", str(clip.path))
    wave = np.concatenate(pieces)
    if clip.start > 0 or clip.end is not None:
        begin = round(max(0.0, clip.start - first) * SAMPLE_RATE) if clip.start > 0 else 0
        stop = None
        if clip.end is not None:
            stop = begin + round((clip.end - max(clip.start, 0.0)) * SAMPLE_RATE)
        wave = wave[begin:stop]
    if len(wave) == 0:
        raise MediaError("outside the recording", f"{clip.path} from {clip.start} s")
    return wave


def _load_audio_file(clip: Clip) -> np.ndarray:
    import librosa  # slow to import; only audio files need it

    if clip.path.stat().st_size == 0:
        raise MediaError("empty file", str(clip.path))
    length = None if clip.end is None else clip.end - clip.start
    try:
        wave, _ = librosa.load(
            clip.path, sr=SAMPLE_RATE, mono=True, offset=clip.start, duration=length
        )
    except Exception as error:  # librosa passes on the error types of its back ends
        raise MediaError("corrupt", f"{clip.path}: {error}") from error
    if len(wave) == 0:
        raise MediaError("no sound", str(clip.path))
    return wave.astype(np.float32)


def decode_audio(clips: Sequence[Clip], spec: MediaSpec) -> tuple[np.ndarray, list[str]]:
    """Computes the raw fbank float32[A, 128] of joined clips; also lists the reasons of bad clips.

    In mode "whole", A is cut down to whole BEATs patches of 16 frames. Raises MediaError if no clip
    has sound, or if the sound is shorter than one patch (0.175 s).
    """
    waves, errors = [], []
    for clip in clips:
        try:
            waves.append(decode_waveform(clip))
        except MediaError as error:
            errors.append(error.reason)
    if not waves:
        raise MediaError(errors[0] if errors else "missing")
    wave = np.concatenate(waves)
    of_video = clips[0].path.suffix.lower() not in AUDIO_SUFFIXES
    return waveform_fbank(wave, spec, of_video), errors


def waveform_fbank(wave: np.ndarray, spec: MediaSpec, of_video: bool) -> np.ndarray:
    """Computes the raw fbank float32[A, 128] of float32[samples] at 16 kHz by `spec.audio_mode`."""
    if spec.audio_mode == "released":
        return fbank_lib.fbank(fbank_lib.released_waveform(wave, of_video))
    if len(wave) < MIN_SAMPLES:
        raise MediaError("too short", f"{len(wave) / SAMPLE_RATE:.3f} s, one patch is 0.175 s")
    if len(wave) > spec.max_audio_seconds * SAMPLE_RATE:
        wave = fbank_lib.take_clips(wave, max(1, int(spec.max_audio_seconds // 2)))
    bank = fbank_lib.fbank(wave)
    return bank[: len(bank) // PATCH_FRAMES * PATCH_FRAMES]


def load_media(
    clips: Sequence[Clip], spec: MediaSpec, video: bool = True, audio: bool = True
) -> Media:
    """Decodes what it can of `clips`; never raises for a bad file.

    Each modality is returned whole, or with length 0 and the reason in its status.
    """
    frames = np.zeros((0, spec.image_size, spec.image_size, 3), np.uint8)
    bank = np.zeros((0, fbank_lib.NUM_MEL_BINS), np.float32)
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


def load_images(paths: Sequence[pathlib.Path], spec: MediaSpec) -> Media:
    """Samples frames from image files in order, without sound; never raises for a bad file."""
    index = uniform_frame_indices(spec.num_frames, len(paths))
    frames, status = np.zeros((0, spec.image_size, spec.image_size, 3), np.uint8), "ok"
    try:
        images = [np.asarray(Image.open(paths[i]).convert("RGB")) for i in index]
        frames = np.stack([prepare_frame(image, spec.image_size) for image in images])
    except (OSError, UnidentifiedImageError):
        status = "corrupt"
    bank = np.zeros((0, fbank_lib.NUM_MEL_BINS), np.float32)
    return Media(frames, bank, status, "no audio stream", ())
