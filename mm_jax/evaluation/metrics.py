"""Computes metrics of predictions in two named columns (spec section 6).

standard: an unparseable field is wrong, an empty response scores 0, nothing is dropped.
paper_compat: as in the released evaluation, rows with an unparseable field are dropped for that
field, the response is its first line, and BLEU is per sentence with weights (0.99, 0.01).

All scores are percent, float64; intervals are bootstrap 95 % intervals over rows.
"""

from __future__ import annotations

import collections
import functools
import pathlib
import warnings
from collections.abc import Sequence

import numpy as np
from nltk.tokenize import NLTKWordTokenizer
from nltk.translate.bleu_score import SmoothingFunction, corpus_bleu, sentence_bleu
from nltk.translate.meteor_score import meteor_score
from sacrebleu.metrics import BLEU
from sklearn.metrics import confusion_matrix, f1_score, recall_score

from mm_jax.data.labels import LabelSpace
from mm_jax.evaluation.predictions import PredictionRow
from mm_jax.evaluation.scores import (
    Column,
    PaperReply,
    PaperTask,
    ReplyMetrics,
    Standard,
    SystemMetrics,
    TaskMetrics,
    mean_interval,
)
from mm_jax.evaluation.screen import refuses
from mm_jax.rewards.similarity import rouge_l

NO_LABEL = "(unparseable)"


def label_metrics(
    gold: Sequence[str], predicted: Sequence[str], labels: Sequence[str], seed: int = 0
) -> TaskMetrics:
    """Computes the `standard` column of one task over its fixed label list.

    `predicted` may hold "" (unparseable) or text that is not a label; both are wrong. Macro-F1 and
    UAR are means over the labels that occur in `gold`; the recall of an absent label is None.
    """
    gold = list(gold)
    given = [p if p in labels else NO_LABEL for p in predicted]
    present = [label for label in labels if label in set(gold)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of labels that are never predicted
        weighted = f1_score(gold, given, labels=labels, average="weighted", zero_division=0)
        macro = f1_score(gold, given, labels=present, average="macro", zero_division=0)
        recalls = recall_score(gold, given, labels=present, average=None, zero_division=0)
    right = np.array([g == p for g, p in zip(gold, given, strict=True)], float)
    low, high = mean_interval(right, seed)
    columns = [*labels, NO_LABEL]
    return TaskMetrics(
        n=len(gold),
        accuracy=100 * right.mean(),
        interval=(100 * low, 100 * high),
        weighted_f1=100 * weighted,
        macro_f1=100 * macro,
        uar=100 * np.mean(recalls),
        recall={
            label: 100 * recalls[present.index(label)] if label in present else None
            for label in labels
        },
        parse_rate=100 * np.mean([p != NO_LABEL for p in given]),
        labels=columns,
        confusion=confusion_matrix(gold, given, labels=columns).tolist(),
    )


@functools.cache
def _word_tokenizer() -> NLTKWordTokenizer:
    return NLTKWordTokenizer()  # needs no downloaded data


def words(text: str) -> list[str]:
    """Splits text into lower-cased NLTK word tokens."""
    return _word_tokenizer().tokenize(text.lower())


def response_metrics(
    gold: Sequence[str], predicted: Sequence[str], bertscore_model: str = ""
) -> ReplyMetrics:
    """Computes the `standard` column of the responses.

    Corpus BLEU-2 (weights 0.5, 0.5, smoothing method 3), sacreBLEU with its signature, mean ROUGE-L
    F1 (stemmed), distinct-1/2 over all responses, mean length in words. Empty responses count.
    """
    tokens = [words(p) for p in predicted]
    references = [[words(g)] for g in gold]
    bleu2 = 0.0
    if any(tokens):
        bleu2 = corpus_bleu(
            references, tokens, weights=(0.5, 0.5), smoothing_function=SmoothingFunction().method3
        )
    sacre = BLEU()
    sacre_score = sacre.corpus_score(list(predicted), [list(gold)]).score
    rouge = [rouge_l(g, p) for g, p in zip(gold, predicted, strict=True)]
    return ReplyMetrics(
        n=len(tokens),
        bleu2=100 * bleu2,
        sacrebleu=sacre_score,
        sacrebleu_signature=str(sacre.get_signature()),
        rouge_l=100 * np.mean(rouge),
        distinct_1=distinct(tokens, 1),
        distinct_2=distinct(tokens, 2),
        length=np.mean([len(t) for t in tokens]),
        empty_rate=100 * np.mean([not p.strip() for p in predicted]),
        refusal_rate=100 * np.mean([refuses(p) for p in predicted]),
        bertscore=bert_scores(gold, predicted, bertscore_model),
        meteor=meteor(gold, predicted),
    )


def distinct(tokens: Sequence[Sequence[str]], n: int) -> float:
    """Returns the share of different n-grams among the n-grams of all responses, in percent."""
    grams = [tuple(t[i : i + n]) for t in tokens for i in range(len(t) - n + 1)]
    return 100 * len(set(grams)) / len(grams) if grams else 0.0


def paper_label_metrics(gold: Sequence[str], predicted: Sequence[str]) -> PaperTask:
    """Computes the `paper_compat` column of one task, dropping rows without a parseable label."""
    kept = [(g, p) for g, p in zip(gold, predicted, strict=True) if p]
    if not kept:
        return PaperTask(n=0, accuracy=None, weighted_f1=None)
    kept_gold, kept_predicted = zip(*kept, strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weighted = f1_score(kept_gold, kept_predicted, average="weighted", zero_division=0)
    hits = np.mean([g == p for g, p in kept])
    return PaperTask(n=len(kept), accuracy=100 * hits, weighted_f1=100 * weighted)


def paper_response_metrics(gold: Sequence[str], predicted: Sequence[str]) -> PaperReply:
    """Computes the `paper_compat` column of the responses: sentence BLEU of their first lines."""
    kept = [(g, p.split("\n", 1)[0]) for g, p in zip(gold, predicted, strict=True) if p.strip()]
    if not kept:
        return PaperReply(n=0, bleu2=None, rouge_l=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nltk warns of zero overlaps, which are intended here
        bleu = [sentence_bleu([words(g)], words(p), weights=(0.99, 0.01)) for g, p in kept]
    rouge = [rouge_l(g, p) for g, p in kept]
    return PaperReply(n=len(kept), bleu2=100 * np.mean(bleu), rouge_l=100 * np.mean(rouge))


def bert_scores(gold: Sequence[str], predicted: Sequence[str], model: str) -> dict:
    """Computes BERTScore F1 with a model folder on disk; "status" says why where it cannot run.

    The folder's name selects the layer (roberta-large: 17; a name that bert-score does not know:
    the last) and the English baseline for "rescaled", which is None where bert-score ships none. An
    empty response scores 0 in both.
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
        config = AutoConfig.from_pretrained(model)
        layers = known.get(name) or config.num_hidden_layers
        if pairs:
            answers, references = map(list, zip(*pairs, strict=True))
            scorer = bert_score.BERTScorer(model_type=model, num_layers=layers)
            # A tokenizer that does not know its limit has one of 10^30, which overflows.
            longest = getattr(config, "max_position_embeddings", 512) - 2
            tokenizer = scorer._tokenizer
            tokenizer.model_max_length = min(tokenizer.model_max_length, longest)
            (_, _, f1), code = scorer.score(answers, references), scorer.hash
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
    """Computes mean METEOR where nltk's wordnet is on this machine, else says why not."""
    try:
        values = [meteor_score([words(g)], words(p)) for g, p in zip(gold, predicted, strict=True)]
    except LookupError:
        return {"status": "not computed: nltk's wordnet is not installed"}
    return {"status": "ok", "value": 100 * float(np.mean(values))}


def damage(rows: Sequence[PredictionRow], space: LabelSpace) -> dict[str, int]:
    """Counts what is wrong with predictions, by field; `standard` drops none of them."""
    found: collections.Counter = collections.Counter()
    for row in rows:
        for task in space.tasks:
            label = row.label(task.name)
            if row.gold.get(task.name) and label not in task.labels:
                found[f"{task.name}: {'not a label' if label else 'unparseable'}"] += 1
        if row.gold.get("response"):
            found["response: empty"] += not row.response.strip()
            found["response: a refusal"] += refuses(row.response)
        if row.outcome in ("refused", "failed"):
            found[row.outcome] += 1
    return {name: n for name, n in sorted(found.items()) if n}


def evaluate_rows(
    rows: Sequence[PredictionRow], space: LabelSpace, bertscore_model: str = ""
) -> SystemMetrics:
    """Computes all metrics of one system's rows."""
    tasks, paper_tasks = {}, {}
    for task, labels in ((t.name, t.labels) for t in space.tasks):
        pairs = [(r.gold[task], r.label(task)) for r in rows if r.gold.get(task)]
        if pairs:
            gold, predicted = zip(*pairs, strict=True)
            tasks[task] = label_metrics(gold, predicted, labels)
            paper_tasks[task] = paper_label_metrics(gold, predicted)
    reply = paper_reply = None
    if "response" in rows[0].gold:
        gold, predicted = [r.gold["response"] for r in rows], [r.response for r in rows]
        reply = response_metrics(gold, predicted, bertscore_model)
        paper_reply = paper_response_metrics(gold, predicted)
    return SystemMetrics(
        n=len(rows),
        standard=Standard(tasks=tasks, response=reply),
        paper_compat=Column(tasks=paper_tasks, response=paper_reply),
        status=dict(collections.Counter(r.outcome for r in rows)),
        damage=damage(rows, space),
    )
