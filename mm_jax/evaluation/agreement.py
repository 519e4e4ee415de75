"""Summarises people's choices: adjudication, best-of-k shares, win rates, agreement.

A vote is (annotator, item, criterion, choice); the choice is TIE, a system's name, or the names of
all systems with that reply, joined by AND: these share a win, and are a tie among themselves.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import NamedTuple

import krippendorff
import numpy as np
from sklearn.metrics import cohen_kappa_score
from statsmodels.stats.inter_rater import aggregate_raters, fleiss_kappa
from statsmodels.stats.proportion import proportion_confint

TIE = "no difference"
AND = " = "  # joins the names of systems whose replies are the same, and so are best together
CRITERIA = ("Fluency", "Identification", "Comfort", "Suggestions", "Overall")
QUALIFICATION = 0.4  # least Cohen's kappa with the training items' answers (paper)


class Vote(NamedTuple):
    annotator: str
    item: str
    criterion: str
    choice: str


def share(hits: float, total: int) -> dict:
    """Returns a percentage with its Wilson 95 % interval; "mean" is None where total is 0."""
    if not total:
        return {"n": 0, "mean": None, "interval": [0.0, 100.0]}
    low, high = proportion_confint(hits, total, method="wilson")
    return {
        "n": total,
        "mean": float(100 * hits / total),
        "interval": [100 * float(low), 100 * float(high)],
    }


def adjudicate(votes: Sequence[Vote], order: Sequence[str]) -> dict[tuple[str, str], str | None]:
    """Decides every (item, criterion); None where it stays open.

    The first two annotators of `order` that voted decide where they agree; else the third's vote
    makes a majority, else the fourth's. A single vote decides nothing.
    """
    by_unit: dict[tuple[str, str], dict[str, str]] = collections.defaultdict(dict)
    for v in votes:
        by_unit[v.item, v.criterion][v.annotator] = v.choice
    out = {}
    for unit, given in by_unit.items():
        ordered = [given[a] for a in order if a in given][:4]
        out[unit] = None
        for seen in range(2, len(ordered) + 1):
            (best, n), *rest = collections.Counter(ordered[:seen]).most_common()
            if n >= 2 and not (rest and rest[0][1] == n):
                out[unit] = best
                break
    return out


def best_of_shares(
    decided: dict[tuple[str, str], str | None], systems: Sequence[str]
) -> dict[str, dict[str, dict]]:
    """Counts the best systems: criterion -> system (and TIE) -> share of decided items."""
    out = {}
    for criterion in CRITERIA:
        choices = [c for (_, name), c in decided.items() if name == criterion and c is not None]
        counts: collections.Counter[str] = collections.Counter()
        for choice in choices:
            best = choice.split(AND)
            counts.update(dict.fromkeys(best, 1 / len(best)))
        out[criterion] = {s: share(counts[s], len(choices)) for s in (*systems, TIE)}
    return out


def win_rates(
    decided: dict[tuple[str, str], str | None], systems: Sequence[str]
) -> dict[str, list[dict]]:
    """Compares systems pairwise: criterion -> how often a was best where one of a and b was."""
    out: dict[str, list[dict]] = {}
    for criterion in CRITERIA:
        best = [set(c.split(AND)) for (_, n), c in decided.items() if n == criterion and c]
        out[criterion] = []
        for i, a in enumerate(systems):
            for b in systems[i + 1 :]:
                wins, losses = (
                    sum(x in s and y not in s for s in best) for x, y in ((a, b), (b, a))
                )
                out[criterion].append({"a": a, "b": b, **share(wins, wins + losses)})
    return out


def cohen(votes: Sequence[Vote], pair: tuple[str, str], criterion: str | None = None) -> dict:
    """Computes Cohen's kappa of two annotators over what both voted on."""
    first, second = (
        {(v.item, v.criterion): v.choice for v in votes if v.annotator == name} for name in pair
    )
    units = [u for u in first if u in second and criterion in (None, u[1])]
    return {"n": len(units), "kappa": kappa([first[u] for u in units], [second[u] for u in units])}


def kappa(first: Sequence[str], second: Sequence[str]) -> float | None:
    """Computes Cohen's kappa; None where all choices are alike."""
    return float(cohen_kappa_score(first, second)) if len({*first, *second}) > 1 else None


def agreement(votes: Sequence[Vote], pair: tuple[str, str] | None) -> dict[str, dict]:
    """Measures agreement by criterion, and over "all".

    Cohen's kappa of the fixed pair, Krippendorff's alpha over all votes, Fleiss' kappa over the
    units that every annotator voted on; each with n, None where it is not defined.
    """
    out = {}
    for criterion in (*CRITERIA, "all"):
        own = [v for v in votes if criterion in ("all", v.criterion)]
        name = None if criterion == "all" else criterion
        out[criterion] = {
            "cohen": cohen(own, pair, name) if pair else {"n": 0, "kappa": None},
            "krippendorff": alpha(own),
            "fleiss": fleiss(own),
        }
    return out


def _table(votes: Sequence[Vote]) -> tuple[np.ndarray, list[str]]:
    """Tabulates choices, object[annotators, units] ("" where absent), and those that occur."""
    people = sorted({v.annotator for v in votes})
    units = sorted({(v.item, v.criterion) for v in votes})
    table = np.full((len(people), len(units)), "", object)
    for v in votes:
        table[people.index(v.annotator), units.index((v.item, v.criterion))] = v.choice
    return table, sorted({v.choice for v in votes})


def alpha(votes: Sequence[Vote]) -> dict:
    """Computes Krippendorff's alpha for nominal choices."""
    if not votes:
        return {"n": 0, "alpha": None}
    table, choices = _table(votes)
    shared = table[:, (table != "").sum(axis=0) > 1]
    if not shared.shape[1] or len({c for c in shared.ravel() if c}) < 2:
        return {"n": shared.shape[1], "alpha": None}
    codes = np.where(shared == "", np.nan, 0).astype(float)
    for i, choice in enumerate(choices):
        codes[shared == choice] = i
    value = krippendorff.alpha(codes, level_of_measurement="nominal")
    return {"n": shared.shape[1], "alpha": float(value)}


def fleiss(votes: Sequence[Vote]) -> dict:
    """Computes Fleiss' kappa over the units that every annotator voted on."""
    if not votes:
        return {"n": 0, "kappa": None}
    table, choices = _table(votes)
    crossed = table[:, (table != "").all(axis=0)]
    if len(table) < 2 or not crossed.shape[1] or len(set(crossed.ravel())) < 2:
        return {"n": crossed.shape[1], "kappa": None}
    codes = np.vectorize(choices.index)(crossed).T
    counts, _ = aggregate_raters(codes, n_cat=len(choices))
    return {"n": crossed.shape[1], "kappa": float(fleiss_kappa(counts, method="fleiss"))}
