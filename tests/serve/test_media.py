"""Tests the process that decodes what strangers send."""

import asyncio
import io
import os
import signal
import time

import av
import numpy as np
import pytest
from PIL import Image

from mm_jax.data.media import Clip, MediaSpec, load_media
from mm_jax.data.recording import MediaError
from mm_jax.serve import media
from mm_jax.serve.media import ClipLimits, MediaDecoder, Upload

SPEC = MediaSpec(num_frames=4, image_size=32)


@pytest.fixture(scope="module")
def clip(synthetic):
    return next(synthetic.raw.rglob("*.mp4"))


def decoded(*requests, limits=ClipLimits(), count=1, before=lambda decoder: None, **settings):
    """Decodes requests one after the other; returns their results or reasons, and the restarts."""

    async def run():
        decoder, found = MediaDecoder(SPEC, limits, count), []
        try:
            for uploads in requests:
                before(decoder)
                try:
                    found.append(await decoder.decode(uploads, **settings))
                except MediaError as error:
                    found.append(error.reason)
        finally:
            decoder.stop()
        return found, decoder.restarts

    return asyncio.run(run())


def picture(width, height, kind="PNG"):
    file = io.BytesIO()
    Image.new("RGB", (width, height), (200, 10, 10)).save(file, kind)
    return file.getvalue()


def test_clips_are_decoded_as_files_are(clip):
    expected = load_media([Clip(clip)], SPEC)
    data = clip.read_bytes()
    ((arrays, statuses), (both, _), (heard, _)), _ = decoded(
        [Upload("video", data)],
        [Upload("image", picture(50, 40)), Upload("audio", data)],
        [Upload("audio", data), Upload("audio", data)],
    )
    np.testing.assert_array_equal(arrays["frames"], expected.frames)
    np.testing.assert_array_equal(arrays["fbank"], expected.fbank)
    assert statuses == {"video_status": "ok", "audio_status": "ok"}
    assert both["frames"].shape == (4, 32, 32, 3)
    assert (both["frames"][:, 16, 16] == (200, 10, 10)).all()
    np.testing.assert_array_equal(both["fbank"], expected.fbank)
    assert len(heard["fbank"]) >= 2 * len(expected.fbank)
    ((sound, _),), _ = decoded([Upload("video", data)], sound=True)
    assert sound["sound"].dtype == np.float32
    assert len(sound["sound"]) > 16_000


def test_limits_and_damage_are_reasons_not_ends(clip, tmp_path):
    data = clip.read_bytes()
    secret = tmp_path / "secret.mp4"
    secret.write_bytes(data)
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{secret}\n".encode()
    listing = f"ffconcat version 1.0\nfile '{secret}'\n".encode()
    reasons, restarts = decoded(
        [Upload("video", playlist)],
        [Upload("video", listing)],
        [Upload("video", b"nonsense")],
        [Upload("video", data[: len(data) // 3])],
        [Upload("image", b"nonsense")],
        [Upload("image", picture(3000, 2000))],
        [Upload("image", picture(400_000, 2))],  # a square of its side would be enormous
        [Upload("image", picture(40, 40)[:60])],
        [Upload("video", picture(3000, 2000, "JPEG"))],
        [Upload("audio", b"")],
        limits=ClipLimits(pixels=2_000_000),
    )
    assert reasons[:3] == ["corrupt"] * 3
    assert reasons[4:] == [
        "not a picture", "too many pixels", "takes too much memory", "corrupt", "too many pixels",
        "empty file",
    ]  # fmt: skip
    assert restarts == 1  # after the one without memory
    (reason,), _ = decoded([Upload("video", data)], limits=ClipLimits(seconds=0.5))
    assert reason == "too long"
    # Together, too; and whatever a header says.
    with av.open(str(clip)) as container:
        seconds = container.duration / av.time_base
    limits = ClipLimits(seconds=1.5 * seconds)
    (one, two, forged), _ = decoded(
        [Upload("video", data)],
        [Upload("video", data)] * 2,
        [Upload("audio", forged_flac(tmp_path / "long.flac", 3 * seconds))],
        limits=limits,
    )
    assert one[1]["video_status"] == "ok"
    assert (two, forged) == ("too long", "too long")


def forged_flac(path, seconds):
    """Returns a FLAC file whose header says that it has a hundredth of its samples."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream("flac", rate=16_000, layout="mono")
        for start in range(0, round(seconds * 16_000), 1600):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1600), np.int16), "s16", "mono")
            frame.sample_rate, frame.pts = 16_000, start
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    data = bytearray(path.read_bytes())
    at = 8 + 13  # in STREAMINFO: 36 bits
    data[at] &= 0xF0
    data[at + 1 : at + 5] = (160).to_bytes(4, "big")
    return bytes(data)


def test_a_worker_that_hangs_or_dies_is_replaced(clip, monkeypatch):
    data = clip.read_bytes()

    def kill(decoder):
        os.kill(decoder.free._queue[0].process.pid, signal.SIGKILL)
        time.sleep(0.1)

    found, restarts = decoded([Upload("video", data)], [Upload("video", data)], before=kill)
    assert [statuses["video_status"] for _, statuses in found] == ["ok", "ok"]
    assert restarts == 2
    # One that another signal ended had its reason.
    end = lambda decoder: os.kill(decoder.free._queue[0].process.pid, signal.SIGSEGV)  # noqa: E731
    (reason,), restarts = decoded([Upload("video", data)], before=end)
    assert (reason, restarts) == ("corrupt", 1)
    monkeypatch.setattr(media, "PATIENCE", 0.5)
    stop = lambda decoder: os.kill(decoder.free._queue[0].process.pid, signal.SIGSTOP)  # noqa: E731
    began = time.monotonic()
    (reason,), restarts = decoded([Upload("video", data)], before=stop)
    assert (reason, restarts) == ("takes too long to decode", 1)
    assert time.monotonic() - began < 5


def test_the_worker_writes_nothing_and_knows_no_keys(clip, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    seen = {}

    def look(decoder):
        worker = decoder.free._queue[0]
        worker.ask({"kinds": [], "sound": False, "spec": {}, "seconds": 1, "pixels": 1}, [])
        path = f"/proc/{worker.process.pid}"
        seen["environment"] = open(f"{path}/environ").read()
        seen["limits"] = open(f"{path}/limits").read()

    decoded([Upload("video", clip.read_bytes())], before=look)
    assert "secret" not in seen["environment"]
    sizes = {line[:26].strip(): line[26:].split()[:1] for line in seen["limits"].splitlines()}
    assert sizes["Max file size"] == ["0"]
    assert sizes["Max address space"] != ["unlimited"]
