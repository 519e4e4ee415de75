"""The reader gives the picture on screen and the sound heard at the asked time, whatever the file.

Every picture carries its number, every sound its pitch, so a wrong place is seen at once.
"""

import io
import wave
from fractions import Fraction

import av
import numpy as np
import pytest

from mm_jax.data import recording
from mm_jax.data.media import MediaSpec, load_media, uniform_frame_indices
from mm_jax.data.recording import Clip, MediaError, VideoReader
from mm_jax.data.sound import read_sound
from tests.support.media import number_of, tone_of, turn, write_recording, write_sound

DEFAULT, NONE = av.stream.Disposition.default, av.stream.Disposition(0)


def aac(seconds, rate=44100, hz=440.0, channels=1, disposition=DEFAULT):
    return "aac", tone_of(seconds, rate, hz, channels), rate, disposition


def pitch(sound):
    return float(np.argmax(np.abs(np.fft.rfft(sound))) * 16000 / len(sound))


def numbers(path, start=0.0, end=None):
    reader = VideoReader(Clip(path, start, end))
    return [number_of(p) for p in reader.decode(range(len(reader.times)))]


def check_every_place(path, frames, fps=25, times=None, step=0.37):
    """Asks for one picture at many places, and for cuts; each must be the one on screen there."""
    times = [i / fps for i in range(frames)] if times is None else times
    for place in np.arange(0, times[-1], step):
        expected = int(np.searchsorted(times, place + 1e-3, side="right")) - 1
        assert numbers(path, place, place + 0.001) == [expected], place
    whole = VideoReader(Clip(path))
    index = uniform_frame_indices(8, frames)
    assert len(whole.times) == frames
    assert [number_of(p) for p in whole.decode(index)] == list(index)
    middle = times[frames // 2]
    later = int(np.searchsorted(times, middle + 0.8 - 1e-3))
    assert numbers(path, middle, middle + 0.8) == list(range(frames // 2, later))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("plain.mp4", {}),
        ("bframes.mp4", {"gop": 50, "bframes": 3}),
        ("long_gop.ts", {"frames": 500, "gop": 100, "bframes": 2, "container": "mpegts"}),
        ("program.mpg", {"codec": "mpeg2video", "gop": 50, "bframes": 2, "container": "mpeg"}),
        ("disc.vob", {"codec": "mpeg2video", "start": 0.48, "container": "vob", "frames": 120}),
        ("late_clock.ts", {"start": 3000.0, "gop": 50, "container": "mpegts"}),
        ("late_clock.mp4", {"start": 40.0}),
        ("xvid.avi", {"codec": "mpeg4", "bframes": 2}),
        ("xvid_long.avi", {"codec": "mpeg4", "bframes": 2, "gop": 60, "frames": 200}),
        ("x264.avi", {"bframes": 3, "gop": 30, "frames": 120}),
        ("motion_jpeg.mov", {"codec": "mjpeg"}),
        ("b.mkv", {"bframes": 2, "gop": 25}),
        ("vp8.webm", {"codec": "libvpx", "gop": 25}),
        ("hevc.mov", {"codec": "libx265", "gop": 25, "bframes": 3}),
    ],
)
def test_pictures_are_those_on_screen_at_the_asked_time(tmp_path, name, options):
    sounds = [] if name.endswith((".webm", ".mpg", ".vob")) else [aac(2.0)]
    if name.endswith(".avi"):
        sounds = [("mp3", tone_of(2.0), 44100, DEFAULT)]
    path = write_recording(tmp_path / name, sounds=sounds, **options)
    check_every_place(path, options.get("frames", 50))


def test_pictures_at_odd_times_are_found_by_their_own_times(tmp_path):
    times = [i / 60 for i in range(60)] + [1 + 2 * i for i in range(20)]
    path = write_recording(tmp_path / "burst.mp4", len(times), times=times)
    check_every_place(path, len(times), times=times, step=0.61)


def test_a_seek_that_comes_late_is_noticed_and_remembered(tmp_path):
    path = write_recording(tmp_path / "a.ts", 500, gop=100, bframes=2, container="mpegts")
    assert numbers(path, 12.5, 12.51) == [312]
    assert recording.video_index(path).reach == 1  # seeks in this file must aim earlier


def test_a_clock_that_is_set_back_goes_on(tmp_path):
    first = write_recording(
        tmp_path / "a.ts", 60, container="mpegts", sounds=[aac(2.4, hz=300)], start=20.0
    )
    second = write_recording(
        tmp_path / "b.ts", 60, container="mpegts", sounds=[aac(2.4, hz=900)], start=1.0
    )
    both = tmp_path / "both.ts"
    both.write_bytes(first.read_bytes() + second.read_bytes())
    got = numbers(both)
    assert got == [*range(60), *range(60)]
    assert numbers(both, 3.0, 3.1)[0] == pytest.approx(15, abs=1)
    sound, _ = read_sound(Clip(both))
    assert len(sound) / 16000 == pytest.approx(4.8, abs=0.15)
    assert pitch(read_sound(Clip(both, 0.5, 1.5))[0]) == pytest.approx(300, abs=2)
    assert pitch(read_sound(Clip(both, 3.0, 4.0))[0]) == pytest.approx(900, abs=2)


def test_a_recording_that_begins_between_key_frames_starts_at_the_first_it_can_show(tmp_path):
    path = write_recording(tmp_path / "a.ts", 100, gop=25, bframes=0, container="mpegts")
    data = path.read_bytes()
    (tmp_path / "b.ts").write_bytes(data[len(data) // 8 // 188 * 188 :])
    assert numbers(tmp_path / "b.ts") == list(range(25, 100))


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        ((0, 1, -1, 0), lambda p: np.rot90(p, -1)),  # the phone held upright
        ((0, -1, 1, 0), lambda p: np.rot90(p, 1)),
        ((-1, 0, 0, -1), lambda p: np.rot90(p, 2)),
        ((-1, 0, 0, 1), lambda p: p[:, ::-1]),  # a front camera's mirror
        ((1, 0, 0, -1), lambda p: p[::-1]),
        ((0, 1, 1, 0), lambda p: p.swapaxes(0, 1)),
    ],
)
@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_pictures_are_turned_as_the_file_says(tmp_path, matrix, expected, codec):
    plain = write_recording(tmp_path / "a.mp4", 5, codec=codec)
    (picture,) = VideoReader(Clip(plain)).decode([3])
    turned = turn(plain, tmp_path / "b.mp4", *matrix)
    (got,) = VideoReader(Clip(turned)).decode([3])
    np.testing.assert_array_equal(got, expected(picture))


def test_pixels_that_are_not_square_are_stretched(tmp_path):
    wide = write_recording(tmp_path / "a.mkv", 5, ratio=Fraction(2))
    assert VideoReader(Clip(wide)).decode([0])[0].shape == (64, 192, 3)
    high = write_recording(tmp_path / "b.mkv", 5, ratio=Fraction(1, 2))
    assert VideoReader(Clip(high)).decode([0])[0].shape == (128, 96, 3)


def test_sound_that_changes_rate_and_channels_is_whole(tmp_path):
    a = write_recording(
        tmp_path / "a.ts", 75, container="mpegts", sounds=[aac(3, 44100, 300, channels=1)]
    )
    b = write_recording(
        tmp_path / "b.ts",
        75,
        container="mpegts",
        sounds=[aac(3, 48000, 900, channels=2)],
        start=3.1,
    )
    both = tmp_path / "change.ts"
    both.write_bytes(a.read_bytes() + b.read_bytes())
    sound, damaged = read_sound(Clip(both))
    assert not damaged
    assert len(sound) / 16000 == pytest.approx(6.05, abs=0.1)
    assert pitch(sound[8000:40000]) == pytest.approx(300, abs=1)
    assert pitch(sound[56000:90000]) == pytest.approx(900, abs=1)
    assert pitch(read_sound(Clip(both, 4.0, 5.0))[0]) == pytest.approx(900, abs=1)


@pytest.mark.parametrize(
    ("container", "codec", "rates"),
    [("mp3", "mp3", (44100, 48000)), ("adts", "aac", (44100, 48000)), ("ogg", "libopus", (48000,))],
)
def test_joined_sound_files_are_whole(tmp_path, container, codec, rates):
    data = b""
    for i in range(2):
        rate, file = rates[i % len(rates)], io.BytesIO()
        with av.open(file, "w", format=container) as out:
            stream = out.add_stream(codec, rate=rate)
            stream.layout = "stereo" if i and container != "ogg" else "mono"
            channels = 2 if i and container != "ogg" else 1
            write_sound(out, stream, tone_of(3, rate, (300, 900)[i], channels), rate)
        data += file.getvalue()
    path = tmp_path / f"joined.{container}"
    path.write_bytes(data)
    sound, _ = read_sound(Clip(path))
    assert len(sound) / 16000 == pytest.approx(6.1, abs=0.2)
    assert pitch(sound[8000:40000]) == pytest.approx(300, abs=1)
    assert pitch(sound[56000:90000]) == pytest.approx(900, abs=1)


def test_the_track_marked_default_is_heard_and_no_cover_is_seen(tmp_path):
    sounds = [aac(2, hz=300, disposition=NONE), aac(2, hz=2000)]
    path = write_recording(tmp_path / "a.mkv", sounds=sounds)
    assert pitch(read_sound(Clip(path))[0]) == pytest.approx(2000, abs=2)
    impaired = av.stream.Disposition.visual_impaired
    sounds = [aac(2, hz=300, disposition=impaired | DEFAULT), aac(2, hz=2000, disposition=NONE)]
    path = write_recording(tmp_path / "b.mkv", sounds=sounds)
    assert pitch(read_sound(Clip(path))[0]) == pytest.approx(2000, abs=2)


@pytest.mark.parametrize("marked", [True, False])
def test_a_cover_picture_is_not_the_video(tmp_path, marked):
    path = tmp_path / "cover.mkv"
    with av.open(str(path), "w") as out:
        cover = out.add_stream("mjpeg", rate=25)
        cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
        if marked:
            cover.disposition = av.stream.Disposition.attached_pic
        video = out.add_stream("libx264", rate=25)
        video.width, video.height, video.pix_fmt = 96, 64, "yuv420p"
        picture = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
        out.mux(cover.encode(picture.reformat(format="yuvj420p")))
        for _ in range(10):
            frame = av.VideoFrame.from_ndarray(np.zeros((64, 96, 3), np.uint8), format="rgb24")
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
    reader = VideoReader(Clip(path))
    assert len(reader.times) == 10
    assert reader.decode([0])[0].shape == (64, 96, 3)


@pytest.mark.parametrize("start", [0.0, 1.0, 2.5, 4.2])
@pytest.mark.parametrize("kind", ["a.ts", "a.mp4", "a.mkv", "a.wav", "a.flac", "a.mp3", "a.opus"])
def test_sound_of_a_cut_is_that_of_its_seconds(tmp_path, kind, start):
    # Pitch rises from second to second: 300, 600, 900, ... Hz.
    rate = 48000 if kind == "a.opus" else 44100
    tone = np.concatenate([tone_of(1, rate, 300 * (i + 1)) for i in range(6)], axis=1)
    path = tmp_path / kind
    if kind in ("a.ts", "a.mp4", "a.mkv"):
        write_recording(path, 150, gop=100, sounds=[("aac", tone, 44100, DEFAULT)])
    else:
        codec = {"wav": "pcm_s16le", "flac": "flac", "mp3": "mp3", "opus": "libopus"}[kind[2:]]
        with av.open(str(path), "w") as out:
            stream = out.add_stream(codec, rate=rate)
            stream.layout = "mono"
            write_sound(out, stream, tone, rate)
    sound, _ = read_sound(Clip(path, start, start + 0.4))
    assert len(sound) == 6400
    assert pitch(sound) == pytest.approx(300 * (int(start) + 1), abs=6)


def test_cuts_of_picture_and_sound_agree_on_a_clock_that_starts_late(tmp_path):
    tone = np.concatenate([tone_of(1, 44100, 300 * (i + 1)) for i in range(6)], axis=1)
    path = write_recording(
        tmp_path / "a.ts",
        150,
        container="mpegts",
        start=3000.0,
        sounds=[("aac", tone, 44100, DEFAULT)],
    )
    assert numbers(path, 4.0, 4.2) == [100, 101, 102, 103, 104]
    assert pitch(read_sound(Clip(path, 4.1, 4.9))[0]) == pytest.approx(1500, abs=3)
    got = load_media([Clip(path, 30.0, 31.0)], MediaSpec(num_frames=2, image_size=16))
    assert got.video_status == got.audio_status == "outside the recording"


def test_a_gap_in_the_sound_keeps_its_time(tmp_path):
    path = tmp_path / "gap.mkv"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("pcm_s16le", rate=16000)
        stream.layout = "mono"
        for start, hz in ((0, 300), (16000 * 3, 900)):
            tone = (tone_of(1, 16000, hz) * 32767).astype(np.int16)
            for i in range(0, 16000, 1600):
                frame = av.AudioFrame.from_ndarray(tone[:, i : i + 1600], "s16", "mono")
                frame.sample_rate, frame.pts = 16000, start + i
                out.mux(stream.encode(frame))
    sound, _ = read_sound(Clip(path))
    assert len(sound) == 64000
    assert not sound[16000:48000].any()
    assert pitch(sound[48000:]) == pytest.approx(900, abs=1)


def test_files_are_known_by_content_not_by_name(tmp_path):
    webm = write_recording(
        tmp_path / "a.webm", codec="libvpx", sounds=[("libopus", tone_of(2, 48000), 48000, DEFAULT)]
    )
    m4a = tmp_path / "b.m4a"
    with av.open(str(m4a), "w", format="ipod") as out:
        stream = out.add_stream("aac", rate=44100)
        stream.layout = "mono"
        write_sound(out, stream, tone_of(2), 44100)
    for source in (webm, m4a):
        path = source.with_suffix(".wav")
        path.write_bytes(source.read_bytes())
        assert pitch(read_sound(Clip(path))[0]) == pytest.approx(440, abs=1)


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF])
def test_a_wav_that_does_not_know_its_length_is_read_to_its_end(tmp_path, size):
    path = tmp_path / "piped.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes((tone_of(2, 16000)[0] * 32767).astype("<i2").tobytes())
    data = bytearray(path.read_bytes())
    data[4:8] = data[40:44] = size.to_bytes(4, "little")
    path.write_bytes(data)
    sound, _ = read_sound(Clip(path))
    assert len(sound) == 32000
    assert pitch(sound) == pytest.approx(440, abs=1)


def test_damage_is_reported_and_what_is_whole_is_kept(tmp_path):
    path = write_recording(
        tmp_path / "a.ts", 250, gop=25, container="mpegts", sounds=[aac(10, hz=300)]
    )
    data = bytearray(path.read_bytes())
    middle = len(data) // 2 // 188 * 188
    data[middle : middle + 188 * 60] = bytes(188 * 60)
    path.write_bytes(data)
    got = load_media([Clip(path)], MediaSpec(num_frames=8, image_size=16))
    assert got.video_status == got.audio_status == "ok"
    sound, _ = read_sound(Clip(path, 8.0, 9.0))
    assert pitch(sound) == pytest.approx(300, abs=1)
    assert numbers(path, 9.0, 9.01) == [225]


def test_headers_that_cannot_be_true_are_an_error(tmp_path):
    path = tmp_path / "a.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(7)
        file.writeframes(bytes(2000))
    with pytest.raises(MediaError, match=r"corrupt.*sound of 7 Hz"):
        read_sound(Clip(path))


def test_sound_that_begins_just_before_the_clock_s_zero_is_in_its_place(tmp_path):
    """A sound coder's delay puts its first packet before 0, the end of the clock's last round."""
    tone = np.concatenate([tone_of(1, 48000, 300 * (i + 1)) for i in range(13)], axis=1)
    path = write_recording(
        tmp_path / "a.ts", 136, 10, container="mpegts", bframes=0,
        sounds=[("aac", tone, 48000, DEFAULT)],
    )  # fmt: skip
    with av.open(str(path)) as container:
        assert container.streams.audio[0].start_time > 2**32
    assert len(read_sound(Clip(path))[0]) / 16000 == pytest.approx(13, abs=0.1)
    assert pitch(read_sound(Clip(path, 2.1, 2.9))[0]) == pytest.approx(900, abs=3)


def test_program_streams_give_no_shifted_picture_after_a_seek(tmp_path):
    """After a seek their demuxer gives the key frame another presentation time."""
    path = write_recording(
        tmp_path / "a.mpg", 1000, codec="mpeg2video", container="mpeg", gop=25, bframes=2
    )
    for second in range(0, 38, 3):
        reader = VideoReader(Clip(path, second, second + 2))
        got = [number_of(p) for p in reader.decode([0, 20, 40])]
        assert got == [25 * second + k for k in (0, 20, 40)]


def test_the_released_mode_asks_the_first_clip_that_is_heard_whether_it_is_a_video(tmp_path):
    path = tmp_path / "a.wav"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("pcm_s16le", rate=16000)
        stream.layout = "mono"
        write_sound(out, stream, tone_of(2, 16000), 16000)
    spec = MediaSpec(2, 16, audio_mode="released")
    got = load_media([Clip(tmp_path / "gone.mp4"), Clip(path)], spec, video=False)
    assert got.audio_status == "ok"
    assert got.clip_errors == ("audio: missing",)
