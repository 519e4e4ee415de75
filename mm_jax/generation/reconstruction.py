"""Measures what a compressor's memory holds: reconstructs histories from memory vectors alone."""

from __future__ import annotations

import collections
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mm_jax.data.batch import Batch
from mm_jax.data.labels import LabelSpace
from mm_jax.data.tokenizer import Tokenizer
from mm_jax.generation import sampler
from mm_jax.generation.engine import Engine, Request, weights_of
from mm_jax.generation.slots import Drawing
from mm_jax.models.abstract import AbstractModel
from mm_jax.models.sharding import fetch, put_whole_batch
from mm_jax.ops.log_probs import token_log_probs
from mm_jax.rewards.similarity import rouge_l

NUMBER = re.compile(r"^(\d+): ", re.MULTILINE)
CAPTION = re.compile(r"(Client|Therapist)((?:\([^)]*\))*)((?: \([^)]*\))*)")
LABEL = re.compile(r"\(([^)]*)\)")
MEMORIES = ("its own memory", "another's memory", "blank memory")


class Reconstructor:
    """Reconstructs histories with a model on a mesh; batches are those of a compressor stage."""

    def __init__(self, abstract: AbstractModel, tokenizer: Tokenizer):
        self.abstract, self.tokenizer = abstract, tokenizer
        self._right = jax.jit(self._right_tokens, static_argnames="kind")
        self._prefill = jax.jit(self._prefill_rows)
        self.weights = weights_of(abstract)
        self.engines: dict[tuple[int, int], Engine] = {}  # (slots, most new tokens) -> engine

    def _right_tokens(self, params, batch, others, *, kind):
        model = nnx.merge(self.abstract.graph, params)
        lm = model.language_model
        memory = model.mamba_compressor(batch.history_tokens, batch.memory_index)
        if kind == MEMORIES[1]:
            memory = memory[others]
        elif kind == MEMORIES[2]:
            memory = jnp.zeros_like(memory)
        hidden = lm(model.embed(batch, memory=memory), batch.mask)
        targets = jnp.roll(batch.tokens, -1, axis=1)
        found = token_log_probs(
            hidden,
            lm.head_kernel(),
            targets,
            vocab_padding=lm.config.vocab_padding,
            counted=jnp.roll(batch.loss_weights, -1, axis=1) > 0,
        )
        return jnp.roll(found.best == targets, 1, axis=1)

    def _prefill_rows(self, params, batch):
        return sampler.prefill(nnx.merge(self.abstract.graph, params), batch)

    def _engine(self, slots: int, length: int) -> Engine:
        if (slots, length) not in self.engines:
            drawing = Drawing(self.tokenizer.stop_ids, self.tokenizer.pad_id, length)
            self.engines[slots, length] = Engine(
                self.weights.decoder,
                self.abstract.mesh,
                drawing,
                slots=slots,
                kv_heads=self.weights.kv_heads,
            )
        return self.engines[slots, length]

    def right(self, params: nnx.State, batch: Batch, kind: str) -> np.ndarray:
        """Marks, bool[B, T], the tokens that are the likeliest given the text before them and a
        memory of `kind` (one of MEMORIES; another's memory is that of the next row)."""
        others = np.roll(np.arange(len(batch.tokens)), -1)
        with jax.set_mesh(self.abstract.mesh):
            placed = put_whole_batch((batch, others), self.abstract.mesh)
            return fetch(self._right(params, *placed, kind=kind))

    def texts(
        self, params: nnx.State, batches: Sequence[tuple[Batch, int]]
    ) -> list[tuple[str, str]]:
        """Returns (history, its greedy reconstruction) of the first `real` rows of every batch;
        batches: (batch, real), all of as many rows."""
        mesh, pad_id = self.abstract.mesh, self.tokenizer.pad_id
        prompts = [prompts_alone(batch, pad_id) for batch, _ in batches]
        rows, length = len(batches[0][0].tokens), max(length for _, length in prompts)

        def block(number: int):
            asked = [Request((number, row), [0]) for row in range(batches[number][1])]
            with jax.set_mesh(mesh):
                at = self._prefill(params, put_whole_batch(prompts[number][0], mesh))
            return at, asked + [None] * (rows - len(asked))

        blocks = (block(number) for number in range(len(batches)))
        told = self._engine(rows, length).finished(self.weights.of(params), blocks)
        found = {p.name: p.result.tokens[0, : p.result.lengths[0]] for p in told}
        return [
            (
                self.tokenizer.decode(batch.tokens[row][batch.loss_weights[row] > 0]),
                self.tokenizer.decode(found[number, row]),
            )
            for number, (batch, real) in enumerate(batches)
            for row in range(real)
        ]


def prompts_alone(batch: Batch, pad_id: int) -> tuple[Batch, int]:
    """Returns (the batch without its targets, a length that holds the longest target)."""
    target = batch.loss_weights > 0
    real = batch.mask & ~target
    tokens = np.where(real, batch.tokens, pad_id).astype(np.int32)
    length = -(-(int(target.sum(axis=1).max()) + 8) // 64) * 64
    weights = np.zeros_like(batch.loss_weights)
    return batch._replace(tokens=tokens, mask=real, loss_weights=weights), length


def whole_runs(mask: np.ndarray, hits: np.ndarray) -> tuple[int, int]:
    """Counts the runs of True in the rows of `mask` that `hits` covers completely, and all runs;
    mask and hits bool[B, T]."""
    mask, hits = (np.pad(a, ((0, 0), (0, 1))).reshape(-1) for a in (mask, hits))
    number = np.cumsum(mask & ~np.roll(mask, 1))  # of the run that a place is in
    count = int(number[-1])
    return count - len(np.unique(number[mask & ~hits])), count


def reconstruction_metrics(texts: Sequence[tuple[str, str]], space: LabelSpace) -> dict[str, float]:
    """Scores (history, reconstruction) pairs in numbered lines, each score in [0, 1]: mean ROUGE-L
    F1 without the numbers, and the shares of the history's "strategies" (labels with guidance) and
    "emotions" (all others) that the line of the same number repeats (absent where the history
    shows none)."""
    hits: collections.Counter = collections.Counter()
    scores = []
    for gold, text in texts:
        hits.update(label_hits(gold, text, space))
        scores.append(rouge_l(NUMBER.sub("", gold), NUMBER.sub("", text)))
    out = {"rouge_l": float(np.mean(scores))}
    for name in ("emotions", "strategies"):
        if hits[name, "all"]:
            out[name] = hits[name, "right"] / hits[name, "all"]
    return out


def label_hits(gold: str, text: str, space: LabelSpace) -> collections.Counter:
    """Counts a history's labels, and those that the line of the same number repeats."""
    hits: collections.Counter = collections.Counter()
    known = {label for task in space.tasks for label in task.labels}
    found = captions(text)
    for number, wanted in captions(gold).items():
        for name, group in (("strategies", 2), ("emotions", 3)):
            got = LABEL.findall(found[number][group]) if number in found else []
            for i, label in enumerate(LABEL.findall(wanted[group])):
                if label in known:  # not a text that begins with brackets
                    hits[name, "all"] += 1
                    hits[name, "right"] += got[i : i + 1] == [label]
    return hits


def captions(text: str) -> dict[int, re.Match]:
    """Finds the captions of numbered lines; where a number occurs twice, the first line counts."""
    found: dict[int, re.Match] = {}
    for number in NUMBER.finditer(text):
        caption = CAPTION.match(text, number.end())
        if caption:
            found.setdefault(int(number[1]), caption)
    return found
