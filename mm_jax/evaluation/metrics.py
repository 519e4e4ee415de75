"""Metrics of predictions, in two named columns: `standard` and `paper_compat` (spec section 6).

standard: an unparseable field is wrong, an empty response scores 0, nothing is dropped.
paper_compat: what the released evaluation computes: rows with an unparseable field are dropped for
that field, the response is its first line, sentence BLEU with weights (0.99, 0.01).
"""

from __future__ import annotations

import collections
import functools
import pathlib
import re
import warnings
from collections.abc import Sequence

import numpy as np
from nltk.tokenize import NLTKWordTokenizer
from nltk.translate.bleu_score import SmoothingFunction, corpus_bleu, sentence_bleu
from nltk.translate.meteor_score import meteor_score
from sacrebleu.metrics import BLEU
from sklearn.metrics import confusion_matrix, f1_score, recall_score

from mm_jax.data.records import LABEL_SPACES
from mm_jax.rewards.similarity import rouge_l

BOOTSTRAP_DRAWS = 1000
NO_LABEL = "(unparseable)"
REFUSAL = re.compile(
    r"\b(i (can(no|')t|am unable to|'m unable to|am not able to) (help|assist|provide|answer|do "
    r"that)|as an ai\b|i'm sorry, but i)",
    re.IGNORECASE,
)


def label_metrics(
    gold: Sequence[str], predicted: Sequence[str], labels: Sequence[str], seed: int = 0
) -> dict:
    """The `standard` column of one task, in percent, over the fixed label list.

    `predicted` may hold "" (unparseable) or what is no label; both count as wrong. Macro-F1 and UAR
    are means over the labels that occur in `gold`; recall of an absent label is None. "interval" is
    the bootstrap 95 % interval of the accuracy (percentiles of 1,000 resamples of rows).
    """
    gold = list(gold)
    given = [p if p in labels else NO_LABEL for p in predicted]
    present = [label for label in labels if label in set(gold)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # labels that nothing was predicted as
        weighted = f1_score(gold, given, labels=labels, average="weighted", zero_division=0)
        macro = f1_score(gold, given, labels=present, average="macro", zero_division=0)
        recalls = recall_score(gold, given, labels=present, average=None, zero_division=0)
    right = np.array([g == p for g, p in zip(gold, given, strict=True)], float)
    low, high = mean_interval(right, seed)
    columns = [*labels, NO_LABEL]
    return {
        "n": len(gold),
        "accuracy": 100 * right.mean(),
        "interval": [100 * low, 100 * high],
        "weighted_f1": 100 * weighted,
        "macro_f1": 100 * macro,
        "uar": 100 * float(np.mean(recalls)),
        "recall": {
            label: 100 * float(recalls[present.index(label)]) if label in present else None
            for label in labels
        },
        "parse_rate": 100 * float(np.mean([p != NO_LABEL for p in given])),
        "labels": columns,
        "confusion": confusion_matrix(gold, given, labels=columns).tolist(),
    }


def mean_interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Bootstrap 95 % interval of a mean (percentiles of 1,000 resamples)."""
    draws = np.random.default_rng(seed).integers(len(values), size=(BOOTSTRAP_DRAWS, len(values)))
    low, high = np.percentile(values[draws].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def percent(values: np.ndarray) -> dict:
    """Of scores in [0, 1] (NaN: none): "n", "mean" and its bootstrap "interval" in percent, None
    where there are none."""
    own = values[~np.isnan(values)]
    if not len(own):
        return {"n": 0, "mean": None, "interval": None}
    low, high = mean_interval(own)
    return {"n": len(own), "mean": 100 * float(own.mean()), "interval": [100 * low, 100 * high]}


@functools.cache
def _word_tokenizer() -> NLTKWordTokenizer:
    return NLTKWordTokenizer()  # needs no downloaded data


def words(text: str) -> list[str]:
    """Lower-cased NLTK word tokens."""
    return _word_tokenizer().tokenize(text.lower())


def response_metrics(gold: Sequence[str], predicted: Sequence[str]) -> dict:
    """The `standard` column of the responses, in percent where it is a score.

    Corpus BLEU-2 (weights 0.5, 0.5, smoothing method 3), sacreBLEU with its signature, mean ROUGE-L
    F1 (stemmed), distinct-1/2 over all responses, mean length in words. Empty responses stay in.
    """
    tokens = [words(p) for p in predicted]
    references = [[words(g)] for g in gold]
    bleu2 = 0.0
    if any(tokens):
        bleu2 = corpus_bleu(
            references,
            tokens,
            weights=(0.5, 0.5),
            smoothing_function=SmoothingFunction().method3,
        )
    sacre = BLEU()
    sacre_score = sacre.corpus_score(list(predicted), [list(gold)]).score
    rouge = [rouge_l(g, p) for g, p in zip(gold, predicted, strict=True)]
    return {
        "n": len(tokens),
        "bleu2": 100 * bleu2,
        "sacrebleu": sacre_score,
        "sacrebleu_signature": str(sacre.get_signature()),
        "rouge_l": 100 * float(np.mean(rouge)),
        "distinct_1": distinct(tokens, 1),
        "distinct_2": distinct(tokens, 2),
        "length": float(np.mean([len(t) for t in tokens])),
        "empty_rate": 100 * float(np.mean([not p.strip() for p in predicted])),
        "refusal_rate": 100 * float(np.mean([refuses(p) for p in predicted])),
    }


def refuses(text: str) -> bool:
    """Whether a reply is a refusal, by its wording."""
    return bool(REFUSAL.search(text.replace("’", "'")))


def distinct(tokens: Sequence[Sequence[str]], n: int) -> float:
    """Different n-grams over all n-grams of all responses, in percent."""
    grams = [tuple(t[i : i + n]) for t in tokens for i in range(len(t) - n + 1)]
    return 100 * len(set(grams)) / len(grams) if grams else 0.0


def paper_label_metrics(gold: Sequence[str], predicted: Sequence[str]) -> dict:
    """The `paper_compat` column of one task: rows without a parseable label are dropped."""
    kept = [(g, p) for g, p in zip(gold, predicted, strict=True) if p]
    if not kept:
        return {"n": 0, "accuracy": None, "weighted_f1": None}
    kept_gold, kept_predicted = zip(*kept, strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weighted = f1_score(kept_gold, kept_predicted, average="weighted", zero_division=0)
    hits = np.mean([g == p for g, p in kept])
    return {"n": len(kept), "accuracy": 100 * float(hits), "weighted_f1": 100 * float(weighted)}


def paper_response_metrics(gold: Sequence[str], predicted: Sequence[str]) -> dict:
    """The `paper_compat` column of the responses: first line, sentence BLEU (0.99, 0.01)."""
    kept = [(g, p.split("\n", 1)[0]) for g, p in zip(gold, predicted, strict=True) if p.strip()]
    if not kept:
        return {"n": 0, "bleu2": None, "rouge_l": None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nltk warns of zero overlaps, which are meant here
        bleu = [sentence_bleu([words(g)], words(p), weights=(0.99, 0.01)) for g, p in kept]
    rouge = [rouge_l(g, p) for g, p in kept]
    return {
        "n": len(kept),
        "bleu2": 100 * float(np.mean(bleu)),
        "rouge_l": 100 * float(np.mean(rouge)),
    }


def bert_scores(gold: Sequence[str], predicted: Sequence[str], model: str) -> dict:
    """BERTScore F1 with a model folder on disk, in percent; "status" says why where it cannot run.

    `model` is the folder of the weights ("" for none). Its name tells the layer (roberta-large: 17;
    a name that bert-score does not know: the last) and the English baseline for "rescaled", which
    is None where bert-score ships none. An empty response scores 0 in both.
    """
    if not model:
        return {"status": "not computed: no model folder given (--bertscore_model)"}
    try:
        import bert_score
        from transformers import AutoConfig
    except ImportError as error:
        return {"status": f"not computed: {error}"}
    name = pathlib.Path(model).name
    known = bert_score.utils.model2layers
    pairs = [(p, g) for p, g in zip(predicted, gold, strict=True) if p.strip() and g.strip()]
    raw, code = np.zeros(0), ""
    try:
        layers = known.get(name) or AutoConfig.from_pretrained(model).num_hidden_layers
        if pairs:
            (_, _, f1), code = bert_score.score(
                *map(list, zip(*pairs, strict=True)),
                model_type=model,
                num_layers=layers,
                return_hash=True,
            )
            raw = f1.numpy()
    except (OSError, ValueError, RuntimeError, OverflowError) as error:
        return {"status": f"not computed: {error}"}
    table = pathlib.Path(bert_score.__file__).parent / "rescale_baseline" / "en" / f"{name}.tsv"
    rescaled = None
    if table.is_file():
        base = np.loadtxt(table, delimiter=",", skiprows=1)[layers, 3]  # layer, P, R, F
        rescaled = 100 * float(((raw - base) / (1 - base)).sum() / len(gold))
    return {
        "status": "ok",
        "raw": 100 * float(raw.sum() / len(gold)),
        "rescaled": rescaled,
        "hash": code.replace(model, name),
    }


def meteor(gold: Sequence[str], predicted: Sequence[str]) -> dict:
    """Mean METEOR in percent, where nltk's wordnet is on this machine; else why not."""
    try:
        values = [meteor_score([words(g)], words(p)) for g, p in zip(gold, predicted, strict=True)]
    except LookupError:
        return {"status": "not computed: nltk's wordnet is not installed"}
    return {"status": "ok", "value": 100 * float(np.mean(values))}


def damage(rows: Sequence[dict]) -> dict[str, int]:
    """What is wrong with predictions, counted by field; `standard` drops nothing of it."""
    found: collections.Counter = collections.Counter()
    for row in rows:
        for task, labels in LABEL_SPACES[row["label_space"]].items():
            label = row["predicted"].get(task)
            if row["gold"].get(task) and label not in labels:
                found[f"{task}: {'not a label' if label else 'unparseable'}"] += 1
        if row["gold"].get("response"):
            text = row["predicted"].get("response") or ""
            found["response: empty"] += not text.strip()
            found["response: a refusal"] += refuses(text)
        if row["status"].split(":")[0] in ("refused", "failed"):
            found[row["status"].split(":")[0]] += 1
    return {name: n for name, n in sorted(found.items()) if n}


def evaluate_rows(rows: Sequence[dict], bertscore_model: str = "") -> dict:
    """All metrics of prediction rows, by column and task."""
    space = LABEL_SPACES[rows[0]["label_space"]]
    out: dict = {"n": len(rows), "standard": {}, "paper_compat": {}}
    for task, labels in space.items():
        pairs = [
            (r["gold"][task], r["predicted"].get(task) or "") for r in rows if r["gold"].get(task)
        ]
        if not pairs:
            continue
        gold, predicted = zip(*pairs, strict=True)
        out["standard"][task] = label_metrics(gold, predicted, labels)
        out["paper_compat"][task] = paper_label_metrics(gold, predicted)
    if "response" in rows[0]["gold"]:
        gold = [r["gold"]["response"] for r in rows]
        predicted = [r["predicted"].get("response") or "" for r in rows]
        own = response_metrics(gold, predicted)
        own["bertscore"] = bert_scores(gold, predicted, bertscore_model)
        own["meteor"] = meteor(gold, predicted)
        out["standard"]["response"] = own
        out["paper_compat"]["response"] = paper_response_metrics(gold, predicted)
    out["status"] = dict(collections.Counter(r["status"].split(":")[0] for r in rows))
    out["damage"] = damage(rows)
    return out
