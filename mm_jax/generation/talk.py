"""Talks with a model: a conversation that grows by a turn of the client and the reply to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from flax import nnx

from mm_jax.data.batch import Shape
from mm_jax.data.records import CLIENT, THERAPIST, Sample, Utterance
from mm_jax.data.shapes import Shapes, geometric, joined
from mm_jax.generation.predictor import Prediction, predictor_of
from mm_jax.run.build import Run

# What a turn is padded to: these, doubled as often as needed, so that few programs are compiled.
LEAST = Shape(tokens=256, frames=1, fbank=512, history=256, memory=16)
LONGEST = 8192  # tokens of a prompt, where data.max_length sets no limit


class Conversation:
    """Holds a conversation: its utterances, with the labels that the model gave them.

    What a compressor has read of it is kept, so that it reads only what is new.
    """

    def __init__(self, run: Run, params: nnx.State, history: tuple[Utterance, ...] = ()):
        limit = run.prompter.max_length or LONGEST
        run = dataclasses.replace(run, prompter=dataclasses.replace(run.prompter, max_length=limit))
        self.space, self.params, self.history = run.prompter.label_space, params, history
        self.predictor = predictor_of(run, 1)
        self.predictor.choose = doubled
        self.weights = self.predictor.weights.of(params)
        self.labelled = run.config.data.history_labels != "none"
        self.memories: dict = {}

    def say(self, turn: Sample) -> Iterator[Prediction | str]:
        """Answers a client turn (`own_sample`; its history is this conversation's): yields what
        `Predictor.stream` does. A turn counts once `keep` is told its reply.

        Raises PromptError.
        """
        sample = dataclasses.replace(turn, history=self.history)
        regime = "gold" if self.labelled and any(u.labels for u in self.history) else "none"
        return self.predictor.stream(self.params, self.weights, sample, "av", regime, self.memories)

    def keep(self, said: str, reply: str, labels: dict[str, str] | None = None) -> None:
        """Adds a turn and its reply, with what the model said of both."""
        for speaker, text in ((CLIENT, said), (THERAPIST, reply)):
            tasks = self.space.by_speaker[speaker]
            own = {task.name: label for task in tasks if (label := (labels or {}).get(task.name))}
            utterance = Utterance(speaker, text, own, turn=self._turns)
            self.history += (utterance,)

    @property
    def _turns(self) -> int:
        return self.history[-1].turn + 1 if self.history else 0

    def undo(self) -> bool:
        """Takes the last turn and its reply back; says whether there was one."""
        last = max((i for i, u in enumerate(self.history) if u.speaker == CLIENT), default=None)
        if last is None:
            return False
        self.history = self.history[:last]
        return True


def doubled(lengths: list[Shape]) -> Shapes:
    most = joined(lengths)
    return Shapes((Shape(*(geometric(n, least) for n, least in zip(most, LEAST, strict=True))),))
