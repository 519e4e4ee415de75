"""Decodes clips that strangers sent, in a process that may do nothing else (see media.py).

It is started with a socket as standard input. A request is a line of JSON with the clips as open
files; the answer is a line of JSON and the bytes of the arrays. It opens no other file, writes
none, and has a limit on its memory.
"""

from __future__ import annotations

import gc
import json
import os
import pathlib
import resource
import socket
import sys
from collections.abc import Sequence

import av
import numpy as np
from PIL import Image, ImageOps

from mm_jax.data.media import MediaSpec, load_media, prepare_frame, uniform_frame_indices
from mm_jax.data.recording import AV_ERRORS, Clip, MediaError, open_container, packets_of
from mm_jax.data.resampling import resample
from mm_jax.data.speech import sound_of

MEMORY = 3 << 30  # bytes of addresses
TOO_MUCH_MEMORY = "takes too much memory"
MOST_FILES = 64
PICTURES = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


def main() -> None:
    resample(np.zeros(2048, np.float32), 44_100)  # imports what else the first clip would wait for
    with socket.socket(fileno=sys.stdin.fileno()) as connection:
        limit(resource.RLIMIT_AS, MEMORY)
        limit(resource.RLIMIT_FSIZE, 0)
        limit(resource.RLIMIT_CORE, 0)
        limit(resource.RLIMIT_NOFILE, MOST_FILES + 32)
        while True:
            header, files, _, _ = socket.recv_fds(connection, 1 << 16, MOST_FILES)
            if not header:  # the server has gone
                return
            asked = json.loads(header)
            try:
                arrays, told = work(asked, [pathlib.Path(f"/proc/self/fd/{n}") for n in files])
            except MediaError as error:
                arrays, told = {}, {"error": error.reason}
            except MemoryError:
                arrays, told = {}, {"error": TOO_MUCH_MEMORY}
            except (*AV_ERRORS, Image.DecompressionBombError, SyntaxError):
                arrays, told = {}, {"error": "corrupt"}
            finally:
                for n in files:
                    os.close(n)
            kinds = {name: (a.dtype.str, a.shape) for name, a in arrays.items()}
            connection.sendall(json.dumps({**told, "arrays": kinds}).encode() + b"\n")
            for a in arrays.values():
                connection.sendall(np.ascontiguousarray(a).tobytes())
            del arrays
            gc.collect()  # decoders keep their threads, with stacks, until they are collected


def limit(kind: int, most: int) -> None:
    resource.setrlimit(kind, (most, most))


def work(asked: dict, paths: Sequence[pathlib.Path]) -> tuple[dict[str, np.ndarray], dict]:
    """Returns arrays and statuses. Raises MediaError."""
    own = {kind: [] for kind in ("video", "audio", "image")}
    left = asked["seconds"]
    for kind, path in zip(asked["kinds"], paths, strict=True):
        own[kind].append(path)
        if kind != "image":
            left -= checked(path, left, asked["pixels"])
    if asked["sound"]:
        return {"sound": sound_of(clips(own["audio"] or own["video"]))}, {}
    spec = MediaSpec(**asked["spec"])
    arrays, told = {}, {"video_status": "not requested", "audio_status": "not requested"}
    if own["video"]:
        media = load_media(clips(own["video"]), spec)
        if media.video_status != "ok":
            raise MediaError(media.video_status)
        arrays["frames"], told["video_status"] = media.frames, "ok"
        arrays["fbank"], told["audio_status"] = media.fbank, media.audio_status
    if own["image"]:
        arrays["frames"], told["video_status"] = frames(own["image"], spec, asked["pixels"]), "ok"
    if own["audio"]:
        media = load_media(clips(own["audio"]), spec, video=False)
        if media.audio_status != "ok":
            raise MediaError(media.audio_status)
        arrays["fbank"], told["audio_status"] = media.fbank, "ok"
    return arrays, told


def clips(paths: Sequence[pathlib.Path]) -> list[Clip]:
    return [Clip(path) for path in paths]


def checked(path: pathlib.Path, seconds: float, pixels: int) -> float:
    """Returns the seconds of a clip. Raises MediaError for one beyond the limits, before any of it
    is decoded."""
    with open_container(path) as container:
        for stream in container.streams.video:
            context = stream.codec_context
            if context is not None and context.width * context.height > pixels:
                raise MediaError("too many pixels")
        if (container.duration or 0) / av.time_base > seconds:
            raise MediaError("too long")
        # What a header says of the length need not be so, and what is recorded live says nothing.
        streams = [s for s in container.streams if s.type in ("video", "audio")]
        first, most = {}, 0.0
        for packet in packets_of(container, streams):
            if packet.pts is not None:
                at = float(packet.pts * packet.time_base)
                most = max(most, at - first.setdefault(packet.stream.index, at))
                if most > seconds:
                    raise MediaError("too long")
        return most


def frames(paths: Sequence[pathlib.Path], spec: MediaSpec, pixels: int) -> np.ndarray:
    """Reads pictures as those of a clip, uint8[F, S, S, 3]. Raises MediaError."""
    found = []
    for i in uniform_frame_indices(spec.num_frames, len(paths)):
        with open(paths[i], "rb") as file:
            try:
                image = Image.open(file, formats=PICTURES)
            except (OSError, ValueError) as error:
                raise MediaError("not a picture") from error
            if image.width * image.height > pixels:
                raise MediaError("too many pixels")
            picture = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        found.append(prepare_frame(picture, spec.image_size))
    return np.stack(found)


if __name__ == "__main__":
    main()
