"""Tests people's own data: dialogues.jsonl, clips.csv and labels.json, whole and broken."""

import csv
import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import pytest

from mm_jax.__main__ import main
from mm_jax.config.errors import ConfigError
from mm_jax.data.datasets.common import BUILD_REPORT, DataError, SampleSource
from mm_jax.data.datasets.corpus import split_entries
from mm_jax.data.datasets.dialogues.files import read_folder
from mm_jax.data.datasets.synthetic.synthetic_dataset_builder import SPLIT_SHARES, read_dialogues
from mm_jax.data.labels import parse_labels
from mm_jax.data.records import CLIENT, CLIENT_EMOTION, STRATEGY, THERAPIST_EMOTION
from mm_jax.run.build import data_labels
from tests.conftest import ROOT, run_prepare
from tests.support.media import write_video

LABELS = {
    "tasks": [
        {"name": "mood", "labels": ["calm", "tense"], "aliases": {"at ease": "calm"}},
        {"name": "act", "about": "therapist", "labels": {"ask": "want to know", "nod": "agree"}},
    ]
}


def dialogue(number: int = 0, **changes) -> dict:
    said = [
        {"speaker": "client", "text": f"I am here, {number}.", "mood": "calm"},
        {"speaker": "therapist", "text": "Good.", "act": "nod"},
    ]
    return {"id": f"d{number}", "utterances": said, **changes}


def line(number: int = 0, at: int = 0, **changes) -> str:
    """Returns a dialogue's line with changes to its utterance `at`."""
    found = dialogue(number)
    found["utterances"][at] |= changes
    return json.dumps(found)


def write(root: pathlib.Path, *lines: str | dict, labels: dict | None = LABELS) -> pathlib.Path:
    root.mkdir(exist_ok=True)
    text = "".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines)
    (root / "dialogues.jsonl").write_bytes(text.encode("utf-8", "surrogatepass"))
    if labels is not None:
        (root / "labels.json").write_text(json.dumps(labels))
    return root


GOOD = [dialogue(i) for i in range(1, 6)]
BROKEN = {
    "a bracket is missing": ('{"id": "d0"', "not JSON: "),
    "a list": ("[1]", "expected an object, got [1]"),
    "nested too deep": ("[" * 100_000, "not JSON: nested too deep"),
    "NaN": (line(start=float("nan"), media="a.mp4"), "not JSON: NaN is no number of JSON"),
    "infinity": (line(end=float("inf"), media="a.mp4"), "not JSON: Infinity is no number"),
    "a key twice": ('{"id": "a", "id": "b", "utterances": []}', "not JSON: the key 'id' occurs"),
    "no id": ({"utterances": [1]}, "id: expected text, got None"),
    "an id that is a number": (dialogue(id=7), "id: expected text, got 7"),
    "an empty id": (dialogue(id=" "), "id: expected text, got ' '"),
    "an id of two lines": (dialogue(id="a\nb"), "id: expected text, got 'a\\nb'"),
    "an id that is taken": (dialogue(3), "id: 'd3' is that of "),
    "a key with a typo": (dialogue(situtation="x"), "unknown key 'situtation'; did you mean situ"),
    "an unknown split": (dialogue(split="dev"), "split: expected one of ['train', 'val', 'test']"),
    "a split where others have none": (dialogue(split="train"), "has one"),
    "a problem that is no text": (dialogue(problem=["x"]), "problem: expected text, got ['x']"),
    "no utterances": ({"id": "d0"}, "utterances: expected a list, got None"),
    "an empty dialogue": (dialogue(utterances=[]), "utterances: the dialogue is empty"),
    "an utterance that is text": (dialogue(utterances=["hi"]), "utterance 1: expected an object"),
    "an unknown speaker": (line(speaker="Bob"), "utterance 1: speaker: expected client or therap"),
    "no speaker": (line(speaker=None), "utterance 1: speaker: expected client or therapist, got N"),
    "text that is a number": (line(text=3), "utterance 1: text: expected text, got 3"),
    "neither text nor media": (line(text=" "), "utterance 1: expected text or media"),
    "a control character": (line(text="a\x07b"), "utterance 1: text: holds the control character"),
    "a label that is not allowed": (
        line(mood="angry"),
        "utterance 1: mood: expected one of ['calm', 'tense'], got 'angry'",
    ),
    "a label that is a number": (line(mood=1), "utterance 1: mood: expected text, got 1"),
    "a label of the other speaker": (line(act="ask"), "utterance 1: act: a label of the therap"),
    "an unknown label key": (line(moood="calm"), "utterance 1: unknown key 'moood'; did you mean"),
    "a path that leaves the folder": (
        line(media="../a.mp4"),
        "utterance 1: media: expected a path inside the folder, got '../a.mp4'",
    ),
    "an absolute path": (line(media="/etc/passwd"), "media: expected a path inside the folder"),
    "a path of Windows": (line(media="C:\\a.mp4"), "media: expected a path inside the folder"),
    "a clip that is not there": (line(media="a.mp4"), "utterance 1: media: there is no a.mp4 in"),
    "times without media": (line(start=1), "utterance 1: start and end belong to media"),
    "times reversed": (line(media="a.mp4", start=3, end=2), "end: expected after start, got 2"),
    "a negative time": (line(media="a.mp4", start=-1), "start: expected seconds from 0 on, got -1"),
    "a time that is text": (
        line(media="a.mp4", end="2"),
        "end: expected seconds from 0 on, got '2",
    ),
    "a time without end": (
        line(media="a.mp4", start=10**400),
        "utterance 1: start: expected seconds from 0 on, got 1000",
    ),
    "a path without end": (line(media="a" * 300), "utterance 1: media: there is no aaa"),
    "a time that is true": (
        line(media="a.mp4", end=True),
        "end: expected seconds from 0 on, got T",
    ),
    "the reply first": (
        dialogue(utterances=dialogue()["utterances"][::-1]),
        "utterances: nothing to predict: expected a therapist's utterance after a client's",
    ),
    "a line of 50 MB": (line(text="x" * 50_000_000), "50.0 MB; expected a dialogue of at most 10"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_line_is_named_and_nothing_is_written(tmp_path, kind, capsys):
    broken, message = BROKEN[kind]
    raw = write(tmp_path / "raw", *GOOD[:3], broken, *GOOD[3:])
    args = ["prepare", "--dataset=dialogues", f"--raw={raw}", f"--data_dir={tmp_path / 'data'}"]
    assert main(args) == 2
    error = capsys.readouterr().err
    # Where one of all has a split, it is the first without one that is named.
    number = 1 if "others have none" in kind else 4
    assert f"dialogues.jsonl line {number}: " in error
    assert message in error
    assert "1 problem:" in error
    assert "Traceback" not in error
    assert max(map(len, error.splitlines())) < 400
    assert not (tmp_path / "data").exists()


def test_all_problems_are_told_at_once(tmp_path):
    raw = write(tmp_path / "raw", *(line(i, mood=f"x{i}") for i in range(30)), "{")
    with pytest.raises(DataError) as error:
        read_folder(raw)
    text = str(error.value)
    assert text.startswith("31 problems:")
    assert "line 31: not JSON" in text
    assert text.count("\n") == 21
    assert text.endswith("... and 11 more")


def test_problems_that_are_alike_are_told_once(tmp_path):
    raw = write(tmp_path / "raw", *(line(i, mood="x") for i in range(30)), line(30, act="y"))
    with pytest.raises(DataError) as error:
        read_folder(raw)
    heading, first, last = str(error.value).splitlines()
    assert heading == "31 problems:"
    assert "line 1: utterance 1: mood" in first
    assert first.endswith("(and 29 more like it)")
    assert "line 31: utterance 1: act" in last


@pytest.mark.parametrize(
    "encode",
    [
        lambda t: t.encode("utf-8-sig"),
        lambda t: t.encode("utf-16"),
        lambda t: t.replace("\n", "\r\n").encode(),
        lambda t: ("\n" + t + "\n\n").encode(),
    ],
)
def test_files_as_people_save_them_are_read(tmp_path, encode):
    lines = [line(i, text="Zoé: “ja”\u2028so") for i in range(4)]
    raw = write(tmp_path / "raw", *lines)
    path = raw / "dialogues.jsonl"
    path.write_bytes(encode(path.read_text(encoding="utf-8")))
    corpus = read_folder(raw)
    assert [e.dialogue.utterances[0].text for e in corpus.entries] == ["Zoé: “ja”\u2028so"] * 4


@pytest.mark.parametrize("encoding", ["utf-16-le", "latin-1"])
def test_other_encodings_are_refused_with_the_line(tmp_path, encoding):
    raw = write(tmp_path / "raw", *GOOD)
    path = raw / "dialogues.jsonl"
    text = path.read_text() + json.dumps(dialogue(9, problem="né"), ensure_ascii=False)
    path.write_bytes(text.encode(encoding))
    number = 1 if encoding == "utf-16-le" else 6
    with pytest.raises(DataError, match=f"dialogues.jsonl line {number}: expected UTF-8: "):
        read_folder(raw)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("Text", "line 1: utterance 1: Text: taken for a label, as all keys but speaker, text, "),
        ("txt", "expected text?"),
        ("My mood", "expected a name of lower-case letters, digits and _"),
    ],
)
def test_keys_that_are_no_labels_are_named(tmp_path, key, message):
    with pytest.raises(DataError) as error:
        read_folder(write(tmp_path / "raw", line(0, **{key: "x"}), labels=None))
    assert message in str(error.value)


def test_json_over_several_lines_is_one_problem_and_notes_are_none(tmp_path):
    raw = write(tmp_path / "raw", json.dumps(GOOD[0], indent=1))
    with pytest.raises(DataError, match=r"dialogues.jsonl: expected one dialogue per line"):
        read_folder(raw)
    noted = dialogue(0, _coder="me")
    noted["utterances"][0]["_note"] = ["any"]
    assert len(read_folder(write(raw, noted)).entries) == 1


def test_check_tells_what_may_not_be_meant(tmp_path, capsys):
    lines = [dialogue(i) for i in range(6)]
    lines[0]["utterances"].append({"speaker": "client", "text": "Bye.", "mood": "tense"})
    raw = write(tmp_path / "raw", *lines)
    assert main(["prepare", "--dataset=dialogues", f"--raw={raw}", "--check"]) == 0
    out = capsys.readouterr().out
    assert "note: mood: 7 labels give 6 samples" in out
    assert "note: mood: fewer than two utterances have tense" in out
    assert "note: act: fewer than two utterances have ask" in out
    assert "Client's mood: calm; Therapist's act" not in out
    assert "The client now says: I am here, " in out
    assert "Client's mood: calm\nTherapist's act: nod\nTherapist's response: Good.\n" in out


def test_names_of_files_are_taken_as_they_are_and_texts_composed(tmp_path):
    """Some systems store "é" as two characters: a path must name them as they are."""
    apart = "e\u0301"
    raw = write(tmp_path / "raw", line(0, text=apart, media=f"{apart}.mp4"))
    (raw / f"{apart}.mp4").touch()
    (entry,) = read_folder(raw).entries
    assert (entry.dialogue.utterances[0].text, entry.dialogue.utterances[0].media) == (
        "\u00e9",
        f"{apart}.mp4",
    )


def test_a_task_that_only_bears_the_name_of_mesc_s_keeps_its_labels(tmp_path):
    own = {"name": "client_emotion", "about": "therapist", "labels": ["x", "y"]}
    lines = [dialogue(i) for i in range(6)]
    for value in lines:
        value["utterances"][0].pop("mood")
        value["utterances"][1] = {"speaker": "therapist", "text": "Go on.", "client_emotion": "x"}
        value["utterances"] *= 2
    raw = write(tmp_path / "raw", *lines, labels={"tasks": [own]})
    folder = run_prepare("--dataset=dialogues", f"--raw={raw}", f"--data_dir={tmp_path / 'd'}")
    last = max(SampleSource(folder, "train"), key=lambda sample: sample.turn)
    assert last.labels == {"client_emotion": "x"}
    assert [u.labels for u in last.history] == [{}, {"client_emotion": "x"}]


LABEL_ERRORS = [
    ({"tasks": []}, "tasks: expected a list of tasks"),
    ({"tasks": [], "taks": 1}, "unknown ['taks']"),
    ({"tasks": [{"name": "A"}]}, "tasks[0]: name: expected lower-case letters"),
    ({"tasks": [{"name": "text"}]}, "tasks[0] text: name: 'text' has another meaning"),
    ({"tasks": [{"name": "client_text"}]}, "client_text: name: 'text' has another meaning"),
    ({"tasks": [{"name": "a", "labels": ["x"]}]}, "labels: expected at least two, got ['x']"),
    (
        {"tasks": [{"name": "a", "labels": ["x", 3]}]},
        "labels: expected lines of text without < and >, got [3]",
    ),
    ({"tasks": [{"name": "a", "labels": ["x", "X"]}]}, "['x'] is there twice"),
    ({"tasks": [{"name": "a", "labels": ["x", "<video>"]}]}, "got ['<video>']"),
    ({"tasks": [{"name": "a", "labels": ["x", "y."]}]}, "'y.' begins or ends with punctuation"),
    ({"tasks": [{"name": "a", "labels": ["x", "y"], "about": "me"}]}, "about: expected client or"),
    ({"tasks": [{"name": "a", "labels": ["x", "y"], "caption": "A:"}]}, "caption: expected a line"),
    (
        {"tasks": [{"name": "a", "labels": ["x", "y"], "aliases": {"z": "w"}}]},
        "aliases: ['w'] is not one of the labels",
    ),
    ({"tasks": [{"name": "a", "labels": ["x", "y"]}] * 2}, "tasks: two are written as 'a'"),
    (
        {"tasks": [{"name": name, "labels": ["x", "y"]} for name in ("a", "client_a")]},
        "tasks: two are written as 'a'",
    ),
    (
        {"tasks": [{"name": "a", "labels": ["x", "y"], "caption": "therapist's Response"}]},
        '"Therapist\'s response:" would be taken for each other',
    ),
    (
        {"tasks": [{"name": "a", "labels": ["x", "y"], "caption": "Therapist response"}]},
        "\"Therapist's response:\" and 'Therapist response:' would be taken for each other",
    ),
    (
        {"instruction": "Say {a[0]}.", "tasks": [{"name": "a", "labels": ["x", "y"]}]},
        "instruction: expected only ['{a}'] in braces",
    ),
    (
        {"instruction": "Say {a.", "tasks": [{"name": "a", "labels": ["x", "y"]}]},
        "instruction: expected only ['{a}'] in braces",
    ),
    (
        {"instruction": "Say {b}.", "tasks": [{"name": "a", "labels": ["x", "y"]}]},
        "instruction: expected only ['{a}'] in braces",
    ),
    ({"reply": 1, "tasks": [{"name": "a", "labels": ["x", "y"]}]}, "reply: expected true or false"),
]


@pytest.mark.parametrize(("labels", "message"), LABEL_ERRORS)
def test_errors_of_labels_json(tmp_path, labels, message):
    raw = write(tmp_path / "raw", *GOOD, labels=labels)
    with pytest.raises(ConfigError) as error:
        read_folder(raw)
    assert str(error.value).startswith(f"{raw / 'labels.json'}: ")
    assert message in str(error.value)


def test_labels_are_described_or_inferred(tmp_path):
    space = read_folder(write(tmp_path / "raw", *GOOD)).space
    assert parse_labels(space.dump(), "x") == space
    assert [task.field for task in space.tasks] == ["Client's mood:", "Therapist's act:"]
    assert space["mood"].normalise(" At Ease. ") == "calm"
    assert space.reply
    both = [dialogue(i) for i in range(3)]
    for i, own in enumerate(both):
        for said in own["utterances"]:
            said.pop("act", None)
            said["mood"] = ("calm", "tense")[i % 2]
    corpus = read_folder(write(tmp_path / "both", *both, labels=None))
    assert corpus.is_inferred
    assert corpus.space.names == ("client_mood", "therapist_mood")
    assert corpus.entries[1].dialogue.utterances[1].labels == {"therapist_mood": "tense"}
    with pytest.raises(DataError, match=r"labels found: tasks\[0\] act: labels: expected at"):
        read_folder(write(tmp_path / "one", line(mood=None), labels=None))
    bare = dialogue()
    bare["utterances"][1].pop("act")
    bare["utterances"][0]["mood"] = None
    with pytest.raises(DataError, match="no utterance has a label"):
        read_folder(write(tmp_path / "none", bare, labels=None))


def test_people_stay_in_one_split_and_labels_are_spread(tmp_path):
    lines = []
    for i in range(60):
        own = dialogue(i, client=f"c{i // 3}")
        own["utterances"][0]["mood"] = "tense" if i // 3 % 5 == 0 else "calm"
        lines.append(own)
    corpus = read_folder(write(tmp_path / "raw", *lines))
    parts = split_entries(corpus, val_share=0.2, fold=1, seed=0)
    assert {name: len(own) for name, own in parts.items()} == {"train": 36, "val": 12, "test": 12}
    people = {name: {e.client for e in own} for name, own in parts.items()}
    assert not people["train"] & people["val"] | people["train"] & people["test"]
    tense = {n: sum(e.dialogue.utterances[0].labels["mood"] == "tense" for e in own)
             for n, own in parts.items()}  # fmt: skip
    assert tense == {"train": 6, "val": 3, "test": 3}
    assert split_entries(corpus, 0.2, 1, 0) == parts
    assert split_entries(corpus, 0.2, 1, 1) != parts
    given = [dict(own, split=("train", "val", "test")[i % 3]) for i, own in enumerate(lines)]
    corpus = read_folder(write(tmp_path / "raw", *given))
    with pytest.raises(DataError, match=r"line 2: 'c0' is in val, and in train at .* line 1"):
        split_entries(corpus, 0.2, 1, 0)
    corpus = read_folder(write(tmp_path / "raw", *(dict(x, split="train") for x in GOOD)))
    with pytest.raises(DataError, match="val, test: nothing is in this split"):
        split_entries(corpus, 0.2, 1, 0)


@pytest.mark.parametrize("sizes", [(40, 30, 20, 10), (1, 1, 1), (5, 1, 1, 1, 1, 1), (9,) * 20])
def test_large_groups_are_not_held_out(tmp_path, sizes):
    """Checks that train is the largest part, and val and test no larger than they must be."""
    people = [f"c{i}" for i, n in enumerate(sizes) for _ in range(n)]
    lines = [dialogue(i, client=who) for i, who in enumerate(people)]
    lines[0]["utterances"][0]["mood"] = "tense"  # the only one
    corpus = read_folder(write(tmp_path / "raw", *lines))
    for seed in range(5):
        parts = split_entries(corpus, 0.1, 1, seed)
        held = sorted(len(parts[name]) for name in ("val", "test"))
        smallest = sorted(sizes)[:2]
        assert held[1] <= max(1.25 * 0.1 * sum(sizes), smallest[1])
        assert len(parts["train"]) >= sum(sizes) / 3
    tense = [e for e in parts["train"] if e.dialogue.utterances[0].labels["mood"] == "tense"]
    assert len(tense) == 1 or len(sizes) == 3


def write_clips(root: pathlib.Path, rows: list[dict], delimiter: str = ",") -> pathlib.Path:
    root.mkdir(exist_ok=True)
    with open(root / "clips.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return root


def test_single_clips_with_folds_and_people(tmp_path, capsys):
    raw = tmp_path / "raw"
    (raw / "a b").mkdir(parents=True)
    rows = []
    for i in range(12):
        write_video(raw / "a b" / f"{i}.mp4", frames=4, sound=0.5)
        rows.append({"file": f"a b/{i}.mp4", "label": ("Happy", "sad")[i % 2], "fold": i % 3 + 1})
        rows[-1] |= {"speaker": f"p{i // 2}", "text": "a; b" if i else ""}
    write_clips(raw, rows, ";")
    args = ["--dataset=dialogues", f"--raw={raw}", f"--data_dir={tmp_path / 'd'}", "--fold=2"]
    args += ["--num_frames=2", "--image_size=32", "--val_share=0.3"]
    assert main(["prepare", *args, "--check"]) == 2
    assert "a person belongs to one split" in capsys.readouterr().err
    write_clips(raw, [{k: v for k, v in row.items() if k != "speaker"} for row in rows], ";")
    assert main(["prepare", *args, "--check"]) == 0
    assert "  Happy: train 3, val 1, test 2" in capsys.readouterr().out
    assert not (tmp_path / "d").exists()
    folder = run_prepare(*args)
    space = data_labels(folder)
    assert (space.names, space["label"].labels, space.reply) == (
        ("label",),
        ("Happy", "sad"),
        False,
    )
    test = {s.id: s for s in SampleSource(folder, "test")}
    assert set(test) == {f"a b/{i}" for i in (1, 4, 7, 10)}
    assert test["a b/4"].labels == {"label": "Happy"}
    assert test["a b/1"].client_text == "a; b"
    assert test["a b/4"].frames.shape == (2, 32, 32, 3)
    assert len(test["a b/4"].fbank) > 0
    media = json.loads((folder / BUILD_REPORT).read_text())["media"]
    assert media["test"]["video"] == {"ok": 4}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,lable\na.mp4,x\n", "line 1: expected a column label"),
        ("file,label,agee\na.mp4,x,3\n", "line 1: unknown key 'agee'"),
        ("file,label,label\na.mp4,x,y\n", "line 1: the column ['label'] occurs twice"),
        ('"file,label\n', "line 1: not CSV"),
        ("file,label\n./,x\nb,y\n", "line 2: file: expected a path"),
        ("file,label\na.mp4\n", "line 2: expected 2 fields, got 1"),
        ("file,label\na.mp4,x,y\n", "line 2: expected 2 fields, got 3; a text with"),
        ("file,label\n,x\nb,y\n", "line 2: file: expected a path"),
        ("file,label\n../a.mp4,x\nb,y\n", "line 2: file: expected a path inside the folder"),
        ("file,label\na.mp4,\nb,y\nc,x\n", "line 2: label: expected a label"),
        ("file,label\na.mp4,x\nb.mp4,y\n", "line 2: media: there is no a.mp4"),
        ("file,label,split\na.mp4,x,dev\nb,y,train\n", "line 2: split: expected one of"),
        ("file,label,fold\na.mp4,x,one\nb,y,1\n", "line 2: fold: expected a number, got 'one'"),
        ('file,label\n"a.mp4,x\n', "not CSV"),
        ("file,label\n", "labels: expected at least two"),
    ],
)
def test_broken_clips_are_named(tmp_path, text, message):
    (tmp_path / "clips.csv").write_text(text)
    with pytest.raises((DataError, ConfigError), match=r"clips\.csv") as error:
        read_folder(tmp_path)
    assert message in str(error.value)


def test_the_synthetic_data_set_in_this_format_has_the_same_samples(synthetic, tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "clips").symlink_to(synthetic.raw / "clips")
    (raw / "labels.json").write_text((synthetic.folder / "labels.json").read_text())
    found, start = read_dialogues(synthetic.raw), 0
    with open(raw / "dialogues.jsonl", "w") as file:
        for split, share in SPLIT_SHARES.items():
            stop = len(found) if split == "test" else start + round(share * len(found))
            for own, _ in found[start:stop]:
                said = []
                for i, u in enumerate(own.utterances):
                    clip = {"media": f"clips/{own.id}_{i}.mp4"} if u.speaker == CLIENT else {}
                    emotion = {CLIENT_EMOTION: "emotion", THERAPIST_EMOTION: "emotion"}
                    labels = {emotion.get(task, STRATEGY): x for task, x in u.labels.items()}
                    said.append({"speaker": u.speaker, "text": u.text, **clip, **labels})
                about = {"problem": own.problem_type, "situation": own.situation}
                entry = {"id": own.id, "split": split, **about, "utterances": said}
                file.write(json.dumps(entry) + "\n")
            start = stop
    arguments = ["--num_frames=4", "--image_size=32", f"--data_dir={tmp_path / 'data'}"]
    folder = run_prepare("--dataset=dialogues", f"--raw={raw}", *arguments)
    assert data_labels(folder) == data_labels(synthetic.folder)
    for split in SPLIT_SHARES:
        ours = {s.id: s for s in SampleSource(folder, split)}
        theirs = {
            s.id: dataclasses.replace(s, cue="") for s in SampleSource(synthetic.folder, split)
        }
        assert ours == theirs
        for name, sample in ours.items():
            assert (sample.frames == theirs[name].frames).all()
            assert (sample.fbank == theirs[name].fbank).all()


def test_the_example_of_the_docs_learns_what_is_seen_and_heard(tmp_path):
    """Runs the script and the commands of docs/data.md, from an empty folder to metrics."""
    text = (ROOT / "docs" / "data.md").read_text()
    section = text.partition("### From nothing to a trained model")[2]
    (tmp_path / "make_data.py").write_text(section.split("```python\n")[1].split("```")[0])
    commands = section.split("```\npython make_data.py")[1].split("```")[0]
    commands = f"python make_data.py{commands}".replace("configs/", f"{ROOT}/configs/")
    flags = os.environ["XLA_FLAGS"].split()
    flags = " ".join(f for f in flags if "device_count" not in f)  # one device, as there
    for command in commands.strip().split("\n"):
        done = subprocess.run(
            [sys.executable, *command.split()[1:]],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
    metrics = json.loads((tmp_path / "runs" / "mine" / "metrics.json").read_text())
    assert metrics["label_tasks"] == ["mood", "act"]
    assert metrics["shared"] == {}
    (system,) = metrics["systems"]
    assert (system["n"], system["standard"]["mood"]["accuracy"]) == (6, 100)
    best = max(b["standard"]["mood"]["accuracy"] for b in metrics["baselines"].values()
               if "mood" in b["standard"])  # fmt: skip
    assert best < 100
