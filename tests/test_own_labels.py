"""Tests the whole chain on labels that no code knows: four tasks, twenty labels, no replies."""

import dataclasses
import json
import random
import re
import shutil

import pytest

from mm_jax.__main__ import main
from mm_jax.config.load import read_config
from mm_jax.data.datasets.common import SampleSource
from mm_jax.data.labels import built_in, parse_labels
from mm_jax.data.records import Sample
from mm_jax.evaluation.predictions import PredictionRow, gold_of, write_predictions
from mm_jax.evaluation.systems import label_rows
from mm_jax.generation.predictor import label_table
from mm_jax.run.build import Run, data_labels
from tests.conftest import run_prepare, tiny_config
from tests.support.runs import train

# The tokens of some labels begin those of others.
FEELINGS = [f"feeling {i}" for i in range(20)]
TASKS = [{"name": "feeling", "caption": "What (is) felt?", "labels": FEELINGS}]
TASKS += [{"name": f"trait_{x}", "labels": ["Low", "Low or so", "high"]} for x in "abc"]


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Builds a data set and trains a step on it: (data folder, run folder)."""
    base, dice = tmp_path_factory.mktemp("own"), random.Random(0)
    raw = base / "raw"
    raw.mkdir()
    (raw / "labels.json").write_text(json.dumps({"reply": False, "tasks": TASKS}))
    with open(raw / "dialogues.jsonl", "w") as file:
        for i in range(12):
            said = [
                {"speaker": "client", "text": f"Word {dice.randint(0, 9)}.", "media": None}
                | {task["name"]: dice.choice(task["labels"]) for task in TASKS}
                for _ in range(3)
            ]
            file.write(json.dumps({"id": f"d{i}", "utterances": said}) + "\n")
    folder = run_prepare("--dataset=dialogues", f"--raw={raw}", f"--data_dir={base / 'data'}")
    config = tiny_config(folder)
    config.data.update(history="text", history_tokens=64, previous_labels=2)
    config.model.parts = ()
    config.stages = ("sft",)
    config.stage.sft.update(steps=1, trainable=("language_model",), select_by="labels")
    train(config, base / "run")
    return folder, base / "run"


def rows_of(run):
    lines = (run / "predictions.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_every_task_is_predicted_and_reported(own, capsys):
    _, run = own
    regimes = ["--history_labels", "gold", "predicted", "none"]
    assert main(["predict", f"--checkpoint={run}", *regimes]) == 0
    rows = rows_of(run)
    names = [task["name"] for task in TASKS]
    assert {r["modality_asked"] for r in rows} == {"text"}  # all that this model can read
    for row in rows:
        assert list(row["gold"]) == list(row["predicted"]) == names
        assert all(len(row["probabilities"][t["name"]]) == len(t["labels"]) for t in TASKS)
        assert row["raw_text"].startswith("What (is) felt?: feeling ")
        assert row["predicted"]["feeling"] in FEELINGS
    assert main(["evaluate", f"--checkpoint={run}"]) == 0
    text = (run / "report.html").read_text()
    for title in ("T1 feeling", "T2 trait a", "T3 trait b", "T4 trait c"):
        assert title in text
    assert re.search(r"% of the labels of T1 feeling\s+are right", text)
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["label_tasks"] == names
    assert set(metrics["systems"][0]["standard"]) == set(names)  # no replies
    assert main(["study", f"--checkpoint={run}", "--limit=4"]) == 0
    assert main(["safety", f"--checkpoint={run}"]) == 2
    assert "label space own has no replies" in capsys.readouterr().err


def test_a_label_whose_tokens_begin_another_s_is_scored_with_its_end(own):
    """Without it, "Low" would never be less likely than "Low or so"."""
    _, run = own
    prompter = Run.open(read_config(run / "config.json"), run).prompter
    space = prompter.label_space
    (after,) = prompter.ending_ids(space["trait_a"])
    assert after == prompter.lead_ids(space["trait_b"].field, first=False)[0]
    assert prompter.ending_ids(space["trait_c"]) == [prompter.tokenizer.end_id]
    table, lengths = label_table(prompter, "trait_a")
    for label, ids, length in zip(TASKS[1]["labels"], table, lengths, strict=True):
        assert ids[:length].tolist() == [*prompter.label_ids(label), after]
    plain = built_in("mesc")["strategy"]
    assert prompter.ending_ids(plain) == []  # nothing changes where no label begins another


def test_a_run_carries_its_labels(own, tmp_path, capsys):
    """Predicts, exports and imports without the data set; the export answers as the run does."""
    folder, run = own
    run = shutil.copytree(run, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["data"]["folder"] = str(tmp_path / "gone")
    (run / "config.json").write_text(json.dumps(config))
    history = tmp_path / "history.json"
    history.write_text(json.dumps([{"speaker": "Client", "text": "So.", "trait_a": "LOW"}]))
    asked = ["--text", "Well.", "--history", str(history), "--json"]
    assert main(["predict", f"--checkpoint={run}", *asked]) == 0
    ours = json.loads(capsys.readouterr().out)
    history.write_text(json.dumps([{"speaker": "Client", "text": "So.", "trait_a": "loud"}]))
    assert main(["predict", f"--checkpoint={run}", *asked]) == 2
    assert "trait_a: expected one of ['Low', 'Low or so', 'high']" in capsys.readouterr().err
    out = tmp_path / "out"
    export = ["export", f"--from={run}", "--layout=transformers", f"--out={out}", "--check"]
    assert main(export) == 0
    processor = json.loads((out / "processor_config.json").read_text())
    assert parse_labels(processor["prompt"]["label_space"], "x") == data_labels(folder)
    from tools import convert_checkpoint

    assert convert_checkpoint.main(["--from", str(out), "--out", str(tmp_path / "back")]) == 0
    history.write_text(json.dumps([{"speaker": "Client", "text": "So.", "trait_a": "LOW"}]))
    capsys.readouterr()
    assert main(["predict", f"--checkpoint={tmp_path / 'back'}", *asked]) == 0
    back = json.loads(capsys.readouterr().out)
    assert back["predicted"] == ours["predicted"]
    for task, chances in ours["probabilities"].items():
        assert back["probabilities"][task] == pytest.approx(chances, abs=1e-4)


def test_replies_are_evaluated_where_no_sample_has_a_label(trained, tmp_path):
    raw, run = tmp_path / "raw", tmp_path / "run"
    raw.mkdir()
    run.mkdir()
    with open(raw / "dialogues.jsonl", "w") as file:
        for i in range(9):
            said = [
                {"speaker": "client", "text": f"Word {i}.", "mood": ("calm", "tense")[i % 2]},
                {"speaker": "therapist", "text": "Go on."},
            ]
            if i > 5:
                del said[0]["mood"]
            split = ("train", "val", "test")[i // 3]
            file.write(json.dumps({"id": f"d{i}", "split": split, "utterances": said}) + "\n")
    folder = run_prepare("--dataset=dialogues", f"--raw={raw}", f"--data_dir={tmp_path / 'data'}")
    config = json.loads((trained / "config.json").read_text())
    config["data"]["folder"] = str(folder)
    (run / "config.json").write_text(json.dumps(config))
    rows = [
        PredictionRow(
            id=s.id,
            label_space="own",
            history_labels="gold",
            gold=gold_of(s, data_labels(folder)),
            predicted={"mood": "calm", "response": "Go on."},
            status="ok",
        )
        for s in SampleSource(folder, "test")
    ]
    write_predictions(run / "predictions.jsonl", rows)
    assert main(["evaluate", f"--checkpoint={run}"]) == 0
    (system,) = json.loads((run / "metrics.json").read_text())["systems"]
    assert set(system["standard"]) == {"response"}
    assert "No sample of this split has a label." in (run / "report.html").read_text()


@pytest.mark.parametrize("texts", [["你好吗我很难过"], ["a", "b"], ["Quite different.", "No."]])
def test_trivial_systems_need_neither_shared_words_nor_all_labels(texts):
    """Checks them where no word is in two texts, and where few samples have labels."""
    space = parse_labels({"reply": False, "tasks": TASKS[1:2]}, "x")
    samples = [
        Sample(str(i), str(i), texts[i % len(texts)] + str(i), {"trait_a": "Low"} if i < 5 else {})
        for i in range(20)
    ]
    samples[0] = dataclasses.replace(samples[0], labels={"trait_a": "high"})
    predicted = label_rows(samples, samples, space)
    for name, rows in predicted.items():
        assert all(row["trait_a"] in ("Low", "high") for row in rows), name


def test_a_run_from_before_is_resumed(config, tmp_path):
    """Configs named the label space; now the data set's is meant where they do not."""
    config.stages = ("sft",)
    config.stage.sft.steps = 1
    config.data.label_space = "mesc"
    train(config, tmp_path / "run")
    (tmp_path / "run" / "labels.json").unlink()
    config.data.label_space = ""
    train(config, tmp_path / "run", resume=True)
    assert read_config(tmp_path / "run" / "config.json").data.label_space == "mesc"


def test_data_sets_built_before_describe_their_labels_by_name(synthetic, tmp_path):
    old = shutil.copytree(synthetic.folder, tmp_path / "data")
    (old / "labels.json").unlink()
    assert data_labels(old) == built_in("mesc")
