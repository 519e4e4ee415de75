"""The learned reward: a Bradley-Terry model of pairs (reference answer, low-ROUGE sample).

A value head beside the language model reads the last token of an answer behind its prompt, media
and history. It is trained on pairs whose worse side is the sampled answer that has least in common
with the reference (ROUGE-L of the reply), of several drawn from the model the stage starts from.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import pathlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mm_jax.config.files import write_whole
from mm_jax.data.answers import parse_answer
from mm_jax.data.batch import Responses
from mm_jax.data.pipeline import Loader, PlannedBatch
from mm_jax.data.prompts import Prompter
from mm_jax.data.records import Sample
from mm_jax.models.abstract import Abstract, adapted_model
from mm_jax.models.multimood import MultiMood
from mm_jax.models.sharding import batch_sharding, fetch, put_batch, put_whole_batch
from mm_jax.rewards.similarity import rouge_l
from mm_jax.rl import losses, policy
from mm_jax.rl.rollout import seeds_of
from mm_jax.training.step import Objective

log = logging.getLogger(__name__)

LENGTH_BUCKET = 16  # answers are padded to a multiple of this


def add_head(model: MultiMood, rngs: nnx.Rngs) -> MultiMood:
    return policy.add_critic(model, "shared", rngs)


def with_head(plain: Abstract) -> Abstract:
    """The model of a preference stage."""
    return adapted_model(plain, add_head)


def reward_values(model: MultiMood, responses: Responses) -> jax.Array:
    """float32[B, G]: what the head reads at the last token of every response."""
    lm = model.language_model
    prompt = model.embed(responses.batch, responses.features)
    tails = lm.embed(responses.tokens)
    _, hidden = lm.shared_prefix(prompt, responses.batch.mask, tails, responses.mask)
    last = jnp.maximum(jnp.sum(responses.mask, axis=2) - 1, 0)
    states = jnp.take_along_axis(hidden, last[..., None, None], axis=2)[:, :, 0]
    return model.value_head(states.astype(jnp.float32))[..., 0]


def preference_loss(
    model: MultiMood,
    responses: Responses,
    dropout_key: jax.Array | None = None,
    token_dropout: float = 0.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Summed Bradley-Terry loss of pairs [B, 2, R] (chosen, rejected), and sums for the metrics.

    A row whose answers are empty is padding. The model has no dropout here.
    """
    del dropout_key, token_dropout
    chosen, rejected = jnp.moveaxis(reward_values(model, responses), 1, 0)
    real = jnp.any(responses.mask, axis=(1, 2))
    count = jnp.sum(real, dtype=jnp.float32)
    loss, found = losses.preference_loss(chosen, rejected, real)
    return loss * count, {
        "weight": count,
        "right": found["pair_accuracy"] * count,
        "margin": found["margin"] * count,
        "tokens": jnp.sum(responses.batch.mask) + jnp.sum(responses.mask, dtype=jnp.float32),
    }


def preference_metrics(sums: dict[str, jax.Array]) -> dict[str, jax.Array]:
    pairs = jnp.maximum(sums["weight"], 1)
    return {
        "pair_accuracy": sums["right"] / pairs,
        "margin": sums["margin"] / pairs,
        "tokens": sums["tokens"],
    }


PAIRS = Objective(preference_loss, preference_metrics, ("value_head",))


@dataclasses.dataclass(frozen=True)
class PairLoader:
    """PlannedBatch -> (ids, Responses [B, 2, `length`]) of this host's rows."""

    loader: Loader
    pairs: dict[str, tuple[list[int], list[int]]]
    length: int

    @property
    def hosts(self) -> int:
        return self.loader.hosts

    def __call__(self, planned: PlannedBatch) -> tuple[tuple[str, ...], Responses]:
        ids, batch = self.loader(planned)
        pad = self.loader.prompter.tokenizer.pad_id
        tokens = np.full((len(ids), 2, self.length), pad, np.int32)
        mask = np.zeros(tokens.shape, bool)
        for row, name in enumerate(ids):
            for side, answer in enumerate(self.pairs[name]):
                tokens[row, side, : len(answer)] = answer
                mask[row, side, : len(answer)] = True
        return ids, Responses(batch, None, tokens, mask)


def padded_length(pairs: Sequence[dict[str, tuple[list[int], list[int]]]]) -> int:
    longest = max(len(answer) for split in pairs for pair in split.values() for answer in pair)
    return -(-longest // LENGTH_BUCKET) * LENGTH_BUCKET


def sample_pairs(
    program: policy.Program,
    params: nnx.State,
    batches: Sequence[tuple[PlannedBatch, int, list[Sample]]],
    loader: Loader,
    group: int,
    decode: Callable[[np.ndarray], str],
    label_space: str,
) -> list[dict]:
    """One row a sample with a reference reply: the answer of `group` sampled ones whose reply has
    the least ROUGE-L with it. batches: planned batches with the number of real rows, and the
    samples of all rows."""
    rows, mesh = [], program.mesh
    with jax.set_mesh(mesh):
        weights = program.to_rollout(params)
    for planned, real, samples in batches:
        _, batch = loader(planned)
        seeds = put_whole_batch(seeds_of(samples, group), mesh)
        with jax.set_mesh(mesh):
            _, out = program.rollout(weights, put_batch(batch, mesh), np.uint32(0), seeds)
        tokens, lengths = fetch((out.tokens, out.lengths))
        for row, sample in enumerate(samples[:real]):
            if not sample.response:
                continue
            answers = [tokens[row, g, : lengths[row, g]] for g in range(group)]
            texts = [decode(answer) for answer in answers]
            replies = [parse_answer(text, label_space).response for text in texts]
            scores = [rouge_l(sample.response, reply) if reply else 0.0 for reply in replies]
            worst = int(np.argmin(scores))
            rows.append(
                {
                    "id": sample.id,
                    "rejected": [int(t) for t in answers[worst]],
                    "text": texts[worst],
                    "rouge_l": round(100 * scores[worst], 2),
                }
            )
    return rows


def write_pairs(path: pathlib.Path, rows: dict[str, list[dict]]) -> None:
    """split -> rows of `sample_pairs`, one JSON line each; whole or not at all."""
    lines = [{"split": split, **row} for split, own in rows.items() for row in own]
    write_whole(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def read_pairs(
    path: pathlib.Path, split: str, samples: Sequence[Sample], prompter: Prompter
) -> dict[str, tuple[list[int], list[int]]]:
    """Sample id -> (reference answer, sampled answer) in tokens; where they are one, no pair."""
    by_id = {s.id: s for s in samples}
    pairs = {}
    with open(path, encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            if row["split"] == split:
                chosen, _ = prompter.answer(by_id[row["id"]])
                if chosen != row["rejected"]:
                    pairs[row["id"]] = (chosen, row["rejected"])
    return pairs


def make_learned(abstract: Abstract, params: nnx.State) -> Callable[[Responses], np.ndarray]:
    """`responses -> float32[B, G]` of a trained model (see `with_head`), on the host."""
    jitted = jax.jit(
        lambda params, responses: reward_values(nnx.merge(abstract.graph, params), responses),
        out_shardings=batch_sharding(abstract.mesh),
    )

    def score(params, responses):
        with jax.set_mesh(abstract.mesh):
            return fetch(jitted(params, responses._replace(features=None)))

    return functools.partial(score, params)
