"""Answers turns as they come: each is read for itself, and all replies are decoded together."""

from __future__ import annotations

import collections
import dataclasses
import logging
import time
from collections.abc import Hashable
from typing import NamedTuple

import numpy as np
from flax import nnx

from mm_jax.data.batch import Shape
from mm_jax.data.prompts import PromptError
from mm_jax.data.records import Sample
from mm_jax.data.shapes import Shapes, geometric, joined
from mm_jax.generation.engine import Engine, Progress, Request
from mm_jax.generation.memory import ConversationMemory
from mm_jax.generation.predictor import Prediction, predictor_of
from mm_jax.generation.sampler import Decoding
from mm_jax.generation.streaming import TextStream
from mm_jax.models.sharding import batch_parallelism
from mm_jax.run.build import Run

log = logging.getLogger(__name__)
LEAST_TEMPERATURE = 1e-3  # below it logits would overflow: greedy
LONGEST = 8192  # tokens of a prompt, where data.max_length sets no limit
# A turn costs the same however long the conversation is: the compressor's state holds all of it.
MOST_VECTORS = 64
# What a turn is padded to: these, doubled as often as needed, so that few programs are compiled.
LEAST = Shape(tokens=256, frames=1, fbank=512, history=256, memory=MOST_VECTORS)


@dataclasses.dataclass(frozen=True)
class Turn:
    """Asks for replies to a client turn.

    sample: the turn with its history; memories: what a compressor has read of the conversation,
    which is updated; seeds: one per reply; limit: the most tokens of one, 0 for the run's;
    temperature, top_p: None for the run's; deadline: when to stop, by `time.monotonic`.
    """

    name: Hashable
    sample: Sample
    memories: dict[str, ConversationMemory] = dataclasses.field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    limit: int = 0
    temperature: float | None = None
    top_p: float | None = None
    deadline: float | None = None


class Draft(NamedTuple):
    """Tells what a model says before it replies: a prediction without the reply."""

    name: Hashable
    prediction: Prediction
    prompt_tokens: int


class Piece(NamedTuple):
    """Tells how a reply goes on.

    reply: which of the turn's; text: whole characters; finished: as in `engine.Progress`, then
    with the whole `prediction` (None where nothing was read).
    """

    name: Hashable
    reply: int
    text: str
    tokens: np.ndarray
    logps: np.ndarray
    finished: str
    prediction: Prediction | None


class Failure(NamedTuple):
    """Tells that a turn cannot be read, and why."""

    name: Hashable
    error: Exception


@dataclasses.dataclass
class Reading:
    """Holds a turn whose prompt was read."""

    turn: Turn
    draft: Prediction
    texts: list[TextStream]
    running: set[int]  # replies that are not finished


class Live:
    """Holds a run's model ready for turns: `submit` any, and `step` until `is_idle`.

    slots: replies that are decoded together. Labels are scored before the reply is written. It
    belongs to one thread.
    """

    def __init__(self, run: Run, params: nnx.State, slots: int = 8):
        limit = run.prompter.max_length or LONGEST
        prompter = dataclasses.replace(
            run.prompter, max_length=limit, most_vectors=most_vectors(run)
        )
        settings = run.config.predict.model_copy(update={"labels": "scored"})
        run = dataclasses.replace(
            run, prompter=prompter, config=run.config.model_copy(update={"predict": settings})
        )
        self.space, self.params, self.settings = prompter.label_space, params, settings
        self.predictor = predictor_of(run, 1)
        self.predictor.choose = doubled
        self.weights = self.predictor.weights.of(params)
        self.labelled = run.config.data.history_labels != "none"
        mesh = run.abstract.mesh
        self.ways = batch_parallelism(mesh)
        self.engine = Engine(
            self.predictor.weights.decoder,
            mesh,
            self.predictor.engine.drawing,
            slots=slots,
            kv_heads=self.predictor.weights.kv_heads,
            each=True,
        )
        self.waiting: collections.deque[Turn] = collections.deque()
        self.read: collections.deque[tuple[Decoding, Request]] = collections.deque()
        self.readings: dict[Hashable, Reading] = {}

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not self.readings

    @property
    def fill(self) -> int:
        """Counts the replies that are being decoded."""
        return len(self.engine.running)

    def submit(self, turn: Turn) -> None:
        self.waiting.append(turn)

    def cancel(self, name: Hashable) -> None:
        """Ends a turn with the next step; what its replies have is told."""
        reading = self.readings.get(name)
        if reading is None:
            self.waiting = collections.deque(t for t in self.waiting if t.name != name)
            return
        self.read = collections.deque(r for r in self.read if r[1].name[0] != name)
        for reply in list(reading.running):
            if any(request.name == (name, reply) for request in self.engine.requests()):
                self.engine.cancel((name, reply))
            else:
                reading.running.discard(reply)
        if not reading.running:
            del self.readings[name]

    def clear(self) -> list[Hashable]:
        """Forgets all turns, after an error; returns their names."""
        names = [turn.name for turn in self.waiting] + list(self.readings)
        self.waiting.clear()
        self.read.clear()
        self.readings.clear()
        self.engine.clear()
        return names

    def step(self) -> list[Draft | Piece | Failure]:
        """Reads a turn, if a slot is free for its reply, and decodes a few tokens of all replies.

        Replies that run wait for no more than one prompt.
        """
        told: list[Draft | Piece | Failure] = []
        while self.read and self.engine.wants_more:
            self._admit(*self.read.popleft())
        while self.waiting and not self.read and self.engine.wants_more:
            busy = bool(self.engine.running)
            told += self._read(self.waiting.popleft())
            while self.read and self.engine.wants_more:
                self._admit(*self.read.popleft())
            if busy:
                break
        if not self.engine.is_idle:
            told += map(self._piece, self.engine.step(self.weights))
        return told

    def _read(self, turn: Turn) -> list[Draft | Piece | Failure]:
        if turn.deadline is not None and time.monotonic() >= turn.deadline:
            none = np.zeros(0, np.int32), np.zeros(0, np.float32)
            replies = range(len(turn.seeds))
            return [Piece(turn.name, i, "", *none, "deadline", None) for i in replies]
        labelled = self.labelled and any(u.labels for u in turn.sample.history)
        regime = "gold" if labelled else "none"
        try:
            draft, at, length = self.predictor.read_one(
                self.params, turn.sample, "av", regime, turn.memories
            )
        except PromptError as error:
            return [Failure(turn.name, error)]
        except Exception as error:  # of one turn: the others go on
            log.exception("a turn could not be read")
            return [Failure(turn.name, error)]
        told: list[Draft | Piece | Failure] = [Draft(turn.name, draft, length)]
        if at is None:
            return told
        temperature = self.settings.temperature if turn.temperature is None else turn.temperature
        manner = (
            temperature if temperature >= LEAST_TEMPERATURE else 0.0,
            self.settings.top_p if turn.top_p is None else turn.top_p,
        )
        limit = min(turn.limit, self.settings.max_new_tokens)
        for reply, seed in enumerate(turn.seeds):
            name = (turn.name, reply)
            self.read.append((at, Request(name, [seed], limit, turn.deadline, manner)))
        decode = self.predictor.prompter.tokenizer.decode
        texts = [TextStream(decode) for _ in turn.seeds]
        self.readings[turn.name] = Reading(turn, draft, texts, set(range(len(turn.seeds))))
        return told

    def _admit(self, at: Decoding, request: Request) -> None:
        # A prompt's rows are all alike: which one decodes is which device does.
        rows: list[Request | None] = [None] * len(at.logits)
        rows[self.engine.emptiest_way * len(rows) // self.ways] = request
        self.engine.admit(at, rows, self.predictor.seed)

    def _piece(self, progress: Progress) -> Piece:
        name, reply = progress.name
        reading = self.readings[name]
        text = reading.texts[reply].add(progress.tokens[0], last=bool(progress.finished))
        whole = None
        if progress.result is not None:
            whole = self.predictor.answered(reading.draft, progress.result)
            reading.running.discard(reply)
            if not reading.running:
                del self.readings[name]
        new = progress.tokens[0], progress.logps[0]
        return Piece(name, reply, text, *new, progress.finished, whole)


def most_vectors(run: Run) -> int:
    """Returns how many memory vectors a prompt shows: those of whole groups."""
    return max(1, MOST_VECTORS // run.prompter.budget.vectors) * run.prompter.budget.vectors


def doubled(lengths: list[Shape]) -> Shapes:
    most = joined(lengths)
    return Shapes((Shape(*(geometric(n, least) for n, least in zip(most, LEAST, strict=True))),))
