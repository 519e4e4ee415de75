"""Predicts samples in batches: labels by scoring or parsing, responses by decoding."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import zlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mm_jax.data.answers import format_answer, parse_answer
from mm_jax.data.batch import Shape, collate, lengths_of, pad_to
from mm_jax.data.history import history_labels
from mm_jax.data.labels import RESPONSE_FIELD
from mm_jax.data.prompts import Example, Prompter, PromptError
from mm_jax.data.records import Sample
from mm_jax.data.shapes import Shapes, joined
from mm_jax.generation import sampler
from mm_jax.generation.engine import Engine, Request, Result, weights_of
from mm_jax.generation.memory import ConversationMemory, MemoryWriter, memory_vectors
from mm_jax.generation.sampler import Decoding
from mm_jax.generation.slots import Drawing
from mm_jax.models.abstract import AbstractModel
from mm_jax.models.sharding import (
    batch_parallelism,
    fetch,
    put_whole_batch,
)
from mm_jax.run import build
from mm_jax.run.ahead import compile_for, shapes_of
from mm_jax.run.build import Run


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Holds what the model says about one sample.

    labels: task -> label, "" where there is none; response and text: the reply, and the whole
    answer; status: "scored", "ok", "unparseable: ..." or "refused: ..." (nothing was predicted);
    finished: whether the reply ended with a stop token; probabilities: task -> label ->
    probability, where labels were scored; modality: what reached the model.
    """

    labels: dict[str, str]
    modality: str
    status: str
    response: str = ""
    text: str = ""
    finished: bool = False
    probabilities: dict[str, dict[str, float]] | None = None


def label_table(prompter: Prompter, task: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns token ids int32[C, N] (padded) and lengths int32[C] of a task's allowed labels, each
    with `Prompter.ending_ids`."""
    task = prompter.label_space[task]
    ending = prompter.ending_ids(task)
    ids = [prompter.label_ids(label) + ending for label in task.labels]
    width = max(map(len, ids))
    table = np.array([i + [0] * (width - len(i)) for i in ids], np.int32)
    return table, np.array([len(i) for i in ids], np.int32)


class Predictor:
    """Predicts with a model on a mesh; every call takes the parameters.

    `settings` is `config.predict`. Rows are padded to whole batches and few shapes, which
    choose(lengths) gives, so that every function is compiled a few times at most.
    """

    def __init__(
        self,
        abstract: AbstractModel,
        prompter: Prompter,
        choose: Callable[[list[Shape]], Shapes],
        settings,
        seed: int = 0,
    ):
        self.abstract, self.prompter, self.choose = abstract, prompter, choose
        self.settings, self.seed = settings, seed
        self.shapes: dict[tuple[bool, bool], Shapes] = {}
        self.space = prompter.label_space
        self.tasks, self.with_response = self.space.names, self.space.reply
        self.tables = {task: label_table(prompter, task) for task in self.tasks}
        self.leads = {
            task: np.array(prompter.lead_ids(self.space[task].field, first=i == 0), np.int32)
            for i, task in enumerate(self.tasks)
        }
        # Scored with a label, but read with the next line.
        self.endings = {t: len(prompter.ending_ids(self.space[t])) for t in self.tasks}
        self.response_lead = np.array(prompter.lead_ids(RESPONSE_FIELD, first=False), np.int32)
        ways = batch_parallelism(abstract.mesh)
        self.batch_size = -(-settings.batch_size // ways) * ways
        self.memory = None
        if "compressor" in prompter.parts:
            self.memory = MemoryWriter(abstract, self.batch_size)
        self._score = jax.jit(self._score_rows, static_argnames=("respond",))
        self._prefill = jax.jit(self._prefill_rows)
        self.weights = weights_of(abstract)
        self.engine = Engine(
            self.weights.decoder,
            abstract.mesh,
            Drawing(
                prompter.tokenizer.stop_ids,
                prompter.tokenizer.pad_id,
                settings.max_new_tokens,
                settings.temperature,
                settings.top_k,
                settings.top_p,
            ),
            slots=self.batch_size,
            kv_heads=self.weights.kv_heads,
        )

    # --- jitted ---------------------------------------------------------------------------------

    def _model(self, params):
        return nnx.merge(self.abstract.graph, params)

    def _prefill_rows(self, params, batch, memory):
        return sampler.prefill(self._model(params), batch, memory=memory)

    def _score_rows(self, params, batch, memory, *, respond: bool):
        """Computes the log-probabilities of every task's labels, given the likeliest label of each
        earlier task."""
        model = self._model(params)
        lm, rows = model.language_model, batch.tokens.shape[0]
        # The cache cannot grow under jit: it gets room for all tasks and the response's lead.
        label_slots = sum(len(self.leads[t]) + self.tables[t][0].shape[1] for t in self.tasks)
        after = len(self.response_lead) if respond else 0
        at = sampler.prefill(model, batch, label_slots + after, memory=memory)

        def force(at, ids):
            tokens = jnp.broadcast_to(jnp.asarray(ids), (rows, len(ids)))
            return sampler.force(lm, at, tokens, jnp.ones(tokens.shape, bool))

        scores, last = {}, self.tasks[-1]
        for task in self.tasks:
            at = force(at, self.leads[task])
            table, lengths = (jnp.asarray(x) for x in self.tables[task])
            scores[task] = sampler.score_labels(lm, at, table, lengths)
            if respond or task != last:
                best = jnp.argmax(scores[task], axis=1)  # ties: the first label of the list
                read = lengths[best][:, None] - self.endings[task]
                real = jnp.arange(table.shape[1]) < read
                at = sampler.force(lm, at, table[best], real)
        if not respond:
            return scores, None
        return scores, force(at, self.response_lead)

    # --- host -----------------------------------------------------------------------------------

    def predict(
        self,
        params: nnx.State,
        samples: Sequence[Sample],
        modality: str,
        regime: str,
        respond: bool = True,
        predictions: dict[str, dict[str, str]] | None = None,
        progress: Callable[[int], None] = lambda n: None,
    ) -> list[Prediction]:
        """Predicts every sample, in the order of `samples`.

        Regime "predicted" goes through every dialogue turn by turn and shows the model the labels
        that it predicted for earlier turns; `predictions` (sample id -> labels) holds those already
        known. With `respond=False` only labels are predicted (by scoring).
        """
        if regime != "predicted":
            shown = [history_labels(s, regime) for s in samples]
            return self._predict_all(params, samples, shown, modality, respond, None, progress)
        known, kept = dict(predictions or {}), {}
        self._prepare(samples, modality)
        turns: dict[str, list[int]] = collections.defaultdict(list)
        for i in sorted(range(len(samples)), key=lambda i: samples[i].turn):
            turns[samples[i].dialogue_id].append(i)
        found: dict[int, Prediction] = {}
        # Wave k holds turn k of every dialogue: a turn's prompt needs the labels of those before.
        for wave in range(max(map(len, turns.values()), default=0)):
            index = [own[wave] for own in turns.values() if len(own) > wave]
            own = [samples[i] for i in index]
            shown = [history_labels(s, regime, known) for s in own]
            got = self._predict_all(params, own, shown, modality, respond, kept, progress)
            found |= zip(index, got, strict=True)
            known |= {s.id: p.labels for s, p in zip(own, got, strict=True)}
        return [found[i] for i in range(len(samples))]

    def read_one(
        self,
        params: nnx.State,
        sample: Sample,
        modality: str,
        regime: str,
        kept: dict[str, ConversationMemory] | None = None,
    ) -> tuple[Prediction, Decoding | None, int]:
        """Reads one sample's prompt, whatever came before; returns a prediction without the reply,
        what decoding goes on from (None without replies), and the prompt's tokens.

        kept: memories of earlier turns, which is updated. Raises PromptError.
        """
        example = self.prompter.example(
            sample, modality, history_labels(sample, regime), with_answer=False
        )
        vectors = self._memory_vectors(params, [sample], {0: example}, kept)
        lengths = self._on_device(example)
        inputs = self._collated({0: example}, vectors, [0], self.choose([lengths]).holding(lengths))
        reached = self.prompter.modality(sample, modality)
        (draft,), at = self._read(params, *inputs, [reached], self.with_response)
        return draft, at, len(example.tokens)

    def _predict_all(
        self, params, samples, shown, modality, respond, kept, progress
    ) -> list[Prediction]:
        """Predicts `samples` in batches. `shown`: the labels of each history; `kept`: memories of
        earlier waves."""
        examples, refused = self._examples(samples, shown, modality)
        found = {
            i: Prediction(
                labels=dict.fromkeys(self.tasks, ""),
                modality=self.prompter.modality(samples[i], modality),
                status=f"refused: {error}",
            )
            for i, error in refused.items()
        }
        progress(len(found))
        vectors = self._memory_vectors(params, samples, examples, kept)
        respond = respond and self.with_response
        drafts: dict[int, Prediction] = {}

        def block(index, shape):
            """Reads a batch of prompts."""
            batch, memory = self._collated(examples, vectors, index, shape)
            reached = [self.prompter.modality(samples[i], modality) for i in index]
            own, at = self._read(params, batch, memory, reached, respond)
            drafts.update(zip(index, own, strict=True))
            # What is sampled depends on a row's id, not on its place or the batch size.
            asked = [Request(i, [zlib.crc32(samples[i].id.encode())]) for i in index]
            return at, asked + [None] * (self.batch_size - len(index)), self.seed

        # Each is read when the engine has a free slot. (A generator's own variables would keep the
        # caches.)
        blocks = (block(*part) for part in self._groups(examples))
        if not respond:
            for _, asked, _ in blocks:
                progress(sum(request is not None for request in asked))
            return [(drafts | found)[i] for i in range(len(samples))]
        if not examples:
            return [found[i] for i in range(len(samples))]
        weights = self.weights.of(params)
        for told in self.engine.finished(weights, blocks):
            found[told.name] = self.answered(drafts.pop(told.name), told.result)
            progress(1)
        return [found[i] for i in range(len(samples))]

    def compile_labels(
        self, params: nnx.State, samples: Sequence[Sample], modality: str, regime: str
    ) -> None:
        """Compiles what predicting labels alone needs, for parameters as shapes with shardings."""
        if regime == "predicted":  # a later wave's lengths follow from what is predicted
            return
        shown = [history_labels(s, regime) for s in samples]
        examples, _ = self._examples(samples, shown, modality)
        for shape, index in {shape: index for index, shape in self._groups(examples)}.items():
            inputs = self._collated(examples, {}, index, shape)
            placed = shapes_of(put_whole_batch(inputs, self.abstract.mesh))
            compile_for(self._score, params, *placed, respond=False)

    def _examples(self, samples, shown, modality) -> tuple[dict[int, Example], dict]:
        """Returns samples' examples, and the errors of those that have none, by their indices."""
        examples, refused = {}, {}
        for i, sample in enumerate(samples):
            try:
                examples[i] = self.prompter.example(sample, modality, shown[i], with_answer=False)
            except PromptError as error:
                refused[i] = error
        return examples, refused

    def _prepare(self, samples: Sequence[Sample], modality: str) -> None:
        """Chooses shapes for all turns of dialogues whose labels are not known yet."""
        longest = {task: max(self.space[task].labels, key=len) for task in self.tasks}
        lengths = []
        for sample in samples:
            shown = [longest] * len(sample.history)
            with contextlib.suppress(PromptError):
                example = self.prompter.example(sample, modality, shown, with_answer=False)
                lengths.append(self._on_device(example))
        if lengths:
            self._choose(lengths)

    def _choose(self, lengths: list[Shape]) -> Shapes:
        """Returns shapes for rows of these lengths: those that were chosen before, if they fit."""
        # With a modality or without it: a tower would run in vain.
        most = joined(lengths)
        kind = most.frames > 0, most.fbank > 0
        if kind not in self.shapes or not self.shapes[kind].fit(lengths):
            self.shapes[kind] = self.choose(lengths)
        return self.shapes[kind]

    def _on_device(self, example: Example) -> Shape:
        """Returns the lengths of what the model reads: memory vectors, not histories."""
        found = lengths_of(example)
        return found._replace(history=0) if self.memory else found

    def _groups(self, examples) -> list[tuple[list[int], Shape]]:
        """Returns (indices of its examples, shape) of every batch, the shortest prompts first."""
        # Batches of like lengths need less padding.
        lengths = {i: self._on_device(example) for i, example in examples.items()}
        shapes = self._choose(list(lengths.values())) if lengths else None
        by_size = sorted(examples, key=lambda i: (sum(shapes.holding(lengths[i])), *lengths[i]))
        parts = (
            by_size[start : start + self.batch_size]
            for start in range(0, len(by_size), self.batch_size)
        )
        return [(index, shapes.holding(joined([lengths[i] for i in index]))) for index in parts]

    def _collated(self, examples, vectors, index, shape):
        """Returns (batch, memories) of some examples."""
        # A short last batch repeats a row, so that its shape is compiled already.
        padded = index + [index[0]] * (self.batch_size - len(index))
        rows = [examples[i] for i in padded]
        if self.memory:  # the histories are compressed already
            rows = [dataclasses.replace(e, history_tokens=e.history_tokens[:0]) for e in rows]
        batch = collate(rows, self.prompter.tokenizer.pad_id, shape)
        memory = None
        if self.memory and shape.memory:
            none = self.memory.empty().vectors
            memory = np.stack([pad_to(vectors.get(i, none), shape.memory) for i in padded])
        return batch, memory

    def _memory_vectors(self, params, samples, examples, kept) -> dict[int, np.ndarray]:
        """Compresses every example's history to memory vectors, each dialogue once instead of once
        per turn."""
        if self.memory is None or not any(len(e.memory_index) for e in examples.values()):
            return {}
        index = list(examples)
        found = memory_vectors(
            self.memory,
            params,
            [samples[i].dialogue_id for i in index],
            [examples[i].history_tokens for i in index],
            [examples[i].memory_index for i in index],
            [examples[i].settled for i in index],
            kept,
        )
        return dict(zip(index, found, strict=True))

    def _read(self, params, batch, memory, reached: Sequence[str], respond: bool):
        """Returns predictions without replies, one per modality `reached`, and what decoding goes
        on from (None without `respond`).

        Labels are left out where they are to be parsed from the answer.
        """
        with jax.set_mesh(self.abstract.mesh):
            batch, memory = put_whole_batch((batch, memory), self.abstract.mesh)
            # Labels are parsed from a generated answer only where there is one; else scored.
            if self.settings.labels == "generated" and respond:
                at = self._prefill(params, batch, memory)
                return [Prediction({}, modality, "") for modality in reached], at
            scores, at = self._score(params, batch, memory, respond=respond)
            scores = fetch(scores)
        drafts = []
        for row, modality in enumerate(reached):
            labels, probabilities = {}, {}
            for task in self.tasks:
                # Softmax over the allowed labels alone, in float64 on the host.
                names, logp = self.space[task].labels, scores[task][row].astype(np.float64)
                p = np.exp(logp - logp.max())
                p /= p.sum()
                labels[task] = names[int(np.argmax(logp))]
                probabilities[task] = {
                    label: round(float(x), 6) for label, x in zip(names, p, strict=True)
                }
            text = format_answer(labels, "", self.space)
            drafts.append(Prediction(labels, modality, "scored", "", text, True, probabilities))
        return drafts, at

    def answered(self, draft: Prediction, result: Result) -> Prediction:
        """Adds what was decoded to a prediction without its reply."""
        text, ended = self.prompter.tokenizer.decode(result.tokens[0]), bool(result.ended[0])
        if draft.status != "scored":
            p = parse_answer(text, self.space)
            return Prediction(p.labels, draft.modality, p.status, p.response, text, ended)
        response = text.strip()
        text = format_answer(draft.labels, response, self.space)
        return dataclasses.replace(draft, response=response, text=text, finished=ended)


def predictor_of(run: Run, samples: int | None = None) -> Predictor:
    """Builds the predictor of a run's model, for batches of no more than `samples` rows."""
    config, settings = run.config, run.config.predict
    if samples is not None and samples < settings.batch_size:
        settings = settings.model_copy(update={"batch_size": max(1, samples)})
    choose = functools.partial(build.shapes, config, run.model_config)
    return Predictor(run.abstract, run.prompter, choose, settings, config.seed)


def label_accuracy(
    predictions: Sequence[Prediction], samples: Sequence[Sample]
) -> dict[str, float]:
    """Computes the accuracy of every task for which the samples have gold labels."""
    found = {}
    for task in predictions[0].labels:
        if samples[0].target(task):
            pairs = zip(predictions, samples, strict=True)
            found[task] = float(np.mean([p.labels[task] == s.target(task) for p, s in pairs]))
    return found
