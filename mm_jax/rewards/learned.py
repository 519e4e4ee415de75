"""A learned reward: a Bradley-Terry head on the policy, trained on preference pairs.

Of a pair, the reference reply is preferred to the sample of the starting policy that is least like
it (lowest ROUGE-L of G). Both stand behind one prompt (`Qwen2.shared_prefix` with a group of two);
the reward is the head's value of the state before a response's last token.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from rouge_score import rouge_scorer

from mm_jax.models.multimood import MultiMood
from mm_jax.rl.losses import preference_loss
from mm_jax.rl.policy import PolicyOptions, Responses, score_responses

PREFERRED, REJECTED = 0, 1


def least_similar(responses: Sequence[Sequence[str]], references: Sequence[str]) -> list[int]:
    """Which of the G responses of every prompt has the lowest ROUGE-L F1."""
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    return [
        int(np.argmin([scorer.score(reference, r)["rougeL"].fmeasure for r in own]))
        for own, reference in zip(responses, references, strict=True)
    ]


def pair_tokens(
    answers: Sequence[Sequence[int]],
    sampled: np.ndarray,
    lengths: np.ndarray,
    chosen: Sequence[int],
    pad_id: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens int32[B, 2, R] and mask bool[B, 2, R] of (reference answer, rejected sample), and
    bool[B]: whether the pair is one. An answer that is longer than R, or equal to the sample, makes
    none."""
    rows, _, size = sampled.shape
    tokens = np.full((rows, 2, size), pad_id, np.int32)
    mask = np.zeros((rows, 2, size), bool)
    usable = np.zeros(rows, bool)
    for row, (answer, g) in enumerate(zip(answers, chosen, strict=True)):
        rejected = sampled[row, g, : lengths[row, g]]
        usable[row] = len(answer) <= size and list(answer) != rejected.tolist()
        for place, ids in ((PREFERRED, answer[:size]), (REJECTED, rejected)):
            tokens[row, place, : len(ids)] = ids
            mask[row, place, : len(ids)] = True
    return tokens, mask, usable


def reward_values(model: MultiMood, responses: Responses, options: PolicyOptions):
    """float32[B, G]: the head's value of every response."""
    values = score_responses(model, responses, options).values
    last = jnp.maximum(jnp.sum(responses.mask, axis=2) - 1, 0)
    return jnp.take_along_axis(values, last[..., None], axis=2)[..., 0]


def pair_loss(model: MultiMood, responses: Responses, usable: jax.Array, options: PolicyOptions):
    """The preference loss over the usable pairs bool[B], and metrics."""
    values = reward_values(model, responses, options)
    return preference_loss(values[:, PREFERRED], values[:, REJECTED], usable)
