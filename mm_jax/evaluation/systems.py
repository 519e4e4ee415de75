"""Trivial systems as first-class rows of every report (spec section 1)."""

from __future__ import annotations

import collections
from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_matrix, hstack
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from mm_jax.data.records import (
    CLIENT,
    CLIENT_EMOTION,
    LABEL_SPACES,
    STRATEGY,
    THERAPIST,
    THERAPIST_EMOTION,
    Sample,
    majority,
)

CONSTANT_REPLY = "I hear you, and I wonder what it is like for you to say that to me now."


def history_sequence(sample: Sample, task: str) -> list[str]:
    """The past labels of a task in the history, oldest first."""
    if task == CLIENT_EMOTION:
        return [u.emotion for u in sample.history if u.speaker == CLIENT and u.emotion]
    labels = [
        u.emotion if task == THERAPIST_EMOTION else u.strategy
        for u in sample.history
        if u.speaker == THERAPIST
    ]
    return [label for label in labels if label]


def majority_labels(train: Sequence[Sample], label_space: str) -> dict[str, str]:
    """The most frequent train label of every task."""
    return {task: majority(s.target(task) for s in train) for task in LABEL_SPACES[label_space]}


def label_rows(
    train: Sequence[Sample], test: Sequence[Sample], label_space: str
) -> dict[str, list[dict[str, str]]]:
    """System name -> one {task: label} a test sample: majority, repeat-last-label, logistic
    regression on history labels and tf-idf (which sees gold history labels)."""
    tasks = LABEL_SPACES[label_space]
    common = majority_labels(train, label_space)

    def repeat(sample: Sample) -> dict[str, str]:
        return {t: (history_sequence(sample, t) or [common[t]])[-1] for t in tasks}

    systems = {
        "majority": [dict(common) for _ in test],
        "repeat last label": [repeat(s) for s in test],
        "random train labels": _random_labels(train, test, tasks),
    }
    regressed = {t: regression(train, test, t) for t in tasks}
    systems["logistic regression"] = [{t: regressed[t][i] for t in tasks} for i in range(len(test))]
    return systems


def _random_labels(train, test, tasks) -> list[dict[str, str]]:
    rng = np.random.default_rng(0)
    return [{t: train[int(rng.integers(len(train)))].target(t) for t in tasks} for _ in test]


def regression(train: Sequence[Sample], test: Sequence[Sample], task: str) -> list[str]:
    """Logistic regression on the last three labels and label shares of every history label
    sequence, and tf-idf of the client's words."""
    gold = [s.target(task) for s in train]
    if len(set(gold)) < 2:
        return [gold[0]] * len(test)
    tfidf = TfidfVectorizer(sublinear_tf=True, min_df=2, ngram_range=(1, 2))
    texts = [s.client_text for s in train]
    has_words = any(len(t) for t in texts)
    tables = [_label_features(train), _label_features(test)]
    if has_words:
        vectors = [tfidf.fit_transform(texts), tfidf.transform([s.client_text for s in test])]
        tables = [hstack([a, b]) for a, b in zip(tables, vectors, strict=True)]
    model = LogisticRegression(C=0.3, max_iter=2000)
    model.fit(csr_matrix(tables[0]), gold)
    return [str(label) for label in model.predict(csr_matrix(tables[1]))]


def _label_features(samples: Sequence[Sample]) -> csr_matrix:
    rows = []
    space = {**LABEL_SPACES["dfew"], **LABEL_SPACES["mesc"]}
    for s in samples:
        row = []
        for task in (CLIENT_EMOTION, THERAPIST_EMOTION, STRATEGY):
            past = history_sequence(s, task)
            counts = collections.Counter(past)
            for back in (1, 2, 3):
                last = past[-back] if len(past) >= back else ""
                row += [float(label == last) for label in space[task]]
            row += [counts[label] / max(len(past), 1) for label in space[task]]
        rows.append([*row, float(not s.history), min(len(s.history), 50) / 50])
    return csr_matrix(np.array(rows))


def response_rows(train: Sequence[Sample], test: Sequence[Sample]) -> dict[str, list[str]]:
    """System name -> one response a test sample: constant reply, echo, random training reply."""
    rng = np.random.default_rng(0)
    replies = [s.response for s in train if s.response]
    return {
        "constant reply": [CONSTANT_REPLY] * len(test),
        "echo": [s.client_text for s in test],
        "random train reply": [replies[int(rng.integers(len(replies)))] for _ in test],
    }


def baseline_predictions(
    train: Sequence[Sample], test: Sequence[Sample], label_space: str
) -> dict[str, list[dict]]:
    """System name -> prediction rows as `predict` writes them.

    Label systems leave the response empty and reply systems the labels; the report shows only the
    fields a system predicts.
    """
    tasks = list(LABEL_SPACES[label_space])
    with_response = STRATEGY in tasks

    def row(sample: Sample, predicted: dict[str, str]) -> dict:
        gold = {t: sample.target(t) for t in tasks}
        if with_response:
            gold["response"] = sample.response
        return {
            "id": sample.id,
            "label_space": label_space,
            "gold": {k: v for k, v in gold.items() if k in predicted},
            "predicted": predicted,
            "status": "trivial",
        }

    out = {}
    for name, labels in label_rows(train, test, label_space).items():
        out[name] = [row(s, p) for s, p in zip(test, labels, strict=True)]
    if with_response:
        for name, replies in response_rows(train, test).items():
            out[name] = [row(s, {"response": r}) for s, r in zip(test, replies, strict=True)]
    return out
