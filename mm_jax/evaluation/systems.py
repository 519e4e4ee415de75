"""Predicts with trivial systems, which every report shows next to the model (spec section 1)."""

from __future__ import annotations

import collections
from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_matrix, hstack
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from mm_jax.data.labels import LabelSpace
from mm_jax.data.records import Sample, majority
from mm_jax.evaluation.predictions import PredictionRow, gold_of

CONSTANT_REPLY = "I hear you, and I wonder what it is like for you to say that to me now."


def history_sequence(sample: Sample, task: str) -> list[str]:
    """Returns the past labels of a task in the history, oldest first."""
    return [u.labels[task] for u in sample.history if u.labels.get(task)]


def label_rows(
    train: Sequence[Sample], test: Sequence[Sample], space: LabelSpace
) -> dict[str, list[dict[str, str]]]:
    """Predicts labels with trivial systems: name -> one {task: label} per test sample.

    "repeat last label" and "logistic regression" see gold history labels.
    """
    tasks, rng = space.names, np.random.default_rng(0)
    known = {t: [s.target(t) for s in train if s.target(t)] or [""] for t in tasks}
    common = {t: majority(known[t]) for t in tasks}
    regressed = {t: regression(train, test, t, space) for t in tasks}
    return {
        "majority": [dict(common) for _ in test],
        "repeat last label": [
            {t: (history_sequence(s, t) or [common[t]])[-1] for t in tasks} for s in test
        ],
        "random train labels": [
            {t: known[t][int(rng.integers(len(known[t])))] for t in tasks} for _ in test
        ],
        "logistic regression": [{t: regressed[t][i] for t in tasks} for i in range(len(test))],
    }


def regression(
    train: Sequence[Sample], test: Sequence[Sample], task: str, space: LabelSpace
) -> list[str]:
    """Predicts by logistic regression on the last three labels and the label shares of every
    history label sequence, and tf-idf of the client's words."""
    train = [s for s in train if s.target(task)]
    gold = [s.target(task) for s in train]
    if len(set(gold)) < 2:
        return [majority(gold)] * len(test)
    own, others = feature_tables(train, (test,), space)
    model = LogisticRegression(C=0.3, max_iter=2000).fit(own, gold)
    return [str(label) for label in model.predict(others)]


def feature_tables(
    train: Sequence[Sample], others: Sequence[Sequence[Sample]], space: LabelSpace
) -> list[csr_matrix]:
    """Computes the features of `regression`, for train and for other splits."""
    splits = [train, *others]
    tables = [_label_features(samples, space) for samples in splits]
    texts = [[s.client_text for s in samples] for samples in splits]
    try:
        tfidf = TfidfVectorizer(sublinear_tf=True, min_df=2, ngram_range=(1, 2)).fit(texts[0])
    except ValueError:  # no word is in two texts: there are none, too few, or none with spaces
        tfidf = None
    if tfidf is not None:
        tables = [
            hstack([table, tfidf.transform(own or [""])[: len(own)]], format="csr")
            for table, own in zip(tables, texts, strict=True)
        ]
    return tables


def _label_features(samples: Sequence[Sample], space: LabelSpace) -> csr_matrix:
    rows = []
    for s in samples:
        row = []
        for task in space.tasks:
            past, labels = history_sequence(s, task.name), task.labels
            counts = collections.Counter(past)
            for back in (1, 2, 3):
                last = past[-back] if len(past) >= back else ""
                row += [float(label == last) for label in labels]
            row += [counts[label] / max(len(past), 1) for label in labels]
        rows.append([*row, float(not s.history), min(len(s.history), 50) / 50])
    width = sum(4 * len(task.labels) for task in space.tasks) + 2
    return csr_matrix(np.array(rows).reshape(len(samples), width))


def response_rows(train: Sequence[Sample], test: Sequence[Sample]) -> dict[str, list[str]]:
    """Returns the replies of trivial systems: name -> one reply per test sample."""
    rng = np.random.default_rng(0)
    replies = [s.response for s in train if s.response]
    return {
        "constant reply": [CONSTANT_REPLY] * len(test),
        "echo": [s.client_text for s in test],
        "random train reply": [replies[int(rng.integers(len(replies)))] for _ in test],
    }


def baseline_predictions(
    train: Sequence[Sample], test: Sequence[Sample], space: LabelSpace
) -> dict[str, list[PredictionRow]]:
    """Predicts with every trivial system: name -> prediction rows.

    Label systems have no response and reply systems no labels; gold holds only what a system
    predicts, so that only that is evaluated.
    """

    predicted = label_rows(train, test, space)
    if space.reply:
        for name, replies in response_rows(train, test).items():
            predicted[name] = [{"response": r} for r in replies]
    return {name: trivial_rows(test, own, space) for name, own in predicted.items()}


def trivial_rows(
    test: Sequence[Sample], predicted: Sequence[dict[str, str]], space: LabelSpace
) -> list[PredictionRow]:
    return [
        PredictionRow(
            id=s.id,
            label_space=space.name,
            gold={k: v for k, v in gold_of(s, space).items() if k in own},
            predicted=own,
            status="trivial",
        )
        for s, own in zip(test, predicted, strict=True)
    ]
