"""Tests the model card's index of results, as the Hugging Face hub reads it."""

from types import SimpleNamespace

import yaml
from huggingface_hub import ModelCardData

from mm_jax.data.records import CLIENT_EMOTION, STRATEGY
from mm_jax.evaluation.card import eval_results, licence
from mm_jax.evaluation.scores import MESC_TASKS, titles


def system(modality, first):
    tasks = {
        CLIENT_EMOTION: SimpleNamespace(accuracy=first, weighted_f1=first + 1),
        STRATEGY: SimpleNamespace(accuracy=first + 2, weighted_f1=None),
    }
    reply = SimpleNamespace(bleu2=first + 3, rouge_l=first + 4)
    standard = SimpleNamespace(tasks=tasks, response=reply)
    return SimpleNamespace(modality=modality, history_labels="gold", standard=standard)


def test_every_score_stands_under_its_own_task_and_input():
    metrics = SimpleNamespace(dataset="mesc", split="test", titles=titles(MESC_TASKS))
    found = [
        r for s in (system("text", 10.0), system("av", 50.0)) for r in eval_results(metrics, s)
    ]
    text = ModelCardData(model_name="m", eval_results=found).to_yaml()
    (model,) = yaml.safe_load(text)["model-index"]
    scores = {
        (result["dataset"]["config"].split(",")[0], metric["name"]): metric["value"]
        for result in model["results"]
        for metric in result["metrics"]
    }
    names = ("T1 client emotion: accuracy", "T1 client emotion: weighted_f1")
    names += ("T3 strategy: accuracy", "reply: bleu-2", "reply: rouge-l")
    want = {("text", name): 10.0 + i for i, name in enumerate(names)}
    assert scores == want | {("av", name): 50.0 + i for i, name in enumerate(names)}


def test_a_source_names_its_licence_or_none(tmp_path):
    assert licence(str(tmp_path)) == ""
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: mit\n---\n# A model\n")
    assert licence(str(tmp_path)) == "mit"
    card.write_text("---\nlicense: [mit\n---\n")  # damaged
    assert licence(str(tmp_path)) == ""
