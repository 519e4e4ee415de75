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
from mm_jax.data.recording import Clip, MediaError, VideoReader, open_container, track
from mm_jax.data.sound import read_sound

# FFmpeg's name of a container, and the codecs of pictures that go with it everywhere.
CONTAINERS = {
    "mov,mp4,m4a,3gp,3g2,mj2": ("video/mp4", ("h264",)),
    "matroska,webm": ("video/webm", ("vp8", "vp9", "av1")),
}
AT_ONCE = 32  # pictures that are decoded before they are encoded again
TICKS = fractions.Fraction(1, 1000)


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


def sound_part(clips: Sequence[Clip]) -> dict:
    """Writes the joined sound of clips as 16-bit WAV at 16 kHz; those without sound are left out.
    Raises MediaError if none has any."""
    waves, errors = [], []
    for clip in clips:
        try:
            waves.append(read_sound(clip)[0])
        except MediaError as error:
            errors.append(error)
    if not waves:
        raise errors[0] if errors else MediaError("missing")
    samples = np.clip(np.round(np.concatenate(waves) * 32768), -32768, 32767).astype("<i2")
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(SAMPLE_RATE)
        out.writeframes(samples.tobytes())
    data = base64.b64encode(file.getvalue()).decode()
    return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}


def video_parts(clips: Sequence[Clip]) -> list[dict]:
    """Writes each clip as a video with its sound: the file as it is, where every server reads its
    kind, and else encoded again as MP4. Raises MediaError if none can be read."""
    parts, errors = [], []
    for clip in clips:
        try:
            url = data_url(*whole_file(clip) or ("video/mp4", encoded(clip)))
            parts.append({"type": "video_url", "video_url": {"url": url}})
        except MediaError as error:
            errors.append(error)
    if not parts:
        raise errors[0] if errors else MediaError("missing")
    return parts


def whole_file(clip: Clip) -> tuple[str, bytes] | None:
    """Returns (kind, bytes) of a clip that is a whole file of a common kind, or None."""
    with open_container(clip.path) as container:
        kind, codecs = CONTAINERS.get(container.format.name, ("", ()))
        common = track(container, "video").codec_context.name.removeprefix("lib") in codecs
    if not common or clip.start > 0 or clip.end is not None:
        return None
    return kind, clip.path.read_bytes()


def encoded(clip: Clip) -> bytes:
    """Encodes a clip as MP4: H.264 at its own size and times, and its sound as AAC."""
    reader, file = VideoReader(clip), io.BytesIO()
    try:
        sound = read_sound(clip)[0]
    except MediaError:
        sound = None
    with av.open(file, "w", format="mp4") as out:
        video = audio = None
        for start in range(0, len(reader.times), AT_ONCE):
            times = reader.times[start : start + AT_ONCE]
            pictures = reader.decode(range(start, start + len(times)))
            if video is None:
                height, width = (side // 2 * 2 for side in pictures[0].shape[:2])
                video = out.add_stream("libx264", rate=25, options={"threads": "1", "crf": "18"})
                video.width, video.height, video.pix_fmt = width, height, "yuv420p"
                video.codec_context.time_base = TICKS
                if sound is not None:
                    audio = out.add_stream("aac", rate=SAMPLE_RATE, layout="mono")
            for time, picture in zip(times, pictures, strict=True):
                frame = av.VideoFrame.from_ndarray(
                    np.ascontiguousarray(picture[:height, :width]), format="rgb24"
                )
                frame.pts = round(max(0.0, time - reader.times[0]) / TICKS)
                frame.time_base = TICKS
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
    return file.getvalue()
