"""Combines rewards into one (paper eq. 7), and screens replies that must not be rewarded."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from mm_jax.rewards.base import Score

# What no reply to a client may contain. A transparent minimum, not a clinical instrument: it finds
# only plain wordings.
SCREEN = {
    "encourages self-harm": r"\b(you (should|could|might as well)|go ahead and|just) "
    r"(kill|hurt|cut|harm|starve|poison|hang|drown|shoot|end) (yourself|urself|your life)\b",
    "wishes the client dead": r"\b(you('d| would)? be better off dead|(the world|everyone|they)"
    r"('d| would| will)? be better( off)? without you|nobody would miss you)\b",
    "names a method": r"\b(take|swallow) (all|every one) (of )?(the|your|those) "
    r"(pills|tablets|meds)\b",
    "encourages violence": r"\b(you should|go ahead and|just) (kill|hurt|beat|stab|shoot|poison) "
    r"(him|her|them|your)\b",
    "insults the client": r"\b(you are|you're|what) (a |an |such a )?(worthless|pathetic|stupid|"
    r"disgusting|useless|idiot|loser)\b",
    "discourages treatment": r"\b(stop|quit|don't) (taking|take) (all )?(your|the) "
    r"(medication|medicine|meds|antidepressants|insulin)\b",
}
_SCREEN = {reason: re.compile(pattern, re.IGNORECASE) for reason, pattern in SCREEN.items()}


def screen(response: str) -> str:
    """Returns why a response is vetoed, or "" where it is not."""
    text = " ".join(response.replace("’", "'").split())
    return next((reason for reason, pattern in _SCREEN.items() if pattern.search(text)), "")


def combine(
    scores: Mapping[str, Sequence[Score]],
    weights: Mapping[str, float],
    shape: tuple[int, int],
    mode: Literal["sum", "normalise_then_sum"] = "sum",
    vetoed: np.ndarray | None = None,
    veto_value: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Combines every component's scores (P * G each) into rewards float32[P, G], valid bool[P, G].

    sum: the weighted mean of the components, so that it stays in [0, 1] (eq. 7 with weights 1).
    normalise_then_sum: every component is standardised in its group first. A response with a failed
    component is invalid (NaN). A response `vetoed` by the screen or a rule is valid whatever its
    scores: with "sum" it gets the smaller of `veto_value` and its group's lowest reward, normalised
    less than its group's lowest reward.
    """
    values = np.array([[s.value for s in scores[name]] for name in weights], np.float32)
    values = values.reshape(len(weights), *shape)
    w = np.array(list(weights.values()), np.float32)
    valid = np.isfinite(values).all(axis=0)
    vetoed = np.zeros(shape, bool) if vetoed is None else vetoed
    own = valid & ~vetoed
    if mode == "sum":
        total = np.einsum("k,kpg->pg", w, np.where(valid, values, 0.0)) / w.sum()
        lowest = np.where(own, total, np.inf).min(axis=1, keepdims=True, initial=veto_value)
        total = np.where(vetoed, lowest, total)
    else:
        total = normalised_components(values, w, own)
        lowest = np.min(np.where(own, total, np.inf), axis=1, keepdims=True, initial=0.0)
        total = np.where(vetoed, lowest - w.sum(), total)
    valid = valid | vetoed
    return np.where(valid, total, np.nan).astype(np.float32), valid


def normalised_components(
    components: np.ndarray, weights: np.ndarray, valid: np.ndarray, ddof: int = 1, eps: float = 1e-4
) -> np.ndarray:
    """Standardises every component within its group, then sums them with their weights; a component
    on a small scale thus counts as much as its weight says.

    components float32[K, P, G], weights float32[K], valid bool[P, G] -> float32[P, G], 0 where
    invalid. Standard deviations are divided by n - ddof.
    """
    mask = np.broadcast_to(valid, components.shape)
    # The group's highest value is subtracted first, so that large equal values have exactly no
    # deviation in spite of rounding.
    highest = np.max(components, axis=2, keepdims=True, where=mask, initial=-np.inf)
    x = np.where(mask, components - np.where(np.isfinite(highest), highest, 0), 0)
    count = mask.sum(axis=2, keepdims=True)
    mean = x.sum(axis=2, keepdims=True) / np.maximum(count, 1)
    squares = np.where(mask, (x - mean) ** 2, 0).sum(axis=2, keepdims=True)
    std = np.sqrt(squares / np.maximum(count - ddof, 1)) * (count > ddof)
    total = np.einsum("k,kpg->pg", weights, (x - mean) / (std + eps))
    return np.where(valid, total, 0.0)
