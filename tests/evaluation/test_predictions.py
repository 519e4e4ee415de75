"""Tests the reader and the writer of predictions.jsonl, and its rows."""

import json

import numpy as np
import pytest

from mm_jax.config.errors import ConfigError
from mm_jax.data.labels import built_in
from mm_jax.data.records import Sample
from mm_jax.evaluation.predictions import (
    PredictionRow,
    merge_shards,
    read_groups,
    read_predictions,
    row_of,
    write_predictions,
)
from mm_jax.generation.predictor import Prediction, label_accuracy

DFEW = built_in("dfew")
SAMPLE = Sample(
    id="a",
    dialogue_id="d",
    client_text="Hm.",
    labels={"client_emotion": "sad"},
    turn=3,
    video_status="missing",
)


def row(**changes):
    found = Prediction({"client_emotion": "happy"}, "text", "scored", probabilities={})
    made = row_of(SAMPLE, found, DFEW, "av", "none").dump()
    return {**made, **changes}


def write(path, *rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_a_row_has_the_files_fields_in_order():
    assert list(row(cue="audio")) == [
        "id", "dialogue_id", "turn", "label_space", "modality", "modality_asked", "history_labels",
        "gold", "predicted", "raw_text", "status", "finished", "video_status", "audio_status",
        "probabilities", "cue",
    ]  # fmt: skip
    assert row()["gold"] == {"client_emotion": "sad"}  # dfew has no replies
    assert row()["video_status"] == "missing"
    assert "cue" not in row()


def test_what_is_written_is_read_and_unknown_fields_are_ignored(tmp_path):
    path = write(tmp_path / "p.jsonl", row(), row(id="b", note="of another tool"))
    first, second = read_predictions(path)
    assert (first.system, first.outcome, second.id) == (("av", "none"), "scored", "b")
    assert first.right("client_emotion") == 0
    assert np.isnan(first.right("strategy"))
    write_predictions(tmp_path / "again.jsonl", [first])
    assert json.loads((tmp_path / "again.jsonl").read_text()) == row()


def test_history_labels_need_only_ids_and_labels(tmp_path):
    path = write(tmp_path / "p.jsonl", {"id": "a", "predicted": {"client_emotion": "sad"}})
    (found,) = read_predictions(path, required=("id", "predicted"))
    assert found == PredictionRow(id="a", predicted={"client_emotion": "sad"})
    with pytest.raises(
        ConfigError, match=r"p.jsonl line 1: missing fields \['gold', 'label_space'"
    ):
        read_predictions(path)


def chances(values):
    return {"probabilities": {"client_emotion": values}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_space": 3}, "label_space: expected str, got 3"),
        ({"modality_asked": ["av"]}, "modality_asked: expected one of"),
        ({"gold": "sad"}, "gold: expected dict, got 'sad'"),
        ({"gold": {"client_emotion": 1}}, "gold: expected text for every task"),
        ({"modality": "smell"}, "modality: expected one of"),
        ({"cue": 3}, "cue: expected str, got 3"),
        ({"turn": True}, "turn: expected int, got True"),
        ({"probabilities": "none"}, "probabilities: expected task -> label -> number"),
        (chances([0.5]), "probabilities: client_emotion: expected label -> number"),
        (chances({"sad": "0.5"}), "probabilities: client_emotion: sad: expected a number"),
        (chances({"sad": None}), "probabilities: client_emotion: sad: expected a number"),
        (chances({"sad": float("nan")}), "probabilities: client_emotion: sad: expected a number"),
        (
            chances({"sad": 75.0, "happy": 25.0}),
            "probabilities: client_emotion: sad: expected a number from 0 to 1, got 75.0 (per cent",
        ),
        (chances({"sad": 0.5}), "probabilities: client_emotion: expected to add up to 1, got 0.5"),
    ],
)
def test_errors_name_file_line_and_field(tmp_path, changes, message):
    path = write(tmp_path / "p.jsonl", row(), row(**changes))
    with pytest.raises(ConfigError) as error:
        read_predictions(path)
    assert str(error.value).startswith(f"{path} line 2: {message}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_space": "other"}, "label_space: expected 'dfew', got 'other'"),
        (chances({"joy": 1.0}), "probabilities: client_emotion: unknown labels ['joy']"),
        ({"probabilities": {"mood": {"sad": 1.0}}}, "probabilities: unknown task 'mood'"),
        ({"gold": {"client_emotion": "happy"}}, "the gold ['client_emotion'] are not those of"),
    ],
)
def test_rows_that_do_not_fit_the_data_set_are_refused(tmp_path, changes, message):
    path = write(tmp_path / "p.jsonl", row(**changes))
    with pytest.raises(ConfigError) as error:
        read_groups(path, {"a": SAMPLE}, DFEW, "split test of here", partial=False)
    assert str(error.value).startswith(f"{path}: id a: {message}")


def test_damaged_fields_are_unparseable_not_errors(tmp_path):
    damage = row(predicted={"client_emotion": 3, "response": "\ud800"}, probabilities=None)
    (found,) = read_predictions(write(tmp_path / "p.jsonl", damage))
    assert found.predicted == {"client_emotion": "", "response": "\ufffd"}
    assert found.distribution("client_emotion") == {}


def test_lone_surrogates_and_empty_shares_are_written_and_merged(tmp_path):
    out = PredictionRow(**(row(predicted={"response": "so \ud83d"}) | {"id": "a"}))
    write_predictions(tmp_path / "0", [out])
    write_predictions(tmp_path / "1", [])
    (merged,) = merge_shards([tmp_path / "0", tmp_path / "1"], ["a"])
    assert merged.response == "so \ufffd"


def test_shards_are_merged_in_the_order_of_one_process(tmp_path):
    parts = [tmp_path / "0", tmp_path / "1"]
    for part, names in zip(parts, ("ac", "b"), strict=True):
        rows = [row(id=n, history_labels=regime) for regime in ("none", "gold") for n in names]
        write(part, *rows)
    merged = merge_shards(parts, ["a", "b", "c"])
    assert [r.id for r in merged] == [*"abc", *"abc"]
    assert [r.history_labels for r in merged] == ["none"] * 3 + ["gold"] * 3
    assert not any(p.exists() for p in parts)


def test_label_accuracy_counts_refused_samples_as_wrong():
    labels = ({"client_emotion": "sad"}, {"client_emotion": ""})
    predictions = [Prediction(x, "text", "scored") for x in labels]
    assert label_accuracy(predictions, [SAMPLE] * 2) == {"client_emotion": 0.5}
