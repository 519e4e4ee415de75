"""Writes recordings as the content parts of a chat message, in the OpenAI protocol's form."""

from __future__ import annotations

import base64
import fractions
import io
import itertools
import wave
from collections.abc import Sequence

import av
import numpy as np
from PIL import Image

from mm_jax.data.fbank import SAMPLE_RATE
from mm_jax.data.recording import (
    AV_ERRORS,
    Clip,
    MediaError,
    VideoReader,
    open_container,
    track,
)
from mm_jax.data.sound import read_sound, read_sounds, sound_start

# FFmpeg's name of a container, and the codecs of pictures that go with it everywhere.
CONTAINERS = {
    "mov,mp4,m4a,3gp,3g2,mj2": ("video/mp4", ("h264",)),
    "matroska,webm": ("video/webm", ("vp8", "vp9", "av1")),
}
AT_ONCE = 100_000_000  # bytes of pictures that are decoded before they are encoded again
TICKS = fractions.Fraction(1, 90_000)
TOO_LARGE = "too large"


def data_url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def frame_parts(frames: np.ndarray) -> list[dict]:
    """Writes pictures uint8[F, S, S, 3] as PNG."""
    parts = []
    for picture in frames:
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "PNG")
        parts.append(
            {"type": "image_url", "image_url": {"url": data_url("image/png", file.getvalue())}}
        )
    return parts


def sound_part(clips: Sequence[Clip]) -> tuple[list[dict], list[str]]:
    """Writes the joined sound of clips as 16-bit WAV at 16 kHz; returns the part, if any clip has
    sound, and the reasons why others have none."""
    waves, _, reasons = read_sounds(clips)
    if not waves:
        return [], reasons or ["missing"]
    samples = np.clip(np.round(np.concatenate(waves) * 32768), -32768, 32767).astype("<i2")
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(SAMPLE_RATE)
        out.writeframes(samples.tobytes())
    data = base64.b64encode(file.getvalue()).decode()
    return [{"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}], reasons


def video_parts(clips: Sequence[Clip], limit: int) -> tuple[list[dict], list[str], bool]:
    """Writes each clip as a video with its sound: the file as it is, where every server reads its
    kind, and else encoded again as MP4.

    Returns the parts, the reasons why other clips have none, and whether any has sound. A clip of
    more than `limit` bytes is too large.
    """
    parts, reasons, heard = [], [], False
    for clip in clips:
        try:
            with open_container(clip.path) as container:
                sounds = len(container.streams.audio) > 0
            url = data_url(*whole_file(clip, limit) or ("video/mp4", encoded(clip, limit)))
        except MediaError as error:
            reasons.append(error.reason)
        except (*AV_ERRORS, OSError):
            reasons.append("cannot be read or encoded")
        else:
            parts.append({"type": "video_url", "video_url": {"url": url}})
            heard |= sounds
    return parts, reasons if clips else ["missing"], heard


def whole_file(clip: Clip, limit: int) -> tuple[str, bytes] | None:
    """Returns (kind, bytes) of a clip that is a whole file of a common kind, or None."""
    with open_container(clip.path) as container:
        kind, codecs = CONTAINERS.get(container.format.name, ("", ()))
        common = track(container, "video").codec_context.codec.canonical_name in codecs
    if not common or clip.start > 0 or clip.end is not None:
        return None
    if clip.path.stat().st_size > limit:
        raise MediaError(TOO_LARGE, str(clip.path))
    return kind, clip.path.read_bytes()


def encoded(clip: Clip, limit: int) -> bytes:
    """Encodes a clip as MP4: H.264 at its own size and times, and its sound as AAC."""
    reader, file = VideoReader(clip), io.BytesIO()
    with open_container(clip.path) as container:
        context = track(container, "video").codec_context
        at_once = max(1, AT_ONCE // max(1, 3 * context.width * context.height))
    try:
        sound = read_sound(clip)[0]
        late = max(0.0, sound_start(clip) - clip.start)
        sound = np.concatenate([np.zeros(round(late * SAMPLE_RATE), np.float32), sound])
    except MediaError:
        sound = None
    with av.open(file, "w", format="mp4") as out:
        video, audio, last = None, None, -1
        for start in range(0, len(reader.times), at_once):
            if file.tell() > limit:
                raise MediaError(TOO_LARGE, str(clip.path))
            times = reader.times[start : start + at_once]
            pictures = reader.decode(range(start, start + len(times)))
            if video is None:
                height, width = (max(2, side // 2 * 2) for side in pictures[0].shape[:2])
                video = out.add_stream("libx264", rate=25, options={"threads": "1", "crf": "18"})
                video.width, video.height, video.pix_fmt = width, height, "yuv420p"
                video.codec_context.time_base = TICKS
                if sound is not None:
                    audio = out.add_stream("aac", rate=SAMPLE_RATE, layout="mono")
            for time, picture in zip(times, pictures, strict=True):
                missing = [
                    (0, max(0, n - m))
                    for n, m in zip((height, width), picture.shape[:2], strict=True)
                ]
                picture = np.pad(picture, [*missing, (0, 0)], "edge")[:height, :width]
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
                last = max(last + 1, round(max(0.0, time - clip.start) / TICKS))
                frame.pts, frame.time_base = last, TICKS
                out.mux(video.encode(frame))
        out.mux(video.encode())
        for start in itertools.count(0, 1024) if audio else ():
            block = sound[None, start : start + 1024]
            if not block.size:
                out.mux(audio.encode())
                break
            frame = av.AudioFrame.from_ndarray(block, format="fltp", layout="mono")
            frame.sample_rate, frame.pts = SAMPLE_RATE, start
            out.mux(audio.encode(frame))
    if file.tell() > limit:
        raise MediaError(TOO_LARGE, str(clip.path))
    return file.getvalue()
