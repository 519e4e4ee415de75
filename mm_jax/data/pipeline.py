"""Grain pipelines: deterministic batch plans, random modality selection, prefetching.

A plan is a pure function of (seed, step): which records form batch `step`, which modalities each
row shows, and the padded shapes, known to every host before anything is decoded. So the order does
not depend on workers or hosts, and resuming is `step` alone.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import multiprocessing
import signal
from collections.abc import Iterator, Sequence

import numpy as np

from mm_jax.data.batch import Batch, Buckets, collate
from mm_jax.data.datasets.common import SampleSource
from mm_jax.data.history import history_labels
from mm_jax.data.prompts import Example, Prompter, PromptError
from mm_jax.data.records import Sample

UNITS = ("sample", "prompt", "history")


@dataclasses.dataclass(frozen=True)
class ModalityChoice:
    """Probabilities of showing audio only, video only, or both; and of showing text only.

    `p` is the paper's [p_a, p_v, p_av] (spec section 2) and sums to 1; with probability `text_only`
    a row shows neither. What a sample does not have is left out.
    """

    p: tuple[float, float, float] = (0.0, 0.0, 1.0)
    text_only: float = 0.0

    def __post_init__(self):
        if len(self.p) != 3 or min(self.p) < 0 or abs(sum(self.p) - 1) > 1e-6:
            raise ValueError(
                f"modality_probs: expected [p_a, p_v, p_av] that sum to 1, got {self.p}"
            )
        if not 0 <= self.text_only <= 1:
            raise ValueError(f"text_only_prob: expected a probability, got {self.text_only}")

    def draw(self, rng: np.random.Generator) -> str:
        if rng.random() < self.text_only:
            return "text"
        return ("a", "v", "av")[int(rng.choice(3, p=self.p))]


@dataclasses.dataclass(frozen=True)
class Task:
    """What the examples of a stage are.

    unit: "sample" (SFT: prompt and answer), "prompt" (reinforcement: without the answer) or
    "history" (compressor: memory vectors and the text they stand for). utterances: of a "history"
    in a row, such as 1 for single ones; 0: all. regime: history labels shown; with probability
    `label_dropout` a row shows none. predictions: sample id -> labels, for regime "predicted".
    """

    unit: str = "sample"
    utterances: int = 0
    regime: str = "gold"
    label_dropout: float = 0.0
    modality: ModalityChoice = ModalityChoice()
    predictions: dict[str, dict[str, str]] | None = None

    def __post_init__(self):
        if self.unit not in UNITS:
            raise ValueError(f"unit: expected one of {UNITS}, got {self.unit!r}")

    def build(
        self, prompter: Prompter, sample: Sample, first: int, modality: str, hide: bool
    ) -> Example:
        """The example of a sample; `first`: of the history's utterances that it is about."""
        regime = "none" if hide else self.regime
        if self.unit == "history" and self.utterances:
            part = sample.history[first : first + self.utterances]
            sample = dataclasses.replace(sample, history=part)
        labels = history_labels(sample, regime, self.predictions)
        if self.unit in ("sample", "prompt"):
            return prompter.example(sample, modality, labels, with_answer=self.unit == "sample")
        return prompter.reconstruction(sample, labels, first)


@dataclasses.dataclass(frozen=True)
class Item:
    """One trainable unit: a record, or its history from utterance `first` on; upper bounds of its
    lengths.

    lengths: (tokens, fbank frames, history tokens, memories) with every modality shown.
    """

    id: str
    record: int
    first: int
    lengths: tuple[int, int, int, int]
    has_video: bool


def list_items(
    source: SampleSource, task: Task, prompter: Prompter
) -> tuple[list[Item], collections.Counter]:
    """All units of a split that fit, and the counted reasons of those that do not.

    A dialogue's longest history is cut into parts of `task.utterances`, or whole.
    """
    records = [(i, source[i]) for i in range(len(source))]
    if task.unit == "history":
        longest: dict[str, tuple[int, Sample]] = {}
        for i, sample in records:
            best = longest.get(sample.dialogue_id)
            if best is None or len(sample.history) > len(best[1].history):
                longest[sample.dialogue_id] = (i, sample)
        records = [pair for pair in longest.values() if pair[1].history]
    items, refused = [], collections.Counter()
    for i, sample in records:
        step = task.utterances if task.unit == "history" else 0
        for first in range(0, len(sample.history), step) if step else (0,):
            try:
                example = task.build(prompter, sample, first, "av", hide=False)
            except PromptError as error:
                refused[error.reason] += 1
                continue
            lengths = tuple(
                len(getattr(example, name))
                for name in ("tokens", "fbank", "history_tokens", "memory_index")
            )
            name = f"{sample.id} utterance {first}" if step else sample.id
            items.append(Item(name, i, first, lengths, len(example.frames) > 0))
    return items, refused


@dataclasses.dataclass(frozen=True)
class PlannedBatch:
    """Rows of one batch: items, modalities, whether history labels are hidden, padded lengths."""

    items: tuple[Item, ...]
    modalities: tuple[str, ...]
    hidden: tuple[bool, ...]
    minimum: tuple[int, int, int, int]


GROUPED_BATCHES = 16


class TrainPlan:
    """Batch `step` for every step >= 0; epochs are shuffled anew and rows grouped by length.

    Each epoch is a permutation cut into windows of 16 batches; a window is sorted by padded lengths
    so that rows of a batch share their buckets, and the batches of an epoch are shuffled. Without
    `group_by_length` a batch is what the permutation gives. Rows that do not fill a batch wait for
    another epoch.
    """

    def __init__(
        self,
        items: Sequence[Item],
        task: Task,
        batch_size: int,
        seed: int,
        steps: int,
        buckets: Buckets = Buckets(),
        group_by_length: bool = True,
    ):
        if len(items) < batch_size:
            raise ValueError(
                f"batch_size: expected at most the {len(items)} usable examples, got {batch_size}"
            )
        self.items, self.task, self.seed, self.steps = list(items), task, seed, steps
        self.batch_size = batch_size
        self.window = GROUPED_BATCHES if group_by_length else 1
        sizes = np.array([(*buckets.padded(i.lengths), sum(i.lengths)) for i in items])
        # Rank of every item by its padded lengths, then by its own.
        self._rank = np.empty(len(items), np.int64)
        self._rank[np.lexsort(sizes.T[::-1])] = np.arange(len(items))
        self.steps_per_epoch = len(items) // batch_size
        self._epoch = functools.lru_cache(maxsize=2)(self._epoch_rows)

    def __getstate__(self):
        return {k: v for k, v in vars(self).items() if k != "_epoch"}

    def __setstate__(self, state):
        vars(self).update(state)
        self._epoch = functools.lru_cache(maxsize=2)(self._epoch_rows)

    def _epoch_rows(self, epoch: int) -> np.ndarray:
        """int64[steps_per_epoch, batch_size]: the rows of every batch of an epoch."""
        rng = np.random.default_rng((self.seed, 1, epoch))
        order = rng.permutation(len(self.items))[: self.steps_per_epoch * self.batch_size]
        span = self.window * self.batch_size
        grouped = []
        for start in range(0, len(order), span):
            part = order[start : start + span]
            grouped.append(part[np.argsort(self._rank[part])])
        rows = np.concatenate(grouped).reshape(self.steps_per_epoch, self.batch_size)
        return rng.permutation(rows)

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> PlannedBatch:
        epoch, at = divmod(step, self.steps_per_epoch)
        items = tuple(self.items[i] for i in self._epoch(epoch)[at])
        rng = np.random.default_rng((self.seed, 2, step))
        modalities = tuple(self.task.modality.draw(rng) for _ in items)
        hidden = tuple(bool(x) for x in rng.random(len(items)) < self.task.label_dropout)
        return plan_batch(items, modalities, hidden)


def plan_batch(
    items: Sequence[Item], modalities: Sequence[str], hidden: Sequence[bool]
) -> PlannedBatch:
    tokens, fbank, history, memory = (max(x) for x in zip(*(i.lengths for i in items), strict=True))
    audio = [i.lengths[1] for i, m in zip(items, modalities, strict=True) if m in ("a", "av")]
    fbank = max(audio, default=0)
    return PlannedBatch(
        tuple(items), tuple(modalities), tuple(hidden), (tokens, fbank, history, memory)
    )


@dataclasses.dataclass(frozen=True)
class Loader:
    """PlannedBatch -> (ids, Batch) of this host's rows."""

    source: SampleSource
    task: Task
    prompter: Prompter
    buckets: Buckets
    host: int = 0
    hosts: int = 1

    def __call__(self, planned: PlannedBatch) -> tuple[tuple[str, ...], Batch]:
        share = len(planned.items) // self.hosts
        mine = range(self.host * share, (self.host + 1) * share)
        examples = []
        for row in mine:
            item = planned.items[row]
            examples.append(
                self.task.build(
                    self.prompter,
                    self.source[item.record],
                    item.first,
                    planned.modalities[row],
                    planned.hidden[row],
                )
            )
        batch = collate(
            examples, self.prompter.tokenizer.pad_id, self.buckets, minimum=planned.minimum
        )
        shows_video = any(
            i.has_video and "v" in m for i, m in zip(planned.items, planned.modalities, strict=True)
        )
        if shows_video and batch.frames.shape[1] == 0:  # another host's rows have the video
            shape = self.source[next(i.record for i in planned.items if i.has_video)].frames.shape
            batch = batch._replace(frames=np.zeros((share, *shape), np.uint8))
        return tuple(e.id for e in examples), batch


class WorkerError(RuntimeError):
    """A loader process died."""


def train_iterator(
    plan: TrainPlan, loader: Loader, start: int, threads: int, processes: int, prefetch: int
) -> Iterator[tuple[tuple[str, ...], Batch]]:
    """(ids, Batch) of every step from `start` on, `prefetch` batches ahead.

    Loaded by reader threads of grain, or by `processes` > 0 processes (where decoding and
    tokenising hold the interpreter's lock). Close it to end the processes.
    """
    if processes:
        yield from _from_processes(plan, loader, start, processes, prefetch)
        return
    import grain  # imports jax, so loader processes must not

    dataset = grain.MapDataset.source(plan)[start:].map(loader)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    yield from dataset.to_iter_dataset(options)


def _from_processes(plan, loader, start, processes, prefetch):
    """An ordered pool of spawned processes. Raises WorkerError where one died, instead of waiting
    for it."""
    pool = concurrent.futures.ProcessPoolExecutor(
        processes,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(loader,),
    )
    try:
        waiting: collections.deque[concurrent.futures.Future] = collections.deque()
        for step in range(start, len(plan) + prefetch):
            if step < len(plan):
                waiting.append(pool.submit(_load, plan[step]))
            if step >= start + prefetch and waiting:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except concurrent.futures.process.BrokenProcessPool as error:
        raise WorkerError(
            f"one of {processes} loader processes died (out of memory, or killed); the run stops "
            "at its last checkpoint: go on with --resume"
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _start_worker(loader: Loader) -> None:
    global _loader
    _loader = loader
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the pool


def _load(planned: PlannedBatch):
    return _loader(planned)


def evaluation_batches(
    items: list[Item], rows: int, modality: str
) -> list[tuple[PlannedBatch, int]]:
    """Batches sorted by length and the number of real rows; the last is filled up from the first
    items on."""
    items = sorted(items, key=lambda i: sum(i.lengths))
    batches = []
    for start in range(0, len(items), rows):
        full = [items[(start + row) % len(items)] for row in range(rows)]
        planned = plan_batch(full, [modality] * rows, [False] * rows)
        batches.append((planned, min(rows, len(items) - start)))
    return batches
