"""Loads batches with grain in a deterministic order, with random modalities and prefetching.

The order is a pure function of (seed, step): the records of batch `step`, the modalities that each
row shows, and the padded shapes are known to every host before anything is decoded. So the order
does not depend on workers or hosts, and `step` alone is enough to resume.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import multiprocessing
import signal
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from mm_jax.config.errors import UserError
from mm_jax.config.schema import Data
from mm_jax.data.batch import Batch, Shape, collate, lengths_of
from mm_jax.data.datasets.common import DataError, SampleSource
from mm_jax.data.history import history_labels
from mm_jax.data.prompts import Example, Prompter, PromptError
from mm_jax.data.records import Sample
from mm_jax.data.shapes import Shapes, holds, joined


@dataclasses.dataclass(frozen=True)
class ModalityChoice:
    """Draws the modalities of a row: audio only, video only, both, or text only.

    `p` is the paper's [p_a, p_v, p_av] (spec section 2) and sums to 1; with probability `text_only`
    a row shows neither. What a sample does not have is left out.
    """

    p: tuple[float, float, float] = (0.0, 0.0, 1.0)
    text_only: float = 0.0

    @property
    def widest(self) -> str:
        """Returns all modalities that a row may show."""
        audio, video, both = self.p
        shows = "a" * (audio + both > 0) + "v" * (video + both > 0)
        return shows if self.text_only < 1 and shows else "text"

    def draw(self, rng: np.random.Generator) -> str:
        if rng.random() < self.text_only:
            return "text"
        return ("a", "v", "av")[int(rng.choice(3, p=self.p))]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Builds the examples of a stage.

    unit: "sample" (SFT: prompt and answer), "prompt" (reinforcement: without the answer) or
    "history" (compressor: memory vectors and the text they stand for). utterances: consecutive
    utterances in a "history"; 0: all. regime: the history labels shown; with probability
    `label_dropout` a row shows none. predictions: sample id -> labels, for regime "predicted".
    """

    unit: Literal["sample", "prompt", "history"] = "sample"
    utterances: int = 0
    regime: str = "gold"
    label_dropout: float = 0.0
    modality: ModalityChoice = ModalityChoice()
    predictions: dict[str, dict[str, str]] | None = None

    def build(
        self, prompter: Prompter, sample: Sample, first: int, modality: str, hide: bool
    ) -> Example:
        """Builds a sample's example; a partial history begins with utterance `first`."""
        regime = "none" if hide else self.regime
        if self.unit == "history" and self.utterances:
            part = sample.history[first : first + self.utterances]
            sample = dataclasses.replace(sample, history=part)
        labels = history_labels(sample, regime, self.predictions)
        if self.unit == "history":
            return prompter.reconstruction(sample, labels, first)
        return prompter.example(sample, modality, labels, with_answer=self.unit == "sample")

    def without_dropout(self) -> Recipe:
        """Returns the recipe for evaluation, which hides no labels at random."""
        return dataclasses.replace(self, label_dropout=0.0)


@dataclasses.dataclass(frozen=True)
class Item:
    """One trainable unit: a record, or its history from utterance `first` on.

    lengths: upper bounds, those with every modality that may be shown.
    """

    id: str
    record: int
    first: int
    lengths: Shape


def list_items(
    source: SampleSource, recipe: Recipe, prompter: Prompter, modality: str | None = None
) -> tuple[list[Item], collections.Counter]:
    """Lists the units of a split that fit, and counts the reasons why others do not.

    modality: what is shown; None: what the recipe may show. A dialogue's longest history is cut
    into parts of `recipe.utterances`, or taken whole.
    """
    modality = modality or recipe.modality.widest
    records = [(i, source[i]) for i in range(len(source))]
    if recipe.unit == "history":
        longest: dict[str, tuple[int, Sample]] = {}
        for i, sample in records:
            best = longest.get(sample.dialogue_id)
            if best is None or len(sample.history) > len(best[1].history):
                longest[sample.dialogue_id] = (i, sample)
        records = [pair for pair in longest.values() if pair[1].history]
    items, refused = [], collections.Counter()
    for i, sample in records:
        step = recipe.utterances if recipe.unit == "history" else 0
        for first in range(0, len(sample.history), step) if step else (0,):
            try:
                example = recipe.build(prompter, sample, first, modality, hide=False)
            except PromptError as error:
                refused[error.reason] += 1
                continue
            lengths = lengths_of(example)
            if recipe.label_dropout:
                # Hidden labels leave room for older lines, where a history has a limit of tokens.
                try:
                    other = recipe.build(prompter, sample, first, modality, hide=True)
                except PromptError as error:
                    refused[error.reason] += 1
                    continue
                lengths = joined([lengths, lengths_of(other)])
            name = f"{sample.id} utterance {first}" if step else sample.id
            items.append(Item(name, i, first, lengths))
    return items, refused


@dataclasses.dataclass(frozen=True)
class BatchRows:
    """The rows of one batch: items, modalities, whether history labels are hidden, and the shape
    that all hosts pad their rows to."""

    items: tuple[Item, ...]
    modalities: tuple[str, ...]
    hidden: tuple[bool, ...]
    shape: Shape


class BatchSchedule:
    """Decides the rows of batch `step` for every step >= 0.

    Each epoch is a new permutation. Its rows are dealt in that order to batches, one pile per
    shape; the rest of a pile joins the next larger shape that holds it. Then the batches are
    shuffled. Without `group_by_length` batches follow the permutation. Rows that do not fill a
    batch are left out of the epoch.
    """

    def __init__(
        self,
        items: Sequence[Item],
        recipe: Recipe,
        batch_size: int,
        seed: int,
        steps: int,
        shapes: Shapes,
        group_by_length: bool = True,
    ):
        if len(items) < batch_size:
            raise ValueError(
                f"batch_size: expected at most the {len(items)} usable examples, got {batch_size}"
            )
        self.items, self.recipe, self.seed, self.steps = list(items), recipe, seed, steps
        self.batch_size, self.shapes = batch_size, shapes
        self.piles = shapes.sizes if group_by_length else shapes.sizes[-1:]
        own = [
            next(k for k, size in enumerate(self.piles) if holds(size, item.lengths))
            for item in items
        ]
        self._pile = np.array(own)
        self.steps_per_epoch = len(items) // batch_size
        self._epoch = functools.lru_cache(maxsize=2)(self._epoch_rows)

    def __getstate__(self):
        return {k: v for k, v in vars(self).items() if k != "_epoch"}

    def __setstate__(self, state):
        vars(self).update(state)
        self._epoch = functools.lru_cache(maxsize=2)(self._epoch_rows)

    def _epoch_rows(self, epoch: int) -> np.ndarray:
        """Returns int64[steps_per_epoch, batch_size]: the rows of every batch of an epoch."""
        rng = np.random.default_rng((self.seed, 1, epoch))
        # What is left out is drawn before the rows are dealt: else it would always be the longest.
        order = rng.permutation(len(self.items))[: self.steps_per_epoch * self.batch_size]
        batches, left = [], np.zeros(0, np.int64)
        for k, size in enumerate(self.piles):
            fits = np.array([holds(size, self.items[i].lengths) for i in left], bool)
            pile = np.concatenate([left[fits], order[self._pile[order] == k]])
            full = len(pile) // self.batch_size * self.batch_size
            batches.append(pile[:full].reshape(-1, self.batch_size))
            left = np.concatenate([left[~fits], pile[full:]])
        return rng.permutation(np.concatenate(batches))

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> BatchRows:
        epoch, at = divmod(step, self.steps_per_epoch)
        items = tuple(self.items[i] for i in self._epoch(epoch)[at])
        rng = np.random.default_rng((self.seed, 2, step))
        modalities = tuple(self.recipe.modality.draw(rng) for _ in items)
        hidden = tuple(bool(x) for x in rng.random(len(items)) < self.recipe.label_dropout)
        return batch_rows(items, modalities, hidden, self.shapes)


def batch_rows(
    items: Sequence[Item], modalities: Sequence[str], hidden: Sequence[bool], shapes: Shapes
) -> BatchRows:
    shape = shapes.holding(joined([item.lengths for item in items]))
    return BatchRows(tuple(items), tuple(modalities), tuple(hidden), shape)


@dataclasses.dataclass(frozen=True)
class Loader:
    """Loads this host's share of a batch's rows as (ids, Batch)."""

    source: SampleSource
    recipe: Recipe
    prompter: Prompter
    host: int = 0
    hosts: int = 1

    def __call__(self, rows: BatchRows) -> tuple[tuple[str, ...], Batch]:
        share = len(rows.items) // self.hosts
        mine = range(self.host * share, (self.host + 1) * share)
        examples = []
        for i in mine:
            item = rows.items[i]
            examples.append(
                self.recipe.build(
                    self.prompter,
                    self.source[item.record],
                    item.first,
                    rows.modalities[i],
                    rows.hidden[i],
                )
            )
        batch = collate(examples, self.prompter.tokenizer.pad_id, rows.shape)
        return tuple(e.id for e in examples), batch


class WorkerError(UserError, RuntimeError):
    """Reports that a loader process died."""


def train_iterator(
    schedule: BatchSchedule, loader: Loader, start: int, data: Data
) -> Iterator[tuple[tuple[str, ...], Batch]]:
    """Yields (ids, Batch) of every step from `start` on, loading `data.prefetch` batches ahead.

    Batches are loaded by grain's reader threads, or by processes if `data.reader_processes` > 0
    (for decoding and tokenising that hold the interpreter's lock). Close the iterator to end the
    processes.
    """
    if data.reader_processes:
        yield from _from_processes(schedule, loader, start, data.reader_processes, data.prefetch)
        return
    import grain  # imports jax, so loader processes must not

    dataset = grain.MapDataset.source(schedule)[start:].map(loader)
    options = grain.ReadOptions(num_threads=data.reader_threads, prefetch_buffer_size=data.prefetch)
    yield from dataset.to_iter_dataset(options)


def _from_processes(schedule, loader, start, processes, prefetch):
    """Loads batches in order with a pool of spawned processes.

    Raises WorkerError if one died, instead of waiting for it.
    """
    pool = concurrent.futures.ProcessPoolExecutor(
        processes,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(loader,),
    )
    try:
        waiting: collections.deque[concurrent.futures.Future] = collections.deque()
        for step in range(start, len(schedule) + prefetch):
            if step < len(schedule):
                waiting.append(pool.submit(_load, schedule[step]))
            if step >= start + prefetch and waiting:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except concurrent.futures.process.BrokenProcessPool as error:
        raise WorkerError(
            f"one of {processes} loader processes died (out of memory, or killed); the run stops "
            "at its last checkpoint: continue with --resume"
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _start_worker(loader: Loader) -> None:
    global _loader
    _loader = loader
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the pool


def _load(rows: BatchRows):
    return _loader(rows)


# ---- batches of a validation split --------------------------------------------------------------


class EvalBatch(NamedTuple):
    """Rows of an evaluation; only the first `real` ones count, the others fill the batch up."""

    rows: BatchRows
    real: int


def split_batches(
    source: SampleSource,
    recipe: Recipe,
    prompter: Prompter,
    size: int,
    modality: str,
    shapes: Callable[[list[Shape]], Shapes],
    limit: int = 0,
    ids: Collection[str] | None = None,
) -> list[EvalBatch]:
    """Cuts a split, or only its examples `ids`, into batches of `size` rows.

    It takes at most `limit` rows (0: all), evenly spread over the split. shapes(lengths) chooses
    what they are padded to.
    """
    items, _ = list_items(source, recipe, prompter, modality)
    items = [item for item in items if ids is None or item.id in ids]
    if not items:
        raise DataError(f"split {source.split} of {source.folder} has no usable example")
    limit = limit or len(items)
    items = [items[i * len(items) // limit] for i in range(min(limit, len(items)))]
    return evaluation_batches(items, size, modality, shapes([item.lengths for item in items]))


def evaluation_batches(
    items: list[Item], size: int, modality: str, shapes: Shapes
) -> list[EvalBatch]:
    """Cuts items, sorted by length, into batches; fills the last one up with the first items."""
    items = sorted(items, key=lambda i: (sum(shapes.holding(i.lengths)), *i.lengths))
    batches = []
    for start in range(0, len(items), size):
        full = [items[(start + row) % len(items)] for row in range(size)]
        rows = batch_rows(full, [modality] * size, [False] * size, shapes)
        batches.append(EvalBatch(rows, min(size, len(items) - start)))
    return batches
