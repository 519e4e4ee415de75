import csv
import json

import numpy as np
import pytest

from mm_jax.data import tokenizer
from mm_jax.data.datasets.common import DataError, SampleSource
from mm_jax.data.datasets.mesc import mesc_dataset_builder as mesc
from mm_jax.data.history import MemoryBudget
from mm_jax.data.labels import built_in
from mm_jax.evaluation.metrics import label_metrics
from mm_jax.evaluation.systems import label_rows
from tests.conftest import ROOT, run_prepare
from tests.support.media import write_video
from tools import history_report

REAL = ROOT.parent / "shared" / "data" / "mesc"


def rows_of(dialogue, count=4):
    for i in range(count):
        client = i % 2 == 0
        yield {
            "Utterance": f"line {i} of {dialogue}",
            "Speaker": "Client" if client else "Therapist",
            "Emotion": "anger" if client else "neutral",
            "Strategy": "undefined" if client else "Open question",
            "Dialogue_ID": str(dialogue),
            "Utterance_ID": str(i),
            "Season": "1",
            "Episode": "2",
            "StartTime": f"00:00:0{i},000",
            "EndTime": f"00:00:0{i},900",
        }


def write_raw(root, dialogues=6, with_train=True, change=lambda rows: rows, length=4):
    root.mkdir(parents=True, exist_ok=True)
    rows = change([r for d in range(dialogues) for r in rows_of(d, length)])
    with open(root / "MESC.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, mesc.COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    splits = {"val": [4], "test": [5]} | ({"train": [0, 1, 2, 3]} if with_train else {})
    for split, members in splits.items():
        entries = [
            {
                "problem_type": "Job Loss ",
                "situation": "It is  so.",
                "dialog": [
                    {"text": f"{r['Utterance']} The speaker looks calm.", "speaker": "user"}
                    for r in rows_of(d, length)
                ],
            }
            for d in members
        ]
        (root / f"{split}.json").write_text(json.dumps(entries))
    return root


def build(root, out, *arguments):
    return run_prepare(
        "--dataset=mesc", f"--raw={root}", f"--data_dir={out}", "--no-check_counts", *arguments
    )


def test_samples_clean_text_and_problem_type(tmp_path):
    folder = build(write_raw(tmp_path / "raw"), tmp_path / "data", "--clues")
    train = list(SampleSource(folder, "train"))
    assert len(train) == 8
    sample = next(s for s in train if s.id == "0_3")
    assert sample.client_text == "line 2 of 0"
    assert sample.client_clue == "The speaker looks calm."
    assert (sample.problem_type, sample.situation) == ("job loss", "It is so.")
    assert sample.target("strategy") == "open question"
    assert [u.text for u in sample.history] == ["line 0 of 0", "line 1 of 0"]


def test_without_train_json_no_split_has_the_fields_train_lacks(tmp_path):
    folder = build(write_raw(tmp_path / "raw", with_train=False), tmp_path / "data")
    for split in ("train", "val", "test"):
        for sample in SampleSource(folder, split):
            assert (sample.problem_type, sample.situation, sample.client_clue) == ("", "", "")
    with pytest.raises(DataError, match=r"train\.json"):
        build(tmp_path / "raw", tmp_path / "other", "--clues")


def test_media_from_clips_and_episodes_with_counted_reasons(tmp_path):
    media = tmp_path / "media"
    media.mkdir()
    write_video(media / "0_0.mp4")
    (media / "0_2.mp4").touch()
    write_video(media / "S1E2.mkv", frames=40, sound=4.0)
    folder = build(
        write_raw(tmp_path / "raw"),
        tmp_path / "data",
        f"--media={media}",
        "--num_frames=2",
        "--image_size=16",
    )
    by_id = {s.id: s for s in SampleSource(folder, "train")}
    assert by_id["0_1"].frames.shape == (2, 16, 16, 3)
    assert by_id["0_3"].video_status == "empty file"
    assert by_id["1_3"].video_status == "ok"  # cut from the episode
    assert len(by_id["1_3"].fbank) == 80
    report = json.loads((folder / "build_report.json").read_text())
    assert report["media"]["train"]["video"] == {"ok": 7, "empty file": 1}


def test_annotations_cannot_leave_the_media_root(tmp_path):
    def climb(rows):
        return [dict(r, Dialogue_ID="../0") if r["Dialogue_ID"] == "0" else r for r in rows]

    (tmp_path / "media").mkdir()
    write_video(tmp_path / "media" / "1_0.mp4")
    write_video(tmp_path / "0_0.mp4")
    folder = build(
        write_raw(tmp_path / "raw", change=climb),
        tmp_path / "data",
        f"--media={tmp_path / 'media'}",
        "--num_frames=2",
        "--image_size=16",
    )
    status = {s.dialogue_id: s.video_status for s in SampleSource(folder, "train")}
    assert status["../0"] == "outside the media root"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("Emotion", "bored", "Emotion: expected one of"),
        ("Speaker", "Doctor", "Speaker: expected"),
        ("StartTime", "soon", "StartTime/EndTime: expected HH:MM:SS,mmm"),
        ("Utterance_ID", "9", "Utterance_ID of dialogue 0: expected 0, got '9'"),
        ("Utterance", "other words", "matches 0 Dialogue_IDs"),
    ],
)
def test_bad_rows_are_named(tmp_path, field, value, message):
    def change(rows):
        rows[0 if field != "Utterance" else -4][field] = value
        return rows

    root = write_raw(tmp_path / "raw", change=change)
    with pytest.raises(DataError, match=message):
        mesc.read_splits(root, clues=False)


def test_other_counts_than_the_release_are_refused(tmp_path):
    splits = mesc.read_splits(write_raw(tmp_path / "raw"), clues=False)
    with pytest.raises(DataError, match="expected 3721 samples, got 8"):
        mesc.check_counts(splits)


@pytest.mark.skipif(not REAL.is_dir(), reason="needs the real MESC text")
def test_real_counts_and_trivial_systems(tmp_path):
    """Checks the counts of spec section 1, and the measured trivial systems to two decimals."""
    folder = run_prepare("--dataset=mesc", f"--raw={REAL}", f"--data_dir={tmp_path}")
    train, test = (list(SampleSource(folder, s)) for s in ("train", "test"))
    systems = label_rows(train, test, built_in("mesc"))

    def scores(system, task):
        gold, predicted = [s.target(task) for s in test], [p[task] for p in systems[system]]
        m = label_metrics(gold, predicted, built_in("mesc")[task].labels)
        return round(m.accuracy, 2), round(m.weighted_f1, 2)

    assert scores("majority", "client_emotion") == (40.53, 23.38)
    assert scores("repeat last label", "client_emotion") == (60.13, 58.75)
    assert scores("majority", "therapist_emotion") == (99.34, 99.01)
    assert scores("majority", "strategy") == (36.34, 19.38)
    assert scores("repeat last label", "strategy") == (37.22, 34.61)


def test_beam_builds_the_same_records(tmp_path):
    pytest.importorskip("apache_beam")
    media = tmp_path / "media"
    media.mkdir()
    write_video(media / "0_0.mp4")
    (media / "0_2.mp4").write_bytes(b"no video")
    write_video(media / "S1E2.mkv", frames=40, sound=4.0)
    raw = write_raw(tmp_path / "raw")
    arguments = [f"--media={media}", "--num_frames=2", "--image_size=16"]
    serial = build(raw, tmp_path / "serial", *arguments)
    beam = build(
        raw,
        tmp_path / "beam",
        *arguments,
        "--beam_runner=DirectRunner",
        "--beam_options=--direct_running_mode=multi_processing --direct_num_workers=2",
    )
    assert (serial / "build_report.json").read_text() == (beam / "build_report.json").read_text()
    for split in ("train", "val", "test"):
        for one, other in zip(SampleSource(serial, split), SampleSource(beam, split), strict=True):
            assert one == other
            np.testing.assert_array_equal(one.frames, other.frames)
            np.testing.assert_array_equal(one.fbank, other.fbank)


def test_history_report(tmp_path, capsys):
    """Reports on a small raw folder, where every number can be counted by hand."""
    raw = write_raw(tmp_path / "raw")
    tok = tokenizer.train(["Client: Therapist (anger) line of The speaker looks calm."] * 50, 320)
    tok.save(tmp_path / "tok")
    arguments = ["--raw", str(raw), "--tokenizer", str(tmp_path / "tok"), "--out", str(tmp_path)]
    assert history_report.main(arguments) == 0
    report = json.loads((tmp_path / "history_report.json").read_text())
    lines = [
        ("Client (anger)", " line 0 of 5"),
        ("Therapist(open question) (neutral)", " line 1 of 5"),
        ("Client (anger)", " line 2 of 5"),
        ("Therapist(open question) (neutral)", " line 3 of 5"),
    ]
    count = [len(tok.encode(a)) + len(tok.encode(b)) + 1 for a, b in lines]
    bare = report["utterances"]["whole line, without"]
    assert bare["tokens"] == pytest.approx(sum(count) / 4)
    assert bare["saved"] == pytest.approx(1 - 4 / sum(count))
    clue = len(tok.encode(" The speaker looks calm."))
    full = report["utterances"]["whole line, with clue sentences"]["tokens"]
    assert full == pytest.approx(sum(count) / 4 + clue)
    (row,) = report["histories"]  # the second reply; the first has no history
    assert (row["utterances"], row["memory_vectors"]) == (2, 2)
    assert row["compressor_tokens"] == sum(count[:2])
    text = sum(len(tok.encode(f"\n{a}")) + len(tok.encode(b)) for a, b in lines[:2])
    assert row["text_tokens"] == text
    assert row["text_cache_bytes"] == text * 57344
    assert (tmp_path / "history_report.png").stat().st_size > 5000
    assert "1.0x fewer" in capsys.readouterr().out
    for more, message in (
        (["--memory_vectors", "0"], "memory budget: expected at least 1"),
        (["--tokenizer", str(tmp_path / "none")], "has no tokenizer.json"),
        (["--raw", str(tmp_path / "none")], "MESC.csv does not exist"),
        (["--quality", "memory"], "--quality: expected NAME=RUN, got 'memory'"),
        (["--quality", f"memory={tmp_path}"], "metrics.json"),
    ):
        assert history_report.main([*arguments, *more]) == 2
        assert message in capsys.readouterr().err


def test_tokens_read_with_the_memory_kept(tmp_path):
    """Counts, for eight utterances, what each turn adds and its incomplete group read again."""
    raw = write_raw(tmp_path / "raw", length=8)
    tok = tokenizer.train(["Client: Therapist (anger) line of The speaker looks calm."] * 50, 320)
    for budget in (MemoryBudget(), MemoryBudget(2, 3)):
        rows = history_report.history_tokens(raw, "test", tok, budget)
        seen = [r["utterances"] for r in rows]
        assert seen == [2, 4, 6]
        afresh = [r["compressor_tokens"] for r in rows]
        once = [r["compressor_tokens_after_memory"] for r in rows]
        if budget == MemoryBudget():
            assert once == [afresh[0], *np.diff(afresh)]
        else:  # nothing is complete at 2; at 4 three utterances are
            assert once[:2] == afresh[:2]
            assert 3 * (afresh[2] / 6) * 0.8 < once[2] < 3 * (afresh[2] / 6) * 1.2


def test_a_media_folder_of_other_names_is_an_error(tmp_path):
    raw = write_raw(tmp_path / "raw")
    (tmp_path / "media").mkdir()
    write_video(tmp_path / "media" / "episode one.mp4")
    with pytest.raises(DataError, match=r"no media found.*holds episode one\.mp4.*S1E3\.mp4"):
        run_prepare(
            "--dataset=mesc",
            f"--raw={raw}",
            f"--media={tmp_path / 'media'}",
            f"--data_dir={tmp_path / 'data'}",
            "--no-check_counts",
        )


@pytest.mark.parametrize("encoding", ["utf-8-sig", "cp1252", "utf-16"])
def test_files_are_read_in_the_encodings_that_spreadsheets_save(tmp_path, encoding):
    def accents(rows):
        return [dict(r, Utterance=f"Zoé’s {r['Utterance']}") for r in rows]

    raw = write_raw(tmp_path / "raw", change=accents)
    for path in raw.iterdir():
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            text = text.replace("line ", "Zoé’s line ")
        path.write_bytes(text.encode(encoding))
    folder = build(raw, tmp_path / "data")
    assert next(iter(SampleSource(folder, "test"))).client_text.startswith("Zoé’s line")
