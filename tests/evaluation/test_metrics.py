import numpy as np
import pytest

from mm_jax.data.answers import format_answer, parse_answer
from mm_jax.data.labels import built_in
from mm_jax.evaluation import metrics
from mm_jax.evaluation.predictions import PredictionRow

LABELS = ("a", "b", "c")
MESC, DFEW = built_in("mesc"), built_in("dfew")


def test_label_metrics_by_hand():
    gold = ["a", "a", "a", "b", "b", "a"]
    got = metrics.label_metrics(gold, ["a", "a", "b", "b", "", "a"], LABELS)
    assert got.accuracy == pytest.approx(100 * 4 / 6)
    assert got.recall == {"a": 75.0, "b": 50.0, "c": None}
    assert got.uar == pytest.approx(62.5)
    f1_a, f1_b = 2 * 1.0 * 0.75 / 1.75, 0.5  # precision 3/3 and 1/2
    assert got.weighted_f1 == pytest.approx(100 * (4 * f1_a + 2 * f1_b) / 6)
    assert got.macro_f1 == pytest.approx(100 * (f1_a + f1_b) / 2)
    assert got.parse_rate == pytest.approx(100 * 5 / 6)
    assert got.confusion[1] == [0, 1, 0, 1]  # gold b: one right, one unparseable
    low, high = got.interval
    assert low < got.accuracy < high


def test_unparseable_is_wrong_in_standard_and_dropped_in_paper_compat():
    rows = [
        PredictionRow(
            id="x",
            label_space="dfew",
            status="ok",
            gold={"client_emotion": "sad"},
            predicted={"client_emotion": p},
        )
        for p in ("sad", "", "", "happy")
    ]
    got = metrics.evaluate_rows(rows, DFEW)
    assert got.standard.tasks["client_emotion"].accuracy == 25.0
    assert got.standard.tasks["client_emotion"].n == 4
    assert got.paper_compat.tasks["client_emotion"].model_dump() == {
        "n": 2,
        "accuracy": 50.0,
        "weighted_f1": pytest.approx(100 * 2 / 3),
    }


def test_bootstrap_interval_matches_the_binomial():
    gold = ["a"] * 400
    predicted = ["a"] * 300 + ["b"] * 100
    low, high = metrics.label_metrics(gold, predicted, LABELS).interval
    half = 1.96 * 100 * np.sqrt(0.75 * 0.25 / 400)
    assert low == pytest.approx(75 - half, abs=0.6)
    assert high == pytest.approx(75 + half, abs=0.6)


def test_response_metrics():
    gold = ["I hear how sad you are.", "What would that entail?"]
    perfect = metrics.response_metrics(gold, gold)
    assert perfect.bleu2 == pytest.approx(100)
    assert perfect.rouge_l == pytest.approx(100)
    assert perfect.sacrebleu == pytest.approx(100)
    assert "tok:13a" in perfect.sacrebleu_signature
    empty = metrics.response_metrics(gold, ["", ""])
    assert (empty.bleu2, empty.rouge_l, empty.empty_rate) == (0, 0, 100)
    half = metrics.response_metrics(gold, [gold[0], ""])
    assert half.rouge_l == pytest.approx(50)  # the empty one counts
    refused = metrics.response_metrics(gold, ["I’m sorry, but I can't.", "Sure."])
    assert refused.refusal_rate == 50


def test_distinct_by_hand():
    assert metrics.distinct([["a", "b", "a"], ["a"]], 1) == pytest.approx(50)
    assert metrics.distinct([["a", "b", "a"], ["a", "b"]], 2) == pytest.approx(100 * 2 / 3)
    assert metrics.distinct([[]], 1) == 0


def test_paper_compat_responses_use_the_first_line_and_mostly_unigrams():
    got = metrics.paper_response_metrics(["a b c d"], ["a b c d\nand much more text"])
    assert got.bleu2 == pytest.approx(100)
    one = metrics.paper_response_metrics(["a b c d"], ["a x c y"]).bleu2
    assert one == 0 or one < 1  # unsmoothed: no common bigram
    assert metrics.paper_response_metrics(["a"], [""]).n == 0


def test_bertscore_says_why_it_is_not_computed():
    assert metrics.bert_scores(["a"], ["b"], "")["status"].startswith("not computed: no model")


ANSWER = (
    "Client's emotion: Anger\nTherapist's emotion: **neutral**\n"
    "therapist strategy: Open-ended question.\nTherapist's response: First.\nSecond line."
)


def test_parser_reads_variants_and_keeps_lines():
    got = parse_answer(ANSWER, MESC)
    assert got.labels == {
        "client_emotion": "anger",
        "therapist_emotion": "neutral",
        "strategy": "open question",
    }
    assert got.response == "First.\nSecond line."
    assert got.status == "ok"


@pytest.mark.parametrize(
    "line",
    ["Client's emotion: anger or joy", "Client's emotion: annoyed", "emotion: anger", ""],
)
def test_parser_does_not_guess(line):
    text = ANSWER.replace("Client's emotion: Anger", line)
    got = parse_answer(text, MESC)
    assert got.labels["client_emotion"] == ""
    assert got.status == "unparseable: client_emotion"


def test_conflicting_lines_are_unparseable():
    got = parse_answer("Client's emotion: joy\n" + ANSWER, MESC)
    assert got.labels["client_emotion"] == ""
    same = parse_answer("Client's emotion: anger\n" + ANSWER, MESC)
    assert same.labels["client_emotion"] == "anger"


def test_format_and_parse_are_inverse():
    labels = {
        "client_emotion": "fear",
        "therapist_emotion": "joy",
        "strategy": "guiding the pace and depth of the conversation",
    }
    got = parse_answer(format_answer(labels, "Yes.\n\nGo on.", MESC), MESC)
    assert (got.labels, got.response) == (labels, "Yes.\n\nGo on.")
    assert parse_answer("Client's emotion: surprised", DFEW).labels == {
        "client_emotion": "surprise"
    }


def test_bertscore_with_a_tokenizer_that_does_not_know_its_limit(tmp_path):
    """Such a tokenizer has a limit of 10^30, which the fast tokenizers cannot take."""
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2Model

    from mm_jax.data.tokenizer import train

    backend = train(["hello there, how are you today?"] * 50, 300).backend
    special = dict(cls_token="<|im_start|>", sep_token="<|im_end|>", pad_token="<|endoftext|>")
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(tmp_path)
    size = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    config = Qwen2Config(vocab_size=320, num_key_value_heads=1, **size)
    Qwen2Model(config).save_pretrained(tmp_path)
    same, other = ["hello there"], ["how are you today?"]
    found = metrics.bert_scores(same, same, str(tmp_path))
    assert found["status"] == "ok"
    assert found["raw"] == pytest.approx(100, abs=0.1)
    assert metrics.bert_scores(same, other, str(tmp_path))["raw"] < 99.9
