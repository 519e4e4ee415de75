import pathlib
import wave
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from mm_jax.data import fbank, images, media
from mm_jax.data.media import Clip, MediaSpec, load_media
from mm_jax.data.recording import VideoReader
from tests.conftest import ROOT
from tests.support.media import write_video

SPEC = MediaSpec(num_frames=4, image_size=32)
REAL = ROOT.parent / "shared" / "data" / "media"


def brightness(frames):
    return [round(float(f.mean()) / 8) for f in frames]


@pytest.mark.parametrize("gop", [None, 4])
def test_seeking_finds_the_frames_a_full_decode_finds(tmp_path, gop):
    path = write_video(tmp_path / "a.mp4", frames=30, gop=gop)
    with av.open(str(path)) as container:
        every = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    index = media.uniform_frame_indices(8, len(every))
    clip = VideoReader(Clip(path))
    for got, i in zip(clip.decode(index), index, strict=True):
        np.testing.assert_array_equal(got, every[i])


def test_several_clips_are_one_time_line(tmp_path):
    a = write_video(tmp_path / "a.mp4", frames=10)
    b = write_video(tmp_path / "b.mp4", frames=10)
    got = load_media([Clip(a), Clip(b)], MediaSpec(num_frames=4, image_size=32))
    assert brightness(got.frames) == [2, 7, 2, 7]  # frames 2, 7, 12, 17 of the 20
    both = len(load_media([Clip(a)], SPEC).fbank)
    assert len(got.fbank) > 1.8 * both


def test_cut_takes_the_seconds_asked_for(tmp_path):
    path = write_video(tmp_path / "a.mp4", frames=30, sound=3.0)
    got = load_media([Clip(path, 1.0, 2.0)], SPEC)
    assert all(10 <= b < 20 for b in brightness(got.frames))
    assert len(got.fbank) == 96  # 98 frames of 1 s, whole patches
    outside = load_media([Clip(path, 50.0, 51.0)], SPEC)
    assert outside.video_status == outside.audio_status == "outside the recording"


def test_bad_clips_are_absent_with_their_reason(tmp_path):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "corrupt.mp4").write_bytes(b"not a video" * 100)
    cut = write_video(tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "half.mp4").write_bytes(cut[: len(cut) // 2])
    expected = {
        "missing": "missing",
        "empty": "empty file",
        "corrupt": "corrupt",
        "half": "corrupt",
    }
    for name, reason in expected.items():
        got = load_media([Clip(tmp_path / f"{name}.mp4")], SPEC)
        assert (got.video_status, got.audio_status) == (reason, reason), name
        assert got.frames.shape == (0, 32, 32, 3)
        assert got.fbank.shape == (0, 128)
    silent = write_video(tmp_path / "silent.mp4", sound=0)
    got = load_media([Clip(silent)], SPEC)
    assert (got.video_status, got.audio_status) == ("ok", "no audio stream")
    one_bad = load_media([Clip(tmp_path / "whole.mp4"), Clip(tmp_path / "gone.mp4")], SPEC)
    assert one_bad.video_status == one_bad.audio_status == "ok"
    assert one_bad.clip_errors == ("video: missing", "audio: missing")


def test_damage_inside_a_clip_does_not_raise(tmp_path):
    data = bytearray(write_video(tmp_path / "a.mp4", frames=40).read_bytes())
    middle = len(data) // 2
    data[middle : middle + 400] = bytes(400)
    (tmp_path / "b.mp4").write_bytes(data)
    got = load_media([Clip(tmp_path / "b.mp4")], SPEC)
    assert got.video_status == ("ok" if len(got.frames) else "corrupt")


@pytest.mark.parametrize(
    ("frames", "fps", "codec"), [(120, 60, "h264"), (1, 10, "h264"), (20, 10, "hevc")]
)
def test_odd_clips_decode(tmp_path, frames, fps, codec):
    path = write_video(tmp_path / "a.mp4", frames=frames, fps=fps, codec=codec)
    got = load_media([Clip(path)], SPEC)
    assert got.video_status == "ok"
    assert got.frames.shape == (4, 32, 32, 3)


def test_sound_of_a_fraction_of_a_patch_is_absent_not_zeros(tmp_path):
    path = write_video(tmp_path / "a.mp4", frames=2, sound=0.04)
    got = load_media([Clip(path, 0.0, 0.04)], SPEC)
    assert got.video_status == "ok"
    assert got.audio_status == "too short"


def test_names_never_leave_the_media_root():
    root = pathlib.Path("root")
    assert media.inside(root, "a/b.mp4") == root / "a" / "b.mp4"
    for name in ("/etc/passwd", "../x.mp4", "a/../../x.mp4", "..\\x.mp4", "C:\\x.mp4"):
        with pytest.raises(media.MediaError, match="outside the media root"):
            media.inside(root, name)


def test_audio_file_is_read_and_resampled(tmp_path):
    path = tmp_path / "a.wav"
    tone = (np.sin(2 * np.pi * 440 * np.arange(44100) / 44100) * 16000).astype(np.int16)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(44100)
        file.writeframes(np.repeat(tone, 2).tobytes())
    got = load_media([Clip(path)], SPEC, video=False)
    assert got.fbank.shape == (96, 128)
    hz = 440 / (16000 / 512)
    peak = int(np.argmax(got.fbank[40] - 0))
    centre = float(np.average(np.arange(256), weights=fbank.mel_banks()[peak]))
    assert abs(centre - hz) < 1.0


def test_long_sound_becomes_spread_clips_of_the_allowed_total():
    spec = MediaSpec(max_audio_seconds=6.0)
    bank = media.waveform_fbank(np.zeros(16000 * 20, np.float32), spec, of_video=True)
    assert len(bank) == fbank.num_fbank_frames(16000 * 6) // 16 * 16
    released = MediaSpec(audio_mode="released")
    bank = media.waveform_fbank(np.zeros(16000, np.float32), released, of_video=True)
    assert len(bank) == 2998


def test_released_clip_ranges_are_exact_fractions_of_the_double_length():
    assert fbank.clip_ranges(116_800)[1:3] == [(10_599, 42_599), (21_199, 53_199)]
    for n in np.random.default_rng(0).integers(1, 16000 * 200, 1000):
        # The released sampler, step by step.
        longest = Fraction(max(int(n) / 16000 - Fraction(2), 0))
        each = [Fraction(longest, 8) * i for i in range(8)]
        expected = [(int(s * 16000), int((s + Fraction(2)) * 16000)) for s in each]
        assert fbank.clip_ranges(int(n)) == expected


def test_images_are_turned_as_the_camera_was_held(tmp_path):
    image = Image.fromarray(np.arange(24, dtype=np.uint8).repeat(3 * 16).reshape(24, 16, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned clockwise
    image.save(tmp_path / "a.png", exif=exif)
    got = images.open_image(tmp_path / "a.png")
    np.testing.assert_array_equal(got, np.rot90(np.asarray(image), -1))


@pytest.mark.skipif(not REAL.is_dir(), reason="needs the real media")
def test_real_files_decode():
    for path in sorted(REAL.iterdir()):
        got = load_media([Clip(path)], MediaSpec(num_frames=8, image_size=64))
        assert "ok" in (got.video_status, got.audio_status)
