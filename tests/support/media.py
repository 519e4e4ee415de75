"""Writes small media files and raw data sets for the tests."""

import fractions
import struct

import av
import numpy as np
from PIL import Image


def write_video(
    path, frames=20, fps=10, codec="h264", sound=1.0, size=64, gop=None, volume=0.5, picture=None
):
    """Writes a clip whose frame i has brightness 8 * i or is `picture(i)`, with a 440 Hz tone of
    `sound` seconds."""
    with av.open(str(path), "w") as container:
        video = container.add_stream(codec, rate=fps)
        video.width = video.height = size
        video.pix_fmt = "yuv420p"
        if gop:
            video.options = {"g": str(gop)}
        audio = container.add_stream("aac", rate=16000, layout="mono") if sound else None
        for i in range(frames):
            image = np.full((size, size, 3), min(255, 8 * i), np.uint8)
            image = image if picture is None else picture(i).astype(np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(video.encode())
        if audio:
            tone = np.sin(2 * np.pi * 440 * np.arange(int(sound * 16000)) / 16000) * volume
            for start in range(0, len(tone), 1024):
                piece = tone[None, start : start + 1024].astype(np.float32)
                frame = av.AudioFrame.from_ndarray(piece, format="fltp", layout="mono")
                frame.sample_rate, frame.pts = 16000, start
                container.mux(audio.encode(frame))
            container.mux(audio.encode())
    return path


def write_tree(root, spelling="{}(single-labeled)", fold=1):
    """Writes 20 train clips of two labels and 3 test clips: a video, a folder of frames, and one
    that is missing."""
    for split, names in (("train", range(1, 21)), ("test", range(21, 24))):
        folder = root / "EmoLabel_DataSplit" / spelling.format(split)
        folder.mkdir(parents=True)
        lines = [f"{n},{1 + n % 2}" for n in names]
        (folder / f"set_{fold}.csv").write_text("video_name,label\n" + "\n".join(lines) + "\n")
    (root / "Clip" / "original" / "part").mkdir(parents=True)
    write_video(root / "Clip" / "original" / "part" / "00021.mp4")
    frames = root / "Clip" / "clip_224x224_16f" / "00022"
    frames.mkdir(parents=True)
    for i in range(1, 12):
        Image.fromarray(np.full((24, 24, 3), 20 * i, np.uint8)).save(frames / f"{i}.jpg")
    return root


NUMBER_BITS = 12


def numbered(i):
    """Draws a picture 96 x 64 whose 12 blocks of 16 x 16 are the bits of `i`, above a mark that
    tells which way is up: the lower third is half grey, half white."""
    image = np.zeros((64, 96, 3), np.uint8)
    for bit in range(NUMBER_BITS):
        row, column = divmod(bit, 6)
        image[16 * row : 16 * row + 16, 16 * column : 16 * column + 16] = 255 * (i >> bit & 1)
    image[32:, :48], image[32:, 48:] = 128, 255
    return image


def number_of(image):
    """Reads the number of a picture that `numbered` drew."""
    blocks = [divmod(bit, 6) for bit in range(NUMBER_BITS)]
    return sum(
        (int(image[16 * r + 4 : 16 * r + 12, 16 * c + 4 : 16 * c + 12].mean() > 128)) << bit
        for bit, (r, c) in enumerate(blocks)
    )


def write_sound(container, stream, tone, rate, start=0.0):
    """Encodes float32[channels, samples] as the stream wants it, from `start` seconds on."""
    context = stream.codec_context
    resampler = av.AudioResampler(
        format=context.format or "fltp",
        layout=context.layout,
        rate=context.sample_rate,
        frame_size=context.frame_size or 1024,
    )
    layout = "mono" if len(tone) == 1 else "stereo"
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(tone), "fltp", layout)
    frame.sample_rate, frame.time_base = rate, fractions.Fraction(1, rate)
    frame.pts = round(start * rate)
    for piece in [*resampler.resample(frame), *resampler.resample(None)]:
        container.mux(stream.encode(piece))
    container.mux(stream.encode(None))


def tone_of(seconds, rate=44100, hz=440.0, channels=1):
    """Returns float32[channels, samples]."""
    wave = 0.4 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)
    return np.repeat(wave.astype(np.float32)[None], channels, axis=0)


def write_recording(
    path,
    frames=50,
    fps=25,
    codec="libx264",
    container=None,
    times=None,
    start=0.0,
    gop=12,
    bframes=None,
    sounds=(),
    ratio=None,
):
    """Writes numbered pictures, and one track for each (codec, tone, rate, disposition) of sounds.

    times: seconds of each picture, if not i / fps; start: where the file's clock begins; ratio:
    the pixels' aspect ratio.
    """
    with av.open(str(path), "w", format=container) as out:
        video = out.add_stream(codec, rate=fps)
        video.width, video.height, video.pix_fmt = 96, 64, "yuv420p"
        if codec == "mjpeg":
            video.pix_fmt = "yuvj420p"
        context = video.codec_context
        context.gop_size = gop
        exact = times is not None or (start * fps) % 1 > 0
        if exact:
            context.time_base = fractions.Fraction(1, 1000)
        if bframes is not None:
            context.max_b_frames = bframes
        if ratio is not None:
            context.sample_aspect_ratio = ratio
        tracks = []
        for name, tone, rate, disposition in sounds:
            track = out.add_stream(name, rate=rate)
            track.layout = "mono" if len(tone) == 1 else "stereo"
            track.disposition = disposition
            tracks.append(track)
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(numbered(i), format="rgb24")
            seconds = (i / fps if times is None else times[i]) + start
            base = 1000 if exact else fps
            frame.pts, frame.time_base = round(seconds * base), fractions.Fraction(1, base)
            out.mux(video.encode(frame.reformat(format=video.pix_fmt)))
        out.mux(video.encode(None))
        for track, (_, tone, rate, _) in zip(tracks, sounds, strict=True):
            write_sound(out, track, tone, rate, start)
    return path


def turn(source, target, a, b, c, d):
    """Copies an mp4 with the display matrix of its first track set, as phones do."""
    data = bytearray(source.read_bytes())
    header = data.find(b"tkhd")
    at = header + 8 + (32 if data[header + 4] else 20) + 16
    matrix = (a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    data[at : at + 36] = struct.pack(">9i", *matrix)
    target.write_bytes(data)
    return target
