"""Writes small media files and raw data sets for the tests."""

import av
import numpy as np
from PIL import Image


def write_video(path, frames=20, fps=10, codec="h264", sound=1.0, size=64, gop=None):
    """Writes a clip whose frame i has brightness 8 * i, with a 440 Hz tone of `sound` seconds."""
    with av.open(str(path), "w") as container:
        video = container.add_stream(codec, rate=fps)
        video.width = video.height = size
        video.pix_fmt = "yuv420p"
        if gop:
            video.options = {"g": str(gop)}
        audio = container.add_stream("aac", rate=16000, layout="mono") if sound else None
        for i in range(frames):
            image = np.full((size, size, 3), min(255, 8 * i), np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(video.encode())
        if audio:
            tone = np.sin(2 * np.pi * 440 * np.arange(int(sound * 16000)) / 16000) * 0.5
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
