"""Tests calibration, slices, paired tests and damage against values worked out by hand."""

import dataclasses

import numpy as np
import pytest

from mm_jax.data.labels import built_in
from mm_jax.data.records import Sample, Utterance
from mm_jax.evaluation import analysis, metrics
from mm_jax.evaluation.predictions import PredictionRow


def dfew_row(name, gold, predicted, p=None, status="scored"):
    return PredictionRow(
        id=name,
        label_space="dfew",
        modality="av",
        modality_asked="av",
        history_labels="none",
        status=status,
        gold={"client_emotion": gold},
        predicted={"client_emotion": predicted},
        probabilities={"client_emotion": p} if p else None,
    )


def test_calibration_by_hand():
    rows = [
        dfew_row("a", "sad", "sad", {"sad": 0.95, "happy": 0.05}),
        dfew_row("b", "happy", "sad", {"sad": 0.95, "happy": 0.05}),
        dfew_row("c", "sad", "sad", {"sad": 0.65, "happy": 0.35}),
        dfew_row("d", "sad", "", None),  # not scored: left out, and n says so
    ]
    got = analysis.calibration(rows, "client_emotion")
    assert got["n"] == 3
    assert got["ece"] == pytest.approx(100 * (2 / 3 * abs(0.95 - 0.5) + 1 / 3 * abs(0.65 - 1)))
    brier = (2 * 0.05**2 + 2 * 0.95**2 + 2 * 0.35**2) / 3
    assert got["brier"] == pytest.approx(brier)
    assert [(b["n"], b["accuracy"]) for b in got["bins"]] == [(1, 100), (2, 50)]
    assert analysis.calibration(rows[3:], "client_emotion") is None


def test_slices_count_every_row():
    base = Sample(id="", dialogue_id="", client_text="", labels={"client_emotion": "sad"})
    samples = {}
    for i in range(6):
        history = tuple(Utterance("client", "x") for _ in range(5 * i))
        samples[str(i)] = dataclasses.replace(base, id=str(i), history=history)
    rows = [dfew_row(str(i), "sad" if i < 4 else "fear", "sad") for i in range(6)]
    got = analysis.slices(rows, samples)
    assert list(got) == ["client emotion", "history, utterances"]  # the others do not vary
    emotions = got["client emotion"]
    assert (emotions["sad"]["n"], emotions["sad"]["client_emotion"]["mean"]) == (4, 100)
    assert (emotions["fear"]["n"], emotions["fear"]["client_emotion"]["mean"]) == (2, 0)
    lengths = got["history, utterances"]
    assert {k: v["n"] for k, v in lengths.items()} == {"0": 1, "1-10": 2, "11-20": 2, "21-30": 1}
    assert list(lengths) == ["0", "1-10", "11-20", "21-30"]


def test_paired_differences_see_what_unpaired_intervals_cannot():
    rng = np.random.default_rng(0)
    hard = rng.random(400)
    a, b = (hard < 0.50).astype(float), (hard < 0.47).astype(float)  # a is right where b is
    got = analysis.paired_difference(a, b)
    assert got["difference"] == pytest.approx((a - b).mean())
    assert 0 < got["interval"][0] < got["difference"] < got["interval"][1]
    assert got["p"] < 0.01
    assert analysis.paired_difference(a, a) == {
        "n": 400, "difference": 0, "interval": [0, 0], "p": 1,
    }  # fmt: skip
    back = analysis.paired_difference(b, a)
    assert back["difference"] == -got["difference"]
    one = analysis.paired_difference(np.ones(1), np.zeros(1))
    assert one["p"] == pytest.approx(1)  # a single row proves nothing
    four = analysis.paired_difference(np.ones(4), np.zeros(4))
    assert four["p"] == pytest.approx(2 / 16, abs=0.03)
    assert analysis.paired_difference(np.array([np.nan]), np.ones(1)) is None
    noise = rng.permutation(a)
    assert analysis.paired_difference(a, noise)["p"] > 0.05


def test_systems_are_compared_on_the_rows_both_have():
    main = [dfew_row(x, "sad", "sad") for x in "abcd"]
    other = [dfew_row(x, "sad", p) for x, p in zip("dcb", ("sad", "", "fear"), strict=True)]
    got = analysis.compare_systems(main, {"other": other, "strangers": [dfew_row("z", "sad", "")]})
    assert list(got) == ["other"]
    assert got["other"]["client_emotion"]["n"] == 3
    assert got["other"]["client_emotion"]["difference"] == pytest.approx(100 * 2 / 3)


def test_swap_test_finds_use_and_keeps_its_level():
    rng = np.random.default_rng(1)
    base = rng.normal(size=80)
    own, swapped = base + 0.4 + rng.normal(size=80), base + rng.normal(size=(3, 80))
    used = analysis.swap_test(own, swapped, draws=2000)
    assert used["p"] < 0.05
    assert used["gain"] == pytest.approx(np.mean(own - swapped.mean(axis=0)))
    same = np.repeat(base[None], 3, axis=0)
    assert analysis.swap_test(base, same, draws=200)["p"] == 1  # an input that changes nothing
    # Without an effect p is about uniform: at most 5 % of the time below 0.05 (here: 100 tries).
    low = 0
    for seed in range(100):
        values = np.random.default_rng(seed).normal(size=(4, 30))
        low += analysis.swap_test(values[0], values[1:], seed, draws=200)["p"] <= 0.05
    assert low <= 11  # 99.5 % of a binomial of 100 at 0.05


def test_damage_is_counted_and_nothing_is_dropped():
    """Damages 20 % of the predictions in every way in which a file can be."""
    gold = {
        "client_emotion": "anger",
        "therapist_emotion": "neutral",
        "strategy": "approval",
        "response": "I hear you.",
    }

    def row(**changes):
        return PredictionRow(
            id="x",
            label_space="mesc",
            status=changes.pop("status", "ok"),
            gold=gold,
            predicted={**gold, **changes},
        )

    damaged = [
        row(client_emotion="", status="unparseable: client_emotion"),
        row(client_emotion="happy"),  # no label of this task
        row(response=""),
        row(response="I'm sorry, but I can't help with that."),
        row(strategy="open question"),  # wrong, but whole
        dataclasses.replace(row(status="failed: HTTP 500"), predicted={}),
    ]
    rows = [row() for _ in range(24)] + damaged
    got = metrics.evaluate_rows(rows, built_in("mesc"))
    own = got.standard.tasks
    assert got.damage == {
        "client_emotion: not a label": 1,
        "client_emotion: unparseable": 2,
        "failed": 1,
        "response: a refusal": 1,
        "response: empty": 2,
        "strategy: unparseable": 1,
        "therapist_emotion: unparseable": 1,
    }
    assert {m.n for m in own.values()} | {got.standard.response.n} == {30}
    assert own["client_emotion"].accuracy == pytest.approx(100 * 27 / 30)
    assert own["strategy"].accuracy == pytest.approx(100 * 28 / 30)
    assert np.sum(own["client_emotion"].confusion) == 30
    assert own["client_emotion"].parse_rate == pytest.approx(100 * 27 / 30)
    assert got.standard.response.rouge_l < 100 * 28 / 30
    assert got.standard.response.empty_rate == pytest.approx(100 * 2 / 30)
    assert got.paper_compat.tasks["client_emotion"].n == 28


def test_bertscore_with_a_local_model_and_an_empty_reply(tmp_path):
    """Checks that any folder works, an empty reply scores 0, and known names are rescaled."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path / "tiny-bert"
    torch.manual_seed(0)
    vocabulary = {
        w: i
        for i, w in enumerate(
            ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat", "sat", "on", "mat"]
        )
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", model_max_length=64,
    ).save_pretrained(folder)  # fmt: skip
    size = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    BertModel(BertConfig(vocab_size=len(vocabulary), **size)).save_pretrained(folder)
    gold = ["the cat sat", "on the mat"]
    same = metrics.bert_scores(gold, gold, str(folder))
    assert same["status"] == "ok"
    assert same["raw"] == pytest.approx(100, abs=1e-3)
    assert same["rescaled"] is None
    assert "tiny-bert_L2" in same["hash"]
    half = metrics.bert_scores(gold, [gold[0], " "], str(folder))
    assert half["raw"] == pytest.approx(50, abs=1e-3)
    gone = metrics.bert_scores(gold, gold, str(tmp_path / "gone"))
    assert gone["status"].startswith("not computed: ")
