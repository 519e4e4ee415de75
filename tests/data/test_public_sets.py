"""Tests the readers of public data sets on tiny trees in their real layouts, quirks included."""

import collections
import csv
import json
import pathlib
import random

import numpy as np
import pytest
import soundfile

from mm_jax.__main__ import main
from mm_jax.data.datasets.common import BUILD_REPORT, DataError, SampleSource
from mm_jax.run.build import data_labels
from tests.conftest import ROOT, run_prepare
from tests.support.media import write_video

MELD = ROOT.parent / "shared" / "data" / "meld"
HEADER = ["Sr No.", "Utterance", "Speaker", "Emotion", "Sentiment", "Dialogue_ID", "Utterance_ID"]
SMALL = ("--num_frames=2", "--image_size=32")


def write_sound(path: pathlib.Path, seconds: float) -> None:
    wave = np.sin(np.arange(int(seconds * 16_000)) / 5)
    soundfile.write(path, wave, 16_000)


def samples(folder: pathlib.Path, split: str) -> dict:
    return {s.id: s for s in SampleSource(folder, split)}


def media_report(folder: pathlib.Path) -> dict:
    return json.loads((folder / BUILD_REPORT).read_text())["media"]


# ---- MELD ----------------------------------------------------------------------------------------


def write_meld(root: pathlib.Path, **changes) -> pathlib.Path:
    root.mkdir()
    for split in ("train", "dev", "test"):
        rows = [
            (1, "It\x92s you\u2026", "Ross", "joy", "positive", 0, 0),
            (2, "Is it?", "Rachel\x92s Date", "surprise", "negative", 0, 3),  # ids have gaps
            (3, "Hi.", "Joey", "neutral", "neutral", 1, 0),
        ]
        with open(root / f"{split}_sent_emo.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(changes.get("header", HEADER))
            writer.writerows(changes.get("rows", rows))
    return root


def write_meld_clips(root: pathlib.Path) -> pathlib.Path:
    for folder in ("train_splits", "dev_splits_complete", "output_repeated_splits_test"):
        (root / folder).mkdir(parents=True)
        write_video(root / folder / "dia0_utt0.mp4", frames=3, sound=0.4)
        (root / folder / "._dia1_utt0.mp4").write_bytes(b"of a file system")
        write_video(root / folder / "dia66_utt9.mp4", frames=3)  # without a row
    (root / "train_splits" / "dia0_utt3.mp4").write_bytes(b"\0" * 100)
    write_video(
        root / "output_repeated_splits_test" / "final_videos_testdia0_utt0.mp4", frames=9, sound=1.0
    )
    return root


def test_a_folder_without_any_clip_is_refused(tmp_path, capsys):
    raw = write_meld(tmp_path / "raw")
    (tmp_path / "clips").mkdir()
    args = ["prepare", "--dataset=meld", f"--raw={raw}", f"--data_dir={tmp_path / 'd'}"]
    assert main([*args, f"--media={tmp_path / 'clips'}", "--no-check_counts"]) == 2
    error = capsys.readouterr().err
    assert "no media found for any of 9 samples" in error
    assert "looked for train_splits/dia0_utt0.mp4" in error


def test_meld_with_clips_counts_every_quirk(tmp_path):
    raw = write_meld(tmp_path / "raw")
    clips = write_meld_clips(tmp_path / "clips")
    args = ["--dataset=meld", f"--raw={raw}", f"--data_dir={tmp_path / 'd'}", f"--media={clips}"]
    folder = run_prepare(*args, *SMALL, "--no-check_counts")
    train = samples(folder, "train")
    assert sorted(train) == ["train0_1", "train0_2", "train1"]
    second = train["train0_2"]
    assert second.client_text == "Rachel’s Date: Is it?"
    assert [u.text for u in second.history] == ["Ross: It’s you…"]
    assert second.history[0].labels == {"emotion": "joy", "sentiment": "positive"}
    assert second.labels == {"emotion": "surprise", "sentiment": "negative"}
    counts = media_report(folder)
    assert counts["train"]["video"] == {"ok": 1, "corrupt": 1, "missing": 1}
    assert counts["val"]["video"] == {"ok": 1, "missing": 2}
    # The sound tells which of two files of one utterance was read: the longer one.
    lengths = {s: len(samples(folder, s)[f"{s}0_1"].fbank) for s in ("val", "test")}
    assert lengths["test"] > 2 * lengths["val"]
    assert data_labels(folder).name == "meld"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"header": HEADER[:-1]}, "missing columns ['Utterance_ID']"),
        ({"rows": [(1, "Hi.", "Ross", "glee", "positive", 0, 0)]}, "line 2: emotion: expected one"),
        ({"rows": [(1, "", "Ross", "joy", "positive", 0, 0)]}, "line 2: expected Utterance, Em"),
        ({"rows": [(1, "A", "B", "joy", "", 0, 0)]}, "line 2: expected Utterance, Emotion and S"),
        ({"rows": [(1, "A", "B", "joy", "positive", 0, 0)] * 2}, "line 3: dia0_utt0 is listed twi"),
        ({}, "MELD: expected {'train': 9989, 'val': 1109, 'test': 2610} utterances, got {'train'"),
    ],
)
def test_broken_files_of_meld_are_named(tmp_path, capsys, changes, message):
    raw = write_meld(tmp_path / "raw", **changes)
    args = ["prepare", "--dataset=meld", f"--raw={raw}", f"--data_dir={tmp_path / 'd'}"]
    assert main(args) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("d/**/*.array_record*"))


@pytest.mark.skipif(not MELD.is_dir(), reason="needs the real MELD text")
def test_real_meld_has_the_released_counts(tmp_path):
    folder = run_prepare("--dataset=meld", f"--raw={MELD}", f"--data_dir={tmp_path}")
    found = {s: list(SampleSource(folder, s, light=True)) for s in ("train", "val", "test")}
    assert {s: len(own) for s, own in found.items()} == {"train": 9989, "val": 1109, "test": 2610}
    test = collections.Counter(s.target("emotion") for s in found["test"])
    assert (test["neutral"], test["fear"]) == (1256, 50)
    assert not any("\x80" <= c < "\xa0" for s in found["train"] for c in s.client_text)


# ---- ESConv --------------------------------------------------------------------------------------


def esconv(number: int) -> dict:
    return {
        "emotion_type": "anxiety",
        "problem_type": "job crisis",
        "situation": f"I fear  number {number}.",
        "dialog": [
            {"speaker": "seeker", "annotation": {}, "content": "Hello\n"},
            {"speaker": "supporter", "annotation": {"strategy": "Question"}, "content": "What?\n"},
            {"speaker": "supporter", "annotation": {"strategy": "Others"}, "content": "Well."},
            {"speaker": "seeker", "annotation": {"feedback": "4"}, "content": "My job."},
            {"speaker": "supporter", "annotation": {"strategy": "Information"}, "content": "So."},
        ],
    }


def test_esconv_is_split_as_its_authors_do(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "ESConv.json").write_text(json.dumps([esconv(i) for i in range(40)]))
    folder = run_prepare("--dataset=esconv", f"--raw={raw}", f"--data_dir={tmp_path / 'd'}")
    order = list(range(40))
    random.seed(13)
    random.shuffle(order)
    want = {"val": order[:6], "test": order[6:12], "train": order[12:]}
    for split, numbers in want.items():
        found = samples(folder, split)
        assert {s.dialogue_id for s in found.values()} == {f"esconv{i}" for i in numbers}
        assert len(found) == 2 * len(numbers)
    sample = samples(folder, "val")[f"esconv{order[0]}_3"]
    assert (sample.client_text, sample.response) == ("My job.", "So.")
    assert (sample.problem_type, sample.situation) == ("job crisis", f"I fear number {order[0]}.")
    assert sample.labels == {"strategy": "Information"}
    assert [u.labels for u in sample.history][1:] == [
        {"strategy": "Question"},
        {"strategy": "Others"},
    ]
    assert media_report(folder) == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dialog": 3}, "not in the format of ESConv.json: TypeError"),
        ({"situation": None}, "dialogue 1: not in the format"),
        ({"dialog": [{"speaker": "bot", "content": "x"}]}, "KeyError: 'bot'"),
    ],
)
def test_broken_esconv_is_named(tmp_path, capsys, change, message):
    (tmp_path / "ESConv.json").write_text(json.dumps([esconv(0), esconv(1) | change]))
    args = ["prepare", "--dataset=esconv", f"--raw={tmp_path}", f"--data_dir={tmp_path / 'd'}"]
    assert main(args) == 2
    error = capsys.readouterr().err
    assert "ESConv.json dialogue 1: " in error
    assert message in error


# ---- clips that are named by what they show --------------------------------------------------


def test_cremad_is_split_by_actor(tmp_path):
    raw = tmp_path / "raw"
    (raw / "VideoFlash").mkdir(parents=True)
    (raw / "AudioWAV").mkdir()
    for actor in range(1001, 1007):
        for emotion in ("ANG", "SAD"):
            write_video(raw / "VideoFlash" / f"{actor}_IEO_{emotion}_HI.flv", frames=3, sound=0.4)
    # A take with sound alone, and one with both: the video is taken.
    write_sound(raw / "AudioWAV" / "1001_TIE_NEU_XX.wav", 0.4)
    write_sound(raw / "AudioWAV" / "1001_IEO_ANG_HI.wav", 0.4)
    (raw / "VideoFlash" / "._1001_IEO_ANG_HI.flv").write_bytes(b"x")
    args = ["--dataset=cremad", f"--raw={raw}", f"--data_dir={tmp_path / 'd'}", "--val_share=0.2"]
    folder = run_prepare(*args, *SMALL)
    found = {split: samples(folder, split) for split in ("train", "val", "test")}
    actors = {split: {name[:4] for name in own} for split, own in found.items()}
    assert sum(map(len, actors.values())) == 6  # none is in two
    assert min(map(len, actors.values())) > 0
    every = {name: s for own in found.values() for name, s in own.items()}
    assert len(every) == 13
    assert every["1001_IEO_ANG_HI"].labels == {"emotion": "anger"}
    assert every["1001_IEO_ANG_HI"].client_text == "It's eleven o'clock."
    assert len(every["1001_IEO_ANG_HI"].frames) == 2
    heard = every["1001_TIE_NEU_XX"]
    assert (len(heard.frames), heard.labels) == (0, {"emotion": "neutral"})
    assert len(heard.fbank) > 0
    (raw / "AudioWAV" / "1001_XXX_ANG_HI.wav").write_bytes(b"x")
    with pytest.raises(DataError, match="1001_XXX_ANG_HI: unknown emotion or sentence"):
        run_prepare(*args, *SMALL, "--overwrite")


def test_ravdess_takes_speech_with_picture_and_sound(tmp_path, capsys):
    raw = tmp_path / "raw"
    for actor in range(1, 5):
        folder = raw / f"Actor_{actor:02d}"
        folder.mkdir(parents=True)
        for emotion in ("02", "05"):
            take = f"01-{emotion}-01-02-01-{actor:02d}"
            write_video(folder / f"01-{take}.mp4", frames=3, sound=0.4)
            write_video(folder / f"02-{take}.mp4", frames=3, sound=0)
            write_sound(folder / f"03-{take}.wav", 0.4)
        write_video(folder / f"01-02-05-01-02-01-{actor:02d}.mp4", frames=3)  # a song
    args = ["--dataset=ravdess", f"--raw={raw}", f"--data_dir={tmp_path / 'd'}", "--val_share=0.25"]
    folder = run_prepare(*args, *SMALL)
    every = {n: s for split in ("train", "val", "test") for n, s in samples(folder, split).items()}
    assert len(every) == 8
    sample = every["01-05-01-02-01-03"]
    assert sample.labels == {"emotion": "angry"}
    assert sample.client_text == "Dogs are sitting by the door."
    assert (sample.frames.shape[0], len(sample.fbank) > 0) == (2, True)
    assert main(["prepare", "--dataset=ravdess", f"--raw={tmp_path / 'd'}"]) == 2
    assert "no clips are found; expected names such as 01-01-06-01" in capsys.readouterr().err


# ---- IEMOCAP -------------------------------------------------------------------------------------


def write_iemocap(root: pathlib.Path, video: bool) -> pathlib.Path:
    emotions = ("ang", "exc", "fru", "neu", "xxx")
    for session in range(1, 6):
        name = f"Ses0{session}F_impro01"
        dialog = root / f"Session{session}" / "dialog"
        for part in ("EmoEvaluation", "transcriptions", "avi/DivX"):
            (dialog / part).mkdir(parents=True)
        rated = ["% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]", ""]
        said = []
        for i, emotion in enumerate(emotions):
            turn, start, end = f"{name}_{'FM'[i % 2]}00{i // 2}", i * 0.5, i * 0.5 + 0.5
            rated += [f"[{start:.4f} - {end:.4f}]\t{turn}\t{emotion}\t[2.5, 2.5, 2.5]", "C-E1:\tx;"]
            said.append(f"{turn} [{start:08.4f}-{end:08.4f}]: Line {i}. ")
            if not video:
                wav = root / f"Session{session}" / "sentences" / "wav" / name
                wav.mkdir(parents=True, exist_ok=True)
                write_sound(wav / f"{turn}.wav", 0.5)
        (dialog / "EmoEvaluation" / f"{name}.txt").write_text("\n".join(rated))
        (dialog / "EmoEvaluation" / f"._{name}.txt").write_bytes(b"\0\xff")
        # The first line of a file may be out of order.
        (dialog / "transcriptions" / f"{name}.txt").write_text("\n".join(said[1:] + said[:1]))
        if video:
            write_video(dialog / "avi" / "DivX" / f"{name}.avi", frames=24, sound=3.0)
    return root


@pytest.mark.parametrize(("classes", "video"), [(4, True), (6, False)])
def test_iemocap_holds_out_a_session(tmp_path, classes, video):
    raw = write_iemocap(tmp_path / "raw", video)
    args = ["--dataset=iemocap", f"--raw={raw}", f"--data_dir={tmp_path / 'd'}", "--fold=4"]
    folder = run_prepare(*args, *SMALL, f"--classes={classes}")
    found = {split: samples(folder, split) for split in ("train", "val", "test")}
    assert {s.dialogue_id for s in found["test"].values()} == {"Ses04F_impro01"}
    assert len({s.dialogue_id for s in found["val"].values()}) == 1
    space = data_labels(folder)
    assert (space.name, len(space["emotion"].labels)) == (f"iemocap{classes}", classes)
    labels = [s.target("emotion") for _, s in sorted(found["test"].items())]
    four, six = ["angry", "happy", "neutral"], ["angry", "excited", "frustrated", "neutral"]
    assert labels == (four if classes == 4 else six)
    last = max(found["test"].values(), key=lambda s: s.turn)
    assert [u.text for u in last.history] == ["F: Line 0.", "M: Line 1.", "F: Line 2."]
    assert last.history[2].labels == ({} if classes == 4 else {"emotion": "frustrated"})
    kind = "video" if video else "audio"
    assert media_report(folder)["test"][kind] == {"ok": len(labels)}
    assert all(0 < len(s.fbank) < 60 for s in found["test"].values())  # cut to the utterance
