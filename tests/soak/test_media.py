"""Reads a thousand damaged clips and three hundred odd but whole ones (four minutes)."""

import collections
import json
import random
import subprocess
import sys

import av
import numpy as np
import pytest

from mm_jax.data.recording import Clip, VideoReader
from mm_jax.data.sound import read_sound
from tests.conftest import ROOT
from tests.support.media import number_of, tone_of, write_recording

pytestmark = pytest.mark.slow

DEFAULT = av.stream.Disposition.default
# suffix -> (container, picture codecs, sound codec)
KINDS = {
    "mp4": ("mp4", ("libx264", "libx265", "mpeg4"), "aac"),
    "mov": ("mov", ("libx264", "libx265", "mjpeg"), "aac"),
    "mkv": ("matroska", ("libx264", "libx265", "mpeg4", "libvpx"), "aac"),
    "webm": ("webm", ("libvpx", "libvpx-vp9"), "libopus"),
    "avi": ("avi", ("mpeg4", "libx264"), "mp3"),
    "ts": ("mpegts", ("libx264", "mpeg2video", "libx265"), "aac"),
    "mpg": ("mpeg", ("mpeg2video", "mpeg1video"), "mp2"),
    "3gp": ("3gp", ("libx264", "mpeg4"), "aac"),
}
STATUSES = {"ok", "corrupt", "empty file", "no video stream", "no audio stream", "no sound"}
STATUSES |= {"outside the recording", "too short"}


def write(folder, suffix, dice, name):
    """Writes a clip of random kind; returns (path, seconds of every picture)."""
    container, codecs, sound = KINDS[suffix]
    codec, frames = dice.choice(codecs), dice.randrange(30, 160)
    fps = 25 if codec.startswith("mpeg") else dice.choice([10, 15, 24, 25, 30, 60])
    rate = 48000 if sound in ("libopus", "mp2") else dice.choice([44100, 48000])
    options = {"gop": dice.choice([1, 5, 12, 50, 250])}
    start = 0.0
    if suffix in ("ts", "mpg") and dice.random() < 0.5:
        start = dice.choice([0.48, 12.0, 3000.0])
    if codec in ("libx264", "libx265", "mpeg4", "mpeg2video"):
        options["bframes"] = dice.choice([0, 1, 2])
    times = None
    if codec in ("libx264", "libx265") and suffix in ("mp4", "mkv", "mov") and dice.random() < 0.4:
        steps = [dice.choice([0.02, 0.04, 0.1, 0.5]) for _ in range(frames)]
        times = list(np.cumsum([0.0, *steps[1:]]).round(3))
    length = frames / fps if times is None else times[-1]
    channels = dice.choice([1, 2])
    tone = tone_of(length, rate, 440.0, channels)
    path = folder / f"{name}.{suffix}"
    write_recording(
        path, frames, fps, codec, container, times, start, sounds=[(sound, tone, rate, DEFAULT)],
        **options,
    )  # fmt: skip
    return path, codec, times or [i / fps for i in range(frames)]


def full_decode(path):
    """Lists (seconds from the first picture, number) of all pictures, by plain decoding."""
    found = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        for frame in container.decode(stream):
            time = frame.time
            if path.suffix == ".avi":  # it has no presentation times, but those of decoding
                last = found[-1][0] + 1 / float(stream.average_rate) if found else 0.0
                time = last if frame.dts is None else float(frame.dts * stream.time_base)
            found.append((time, number_of(frame.to_ndarray(format="rgb24"))))
    return [(t - found[0][0], number) for t, number in found]


def test_whole_clips_give_what_a_full_decode_gives(tmp_path):
    dice, wrong, places = random.Random(0), [], 0
    for i in range(300):
        path, codec, _ = write(tmp_path, dice.choice(list(KINDS)), dice, i)
        known = full_decode(path)
        times = [t for t, _ in known]
        whole = VideoReader(Clip(path))
        index = sorted(dice.sample(range(len(whole.times)), 5))
        got = [number_of(p) for p in whole.decode(index)]
        offset = whole.times[0]  # where sound begins before the picture
        if got != [known[j][1] for j in index]:
            wrong.append((path.name, codec, "whole", index, got))
        for _ in range(6):
            at = dice.uniform(0, times[-1])
            on_screen = known[int(np.searchsorted(times, at + 1e-3, side="right")) - 1][1]
            cut = Clip(path, at + offset, at + offset + 1e-3)
            (number,) = (number_of(p) for p in VideoReader(cut).decode([0]))
            places += 1
            # Between two pictures a rounded time may fall to either.
            near = min(abs(at + 1e-3 - t) for t in times) < 2.1e-3
            if number != on_screen and not (near and abs(number - on_screen) == 1):
                wrong.append((path.name, codec, at, number, on_screen))
        start = dice.uniform(0, times[-1] * 0.6)
        sound, damaged = read_sound(Clip(path, start, start + 0.3))
        if damaged or abs(len(sound) - 4800) > 1:
            wrong.append((path.name, codec, "sound", start, len(sound), damaged))
        path.unlink()
    print(f"300 clips, {places} places, {len(wrong)} wrong")
    assert not wrong, wrong[:10]


def damage(data, how, dice):
    data = bytearray(data)
    if how == "cut":
        return data[: dice.randrange(1, len(data))]
    if how == "head":
        return data[dice.randrange(1, len(data) // 2) :]
    if how == "header":
        for _ in range(dice.randrange(1, 30)):
            data[dice.randrange(min(600, len(data)))] = dice.randrange(256)
    elif how == "bytes":
        for _ in range(dice.randrange(1, 200)):
            data[dice.randrange(len(data))] = dice.randrange(256)
    elif how == "hole":
        at = dice.randrange(len(data))
        length = min(dice.randrange(1, 5000), len(data) - at)
        data[at : at + length] = bytes(length)
    elif how == "twice":
        at = dice.randrange(len(data))
        data[at:at] = data[dice.randrange(len(data)) :]
    return data


def test_damaged_clips_never_crash_or_hang(tmp_path):
    dice = random.Random(1)
    sources = [write(tmp_path, suffix, dice, f"s{n}")[0] for suffix in KINDS for n in range(4)]
    names = []
    for i in range(1000):
        source = dice.choice(sources)
        how = dice.choice(["cut", "head", "header", "bytes", "hole", "twice"])
        path = tmp_path / f"{i}_{how}{source.suffix}"
        path.write_bytes(damage(source.read_bytes(), how, dice))
        names.append(str(path))
    counts, slowest = collections.Counter(), 0.0
    for at in range(0, len(names), 50):
        listing = tmp_path / "list.txt"
        listing.write_text("\n".join(names[at : at + 50]))
        command = [sys.executable, "-m", "tests.soak.read_clips", str(listing)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        last = rows[-1]["name"] if rows else names[at]
        assert done.returncode == 0, (last, done.stderr[-2000:])
        assert len(rows) == 2 * len(names[at : at + 50])
        for row in rows:
            assert {row["video"], row["audio"]} <= STATUSES, row
            counts[row["video"], row["audio"]] += 1
            slowest = max(slowest, row["seconds"])
    print(f"1000 damaged clips, slowest {slowest:.1f} s: {dict(counts)}")
    assert slowest < 60
    assert counts["ok", "ok"] > 100
    assert sum(n for (video, _), n in counts.items() if video == "corrupt") > 100
