"""Tests the linear probe: its states against transformers, its scaling, and what it leaves out."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from scipy.sparse import csr_matrix

from mm_jax.__main__ import main
from mm_jax.config.load import read_config
from mm_jax.data import tokenizer
from mm_jax.data.datasets.common import SampleSource
from mm_jax.data.labels import built_in
from mm_jax.data.records import Sample
from mm_jax.evaluation import probe
from tests.conftest import tiny_config
from tests.support import checkpoints
from tests.support.runs import train

OTHERS = {"therapist_emotion": "neutral", "strategy": "others"}


@pytest.fixture(scope="module")
def run(synthetic, tmp_path_factory):
    """Trains one step on a released language model and predicts a few samples."""
    folder = tmp_path_factory.mktemp("probe")
    checkpoints.decoder(folder / "llama", family="llama")
    c = tiny_config(synthetic.folder)
    c.model.parts = ()
    c.stages = ("sft",)
    c.init_from.language_model = str(folder / "llama")
    c.stage.sft.update(steps=1, trainable=("language_model",))
    c.predict.max_new_tokens = 2
    train(c, folder / "run")
    arguments = ["--modality", "text", "--history_labels", "none"]
    assert main(["predict", "--checkpoint", str(folder / "run"), *arguments]) == 0
    return folder / "run"


def metrics_of(run, *options) -> dict:
    assert main(["evaluate", "--checkpoint", str(run), *options]) == 0
    return json.loads((run / "metrics.json").read_text())


def test_the_probe_is_a_trivial_system_and_its_states_are_kept(run, monkeypatch):
    found = metrics_of(run)["baselines"]["linear probe"]["standard"]
    assert set(found) >= {"client_emotion", "strategy"}
    assert found["client_emotion"]["n"] > 0
    assert "linear probe" in (run / "report.md").read_text()
    monkeypatch.setattr(probe, "last_states", None)  # not computed again
    assert metrics_of(run)["baselines"]["linear probe"]["standard"] == found
    assert "linear probe" not in metrics_of(run, "--no-probe")["baselines"]


def test_only_missing_states_are_computed_and_val_can_be_evaluated(run, tmp_path, monkeypatch):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    metrics_of(copy)
    arguments = ["--modality", "text", "--history_labels", "none", "--split", "val"]
    assert main(["predict", "--checkpoint", str(copy), *arguments]) == 0
    asked, last_states = [], probe.last_states
    monkeypatch.setattr(
        probe, "last_states", lambda *a: asked.append(len(a[-1])) or last_states(*a)
    )
    found = metrics_of(copy, "--split", "val")["baselines"]["linear probe"]["standard"]
    assert found["client_emotion"]["n"] > 0
    assert not asked  # val's were computed to choose the penalty
    with np.load(copy / probe.STATES_FILE) as stored:
        kept = {name: stored[name][:-3] for name in stored}
    np.savez(copy / probe.STATES_FILE, **kept)
    metrics_of(copy, "--split", "val")
    assert sum(asked) <= 3


def test_states_are_those_of_transformers(run):
    config = read_config(run / "config.json")
    samples = list(SampleSource(config.data.folder, "test", light=True))[:9]
    texts = [*map(probe.probe_text, samples), ("", ""), ("", "word " * 400)]
    got = probe.last_states(run, config, texts)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(run.parent / "llama").eval()
    tok = tokenizer.load(str(run / "tokenizer"))
    for (before, text), state in zip(texts, got, strict=True):
        ids = tok.encode(f"{before}\n{text}" if before else text or "\n")[-probe.LONGEST :]
        with torch.no_grad():
            hidden = theirs(torch.tensor([ids]), output_hidden_states=True).hidden_states
        np.testing.assert_allclose(state, hidden[1][0, -1].numpy(), atol=2e-5, rtol=1e-4)


def test_states_do_not_drown_the_labels_of_the_history(run, synthetic, monkeypatch):
    """Adds wide states of noise to features that tell all; val has a label that train lacks."""
    sizes, labels = (60, 12, 30), np.array(("joy", "anger", "neutral"))
    rng = np.random.default_rng(0)
    golds = [labels[rng.integers(3, size=n)] for n in sizes]
    splits = [
        [
            Sample(f"{k}_{i}", "d", "", OTHERS | {"client_emotion": str(g)})
            for i, g in enumerate(gold)
        ]
        for k, gold in enumerate(golds)
    ]
    tables = [csr_matrix(gold[:, None] == labels, dtype=float) for gold in golds]
    splits[1][0] = dataclasses.replace(splits[1][0], labels=OTHERS | {"client_emotion": "fear"})
    states = {s.id: 50 * rng.normal(size=400) for split in splits for s in split}
    monkeypatch.setattr(probe, "feature_tables", lambda *_: tables)
    monkeypatch.setattr(probe, "read_states", lambda *_: states)
    found = probe.probe_labels(run, read_config(run / "config.json"), *splits, built_in("mesc"))
    right = [row["client_emotion"] == g for row, g in zip(found, golds[2], strict=True)]
    assert np.mean(right) > 0.9


def test_a_source_that_is_gone_leaves_the_probe_out(run, tmp_path):
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("probe_states*"))
    config = json.loads((run / "config.json").read_text())
    config["init_from"]["language_model"] = str(tmp_path / "gone" / "x" / "y")
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    assert "linear probe" not in metrics_of(tmp_path / "run")["baselines"]
    found = metrics_of(tmp_path / "run", "--probe")
    assert "linear probe" not in found["baselines"]
    assert [line for line in found["left_out"] if "linear probe" in line and "gone" in line]


def test_the_probe_finds_what_only_the_states_tell():
    """Its penalty is chosen on val, and labels are found that neither words nor history tell."""
    rng = np.random.default_rng(0)
    labels = ["a", "b"] * 100
    states = rng.normal(size=(200, 8)) + np.array([label == "a" for label in labels])[:, None]
    rows = [probe.csr_matrix(x) for x in (states[:120], states[120:160], states[160:])]
    found = probe.probe(rows, labels[:120], labels[120:160])
    right = np.mean([x == y for x, y in zip(found, labels[160:], strict=True)])
    assert right > 0.8
    assert probe.probe(rows, ["a"] * 120, labels[120:160]) == ["a"] * 40
