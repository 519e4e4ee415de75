"""Times decoding a clip's sampled frames and filter bank against a recipe with ffmpeg.

    taskset -c 0 python tools/bench_media.py [--clip FILE] [--runs 7]

Both make 8 frames (padded to a square, 384 px bicubic) and the fbank of the clip's sound. The peer
is the recipe of the emotional-AI repositories: `ffmpeg` concatenates the clips of a turn into a
temporary file, all its frames are decoded, and a second `ffmpeg` writes a wav that is read back. It
needs `ffmpeg` on the path. Runs are interleaved; medians and their ratio are printed. Without
--clip, a 10 s 640x360 clip is made.
"""

from __future__ import annotations

import argparse
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import wave

import av
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from mm_jax.data import media, recording
from mm_jax.data.media import Clip, MediaSpec

SPEC = MediaSpec(num_frames=8, image_size=384)


def make_clip(path: pathlib.Path, seconds: int = 10, fps: int = 25) -> None:
    """Writes a moving gradient with noise, H.264 with default key frames, and a 16 kHz tone."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 40, (360, 640, 3))
    base = np.linspace(0, 200, 640)[None, :, None] + np.zeros((360, 640, 3))
    with av.open(str(path), "w") as container:
        video = container.add_stream("h264", rate=fps)
        video.width, video.height, video.pix_fmt = 640, 360, "yuv420p"
        audio = container.add_stream("aac", rate=16000, layout="mono")
        for i in range(seconds * fps):
            image = np.roll(base, 7 * i, axis=1) + np.roll(noise, 3 * i, axis=0)
            frame = av.VideoFrame.from_ndarray(image.astype(np.uint8), format="rgb24")
            container.mux(video.encode(frame))
        container.mux(video.encode())
        tone = np.sin(np.arange(seconds * 16000) * 0.1).astype(np.float32) * 0.3
        for start in range(0, len(tone), 1024):
            frame = av.AudioFrame.from_ndarray(
                tone[None, start : start + 1024], format="fltp", layout="mono"
            )
            frame.sample_rate, frame.pts = 16000, start
            container.mux(audio.encode(frame))
        container.mux(audio.encode())


def ours(clip: pathlib.Path):
    recording._video_index.cache_clear()
    got = media.load_media([Clip(clip)], SPEC)
    return got.frames, got.fbank


def recipe(clip: pathlib.Path):
    """Runs the peer: ffmpeg concat, full decoding, ffmpeg to wav, reading it back."""
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        (folder / "list.txt").write_text(f"file '{clip}'\n")
        joined, sound = folder / "joined.mp4", folder / "sound.wav"
        quiet = ["ffmpeg", "-y", "-loglevel", "error", "-threads", "1"]
        copy = ["-f", "concat", "-safe", "0", "-i", folder / "list.txt", "-c", "copy", joined]
        subprocess.run([*quiet, *copy], check=True)
        with av.open(str(joined)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "NONE"
            frames = [f.to_ndarray(format="rgb24") for f in container.decode(stream)]
        index = media.uniform_frame_indices(SPEC.num_frames, len(frames))
        pictures = np.stack([media.prepare_frame(frames[i], SPEC.image_size) for i in index])
        subprocess.run([*quiet, "-i", joined, "-ar", "16000", "-ac", "1", sound], check=True)
        with wave.open(str(sound)) as file:
            pcm = np.frombuffer(file.readframes(file.getnframes()), np.int16)
        return pictures, media.waveform_fbank(pcm / np.float32(32768), SPEC, of_video=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clip", type=pathlib.Path, help="a video file (default: one is made)")
    parser.add_argument("--runs", type=int, default=7)
    args = parser.parse_args()
    if shutil.which("ffmpeg") is None:
        parser.error("the peer needs ffmpeg on the path")
    with tempfile.TemporaryDirectory() as folder:
        clip = args.clip and args.clip.resolve()
        if clip is None:
            clip = pathlib.Path(folder) / "clip.mp4"
            make_clip(clip)
        a, b = ours(clip), recipe(clip)
        np.testing.assert_array_equal(a[0], b[0])  # the same frames
        assert abs(len(a[1]) - len(b[1])) <= 16, (a[1].shape, b[1].shape)
        times = {"mm_jax": [], "ffmpeg recipe": []}
        for _ in range(args.runs):
            for name, run in (("mm_jax", ours), ("ffmpeg recipe", recipe)):
                start = time.perf_counter()
                run(clip)
                times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(t) for name, t in times.items()}
    for name, value in medians.items():
        print(f"{name:<14} {1e3 * value:7.1f} ms (min {1e3 * min(times[name]):.1f})")
    print(f"ratio          {medians['ffmpeg recipe'] / medians['mm_jax']:7.2f}x")


if __name__ == "__main__":
    main()
