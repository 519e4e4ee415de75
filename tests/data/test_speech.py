"""Tests words from sound, with a stand-in for Whisper, and with it where it and a model are."""

import fcntl
import json
import os
import pathlib
import sys
import threading
import types

import numpy as np
import pytest

from mm_jax.__main__ import main
from mm_jax.config.errors import ConfigError
from mm_jax.data.datasets import common
from mm_jax.data.datasets.common import BUILD_REPORT, TRANSCRIPTS, SampleSource
from mm_jax.data.recording import Clip, MediaError
from mm_jax.data.speech import Transcriber, Transcripts, sound_of
from tests.conftest import ROOT, run_prepare
from tests.support.media import write_tree, write_video

JFK = ROOT.parent / "shared" / "data" / "media" / "whisper_jfk.flac"
WHISPER = os.environ.get("MM_JAX_WHISPER", "")  # a folder of an English model


@pytest.fixture
def heard(monkeypatch):
    """Stands in for faster-whisper; returns the seconds of the sounds that it heard."""
    seconds = []

    class Whisper:
        supported_languages = ("en", "de")

        def __init__(self, model, device, compute_type):
            if model == "nonsuch":
                raise ValueError(f"Invalid model size '{model}'")

        def transcribe(self, wave, language, **settings):
            assert settings["vad_filter"]
            assert settings["temperature"] == 0
            assert wave.dtype == np.float32
            if len(wave) > 160_000:
                raise RuntimeError("CUDA failed with error out of memory")
            seconds.append(len(wave) / 16000)
            loud = np.abs(wave).max() > 0.1
            said = [types.SimpleNamespace(start=0.0, end=1.004, text=f" {seconds[-1]:.0f} s.")]
            return iter(said if loud else []), types.SimpleNamespace(language=language or "en")

    whisper = types.SimpleNamespace(WhisperModel=Whisper)
    monkeypatch.setitem(sys.modules, "faster_whisper", whisper)
    devices = types.SimpleNamespace(
        get_cuda_device_count=lambda: 0, get_supported_compute_types=lambda device: {"float32"}
    )
    monkeypatch.setitem(sys.modules, "ctranslate2", devices)
    return seconds


def prepare(root, out, *more):
    shape = ("--num_frames=4", "--image_size=24", "--transcribe=tiny", "--language=en")
    return run_prepare("--dataset=dfew", f"--raw={root}", f"--data_dir={out}", *shape, *more)


def test_clips_get_their_words(heard, tmp_path):
    root, out = write_tree(tmp_path / "raw"), tmp_path / "data"
    clips = root / "Clip" / "original" / "part"
    write_video(clips / "00003.mp4", sound=3)
    write_video(clips / "00004.mp4", sound=0)
    folder = prepare(root, out)
    assert folder.parent.name == "fold1_f4_s24_words"
    found = {s.id: s for name in ("train", "val", "test") for s in SampleSource(folder, name)}
    texts = {i: s.client_text for i, s in found.items() if s.client_text}
    assert texts == {"00003": "3 s.", "00021": "1 s."}
    assert len(heard) == 2
    report = json.loads((folder / BUILD_REPORT).read_text())
    words = [report["media"][s].get("words", {}) for s in ("train", "val", "test")]
    assert sum(w.get("ok", 0) for w in words) == 2
    assert sum(w.get("no audio stream", 0) for w in words) == 1
    assert words[2]["no recording"] == 2  # pictures alone, and nothing
    assert report["options"]["transcribe"] == "tiny"

    # Words that were corrected by hand are used, and the rest is not heard again.
    kept = out / "dfew" / TRANSCRIPTS
    kept.write_text(kept.read_text().replace("1 s.", "One second.").rstrip("\n"))
    folder = prepare(root, out, "--overwrite")
    assert {s.client_text for s in SampleSource(folder, "test")} == {"", "One second."}
    assert len(heard) == 2
    # Another build uses them too; a clip that has changed is heard again.
    write_video(clips / "00003.mp4", sound=4)
    folder = prepare(root, out, "--image_size=32")
    found = {s.id: s for name in ("train", "val", "test") for s in SampleSource(folder, name)}
    texts = {i: s.client_text for i, s in found.items() if s.client_text}
    assert texts == {"00003": "4 s.", "00021": "One second."}
    assert len(heard) == 3
    rows = [json.loads(line) for line in kept.read_text().splitlines()]
    assert [r["segments"][0] for r in rows if r["id"] == "00003"] == [
        [0, 1, "3 s."],
        [0, 1, "4 s."],
    ]

    with open(kept, "a") as file:
        file.write('{"id": "00021", "sound": "')  # the build was killed here
    assert len(Transcripts(kept, "tiny", "en").texts) == 3
    assert [json.loads(line) for line in kept.read_text().splitlines()] == rows
    assert not Transcripts(kept, "small", "en").texts
    kept.write_text('{"id": 1}\n' + kept.read_text())
    with pytest.raises(ConfigError, match=r"line 1: not a transcript"):
        Transcripts(kept, "tiny", "en")


def test_clips_in_dialogues_get_their_words(heard, tmp_path):
    root, out, lines = tmp_path / "mine", tmp_path / "data", []
    root.mkdir()
    for n in range(1, 7):
        write_video(root / f"{n}.mp4", sound=n, volume=0.5 if n < 6 else 0)
    for d, split in enumerate(("train", "train", "train", "val", "test")):
        said = [
            {"speaker": "client", "media": "1.mp4" if d else "6.mp4", "mood": "a"},
            {"speaker": "therapist", "text": "Go on.", "act": "nod"},
            {"speaker": "client", "media": "2.mp4", "mood": "b"},
            {"speaker": "client", "text": "Yes.", "media": "5.mp4", "mood": "b"},
            {"speaker": "therapist", "media": "3.mp4", "act": "ask"},
        ]
        lines.append(json.dumps({"id": f"d{d}", "split": split, "utterances": said}))
    (root / "dialogues.jsonl").write_text("\n".join(lines))
    args = ("--dataset=dialogues", f"--raw={root}", f"--data_dir={out}", "--image_size=24")
    folder = run_prepare(*args, "--num_frames=4", "--transcribe=tiny")
    train = {s.id: s for s in SampleSource(folder, "train")}
    assert [train[f"d{d}_1"].client_text for d in range(3)] == ["", "1 s.", "1 s."]
    second = train["d1_3"]
    assert (second.client_text, second.response) == ("2 s. Yes.", "3 s.")
    assert [u.text for u in second.history] == ["1 s.", "Go on."]
    words = json.loads((folder / BUILD_REPORT).read_text())["media"]["train"]["words"]
    assert words == {"nothing said": 1, "ok": 8}
    names = {json.loads(line)["id"] for line in open(out / "dialogues" / TRANSCRIPTS)}
    assert {"d1 1", "d1 3", "d1 5"} <= names
    count = len(heard)
    run_prepare(*args, "--num_frames=4", "--transcribe=tiny", "--overwrite")
    assert len(heard) == count

    # A therapist's words alone may be missing, too.
    for one in ("1.mp4", "2.mp4", "5.mp4", "6.mp4"):
        lines = [line.replace(f'"media": "{one}"', '"text": "Hm."') for line in lines]
    lines = [line.replace('"text": "Yes.", ', "") for line in lines]
    (root / "dialogues.jsonl").write_text("\n".join(lines))
    folder = run_prepare(*args, "--transcribe=tiny")
    assert folder.parent.name == "mine_text_words"
    assert {s.response for s in SampleSource(folder, "test")} == {"Go on.", "3 s."}


def test_a_build_waits_for_the_line_that_another_writes(heard, tmp_path):
    """Else it would take half a line for what a killed build left, and cut it off."""
    kept, opened = tmp_path / "transcripts.jsonl", []
    line = json.dumps(
        {"id": "a", "sound": "b", "text": "Hm.", "model": "tiny", "asked_language": "en"}
    )
    with open(kept, "wb", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(line[:20].encode())
        other = threading.Thread(target=lambda: opened.append(Transcripts(kept, "tiny", "en")))
        other.start()
        other.join(0.3)
        assert not opened
        file.write(line[20:].encode() + b"\n")
    other.join()
    assert opened[0].texts == {("a", "b"): "Hm."}
    assert kept.read_text() == line + "\n"


def test_a_failed_build_leaves_the_old_one(heard, tmp_path, monkeypatch):
    root, out = write_tree(tmp_path / "raw"), tmp_path / "data"
    folder = prepare(root, out)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    write_video(root / "Clip" / "original" / "part" / "00021.mp4", sound=11)
    with pytest.raises(ConfigError, match=r"out of memory; with CUDA_VISIBLE_DEVICES="):
        prepare(root, out, "--overwrite")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    with monkeypatch.context() as patch:  # after the new records are in their place
        patch.setattr(common, "shared", None)
        write_video(root / "Clip" / "original" / "part" / "00021.mp4", sound=2)
        with pytest.raises(TypeError):
            prepare(root, out, "--overwrite")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    folder.rename(folder.with_name("1.0.0.before"))  # as a killed build leaves it
    with pytest.raises(ConfigError, match="exists; pass --overwrite"):
        prepare(root, out)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    (folder / BUILD_REPORT).unlink()
    write_video(root / "Clip" / "original" / "part" / "00021.mp4", sound=2)
    assert prepare(root, out, "--overwrite", "--language=de") == folder
    assert [p.name for p in folder.parent.iterdir()] == ["1.0.0"]


def test_joined_clips_are_one_sound_and_silence_has_no_words(heard, tmp_path):
    one, two = (write_video(tmp_path / f"{n}.mp4", sound=n) for n in (1, 2))
    whisper = Transcriber("tiny")
    found = whisper(sound_of([Clip(one), Clip(tmp_path / "gone.mp4"), Clip(two)]))
    assert (found.text, found.language) == ("3 s.", "en")
    with pytest.raises(MediaError, match="missing"):
        sound_of([Clip(tmp_path / "gone.mp4")])
    silent = write_video(tmp_path / "silent.mp4", sound=1, volume=0)
    assert whisper(sound_of([Clip(silent)])).text == ""


def test_predict_writes_down_what_a_clip_says(run, heard, tmp_path, capsys):
    clip = write_video(tmp_path / "me.mp4", sound=2)
    arguments = ["predict", f"--checkpoint={run}", f"--video={clip}", "--transcribe=tiny"]
    assert main(arguments) == 0
    assert "[heard: 2 s.]\n[the model saw: 4 frames" in capsys.readouterr().out
    assert main([*arguments, "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["seen"]["characters_of_text"] == len("2 s.")
    assert row["transcript"]["segments"] == [[0.0, 1.0, "2 s."]]
    silent = write_video(tmp_path / "silent.mp4", sound=1, volume=0)
    arguments[2] = f"--video={silent}"
    assert main(arguments) == 0
    assert "nothing is said" in capsys.readouterr().err
    assert main(arguments[:3]) == 0
    assert "no words are given" in capsys.readouterr().err
    mute = write_video(tmp_path / "mute.mp4", sound=0)
    for message, changed in (
        ("mute.mp4: it has no sound", [f"--video={mute}"]),
        ("--transcribe does not go with --text", ["--text=a"]),
        ("--transcribe: nonsuch: Invalid model size", ["--transcribe=nonsuch"]),
        ("--language: tiny knows en, de; got 'fr'", ["--language=fr"]),
    ):
        assert main([*arguments, *changed]) == 2
        assert message in capsys.readouterr().err
    assert main(["predict", f"--checkpoint={run}", "--text=a", "--language=en"]) == 2
    assert "--language belongs to --transcribe" in capsys.readouterr().err


def test_what_is_missing_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "faster_whisper", None)
    root = write_tree(tmp_path / "raw")
    write_video(root / "Clip" / "original" / "part" / "00003.mp4")
    arguments = ["prepare", "--dataset=dfew", f"--raw={root}", f"--data_dir={tmp_path / 'data'}"]
    assert main([*arguments, "--transcribe=tiny"]) == 2
    assert "pip install -r requirements-speech.txt" in capsys.readouterr().err
    for message, more in (
        ("--language belongs to --transcribe", ["--language=en"]),
        ("one process transcribes", ["--transcribe=tiny", "--beam_runner=DirectRunner"]),
        ("--classes belongs to iemocap, not to dfew", ["--classes=6"]),
        ("--size belongs to synthetic, not to dfew", ["--size=20"]),
        ("--fold belongs to dfew, dialogues, iemocap, not to meld", ["--dataset=meld", "--fold=2"]),
        ("the utterances of synthetic have their words", ["--transcribe=a", "--dataset=synthetic"]),
    ):
        assert main([*arguments, *more]) == 2
        assert message in capsys.readouterr().err
    assert not list((tmp_path / "data").rglob("*.array_record*"))


@pytest.mark.skipif(not (WHISPER and JFK.is_file()), reason="needs MM_JAX_WHISPER and real sound")
def test_whisper_hears_the_words():
    pytest.importorskip("faster_whisper")
    found = Transcriber(WHISPER, "en")(sound_of([Clip(pathlib.Path(JFK))]))
    said = "ask not what your country can do for you ask what you can do for your country"
    assert said in "".join(c for c in found.text.lower() if c.isalpha() or c == " ")
    assert found.segments[-1][1] == pytest.approx(11, abs=0.5)
