"""Records of a dialogue data set, and how utterances become samples (spec section 1)."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

CLIENT, THERAPIST = "client", "therapist"

# MESC's tasks.
CLIENT_EMOTION, THERAPIST_EMOTION, STRATEGY = "client_emotion", "therapist_emotion", "strategy"

SPEAKERS = {CLIENT: "Client", THERAPIST: "Therapist"}  # as prompts name them


@dataclasses.dataclass(frozen=True)
class Utterance:
    """One utterance. labels: task -> label, those that are known; times are in seconds."""

    speaker: str
    text: str
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    clue: str = ""
    turn: int = 0
    media: str = ""
    start: float = 0.0
    end: float = 0.0


@dataclasses.dataclass(frozen=True)
class Dialogue:
    id: str
    utterances: tuple[Utterance, ...]
    problem_type: str = ""
    situation: str = ""


@dataclasses.dataclass(frozen=True)
class Sample:
    """One therapist turn to predict.

    `history` holds every utterance before the current client turn. The targets (labels: task ->
    label, those that are known; and response) never enter the input. `frames` is uint8[F, S, S, 3]
    and `fbank` float32[A, 128]; length 0 means absent, and `video_status` and `audio_status` give
    the reason ("ok" if present).
    """

    id: str
    dialogue_id: str
    client_text: str
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    response: str = ""
    problem_type: str = ""
    situation: str = ""
    client_clue: str = ""
    history: tuple[Utterance, ...] = ()
    turn: int = 0
    cue: str = ""
    frames: np.ndarray = dataclasses.field(
        default_factory=lambda: np.zeros((0, 0, 0, 3), np.uint8), compare=False
    )
    fbank: np.ndarray = dataclasses.field(
        default_factory=lambda: np.zeros((0, 128), np.float32), compare=False
    )
    video_status: str = "not requested"
    audio_status: str = "not requested"

    def target(self, task: str) -> str:
        """Returns the gold label of a task, or "" if the sample has none."""
        return self.labels.get(task, "")


def majority(labels: Iterable[str]) -> str:
    """Returns the most frequent label, the first one seen in a tie, or "" without labels."""
    labels = [label for label in labels if label]
    return Counter(labels).most_common(1)[0][0] if labels else ""


def turn_labels(utterances: Sequence[Utterance]) -> dict[str, str]:
    """Returns each task's majority over utterances (in a tie, the label seen first)."""
    tasks = dict.fromkeys(task for u in utterances for task in u.labels)
    return {task: majority(u.labels.get(task, "") for u in utterances) for task in tasks}


@dataclasses.dataclass(frozen=True)
class TurnSpan:
    """A turn: utterances first to last (inclusive) of one speaker."""

    first: int
    last: int
    speaker: str


def merge_turns(utterances: Sequence[Utterance]) -> list[TurnSpan]:
    """Merges consecutive utterances of one speaker into turns."""
    spans: list[TurnSpan] = []
    for i, utterance in enumerate(utterances):
        if spans and spans[-1].speaker == utterance.speaker:
            spans[-1] = dataclasses.replace(spans[-1], last=i)
        else:
            spans.append(TurnSpan(i, i, utterance.speaker))
    return spans


def sample_spans(dialogue: Dialogue) -> list[tuple[int, TurnSpan, TurnSpan]]:
    """Lists (turn index, client turn, therapist turn) of a dialogue's samples, in order."""
    spans = merge_turns(dialogue.utterances)
    return [
        (t, spans[t - 1], span)
        for t, span in enumerate(spans)
        if t > 0 and span.speaker == THERAPIST and spans[t - 1].speaker == CLIENT
    ]


def dialogue_samples(dialogue: Dialogue) -> list[Sample]:
    """Makes a dialogue's samples, without media: one per therapist turn after a client turn.

    A turn's label is the majority over its utterances.
    """
    turn_of = {
        i: t
        for t, span in enumerate(merge_turns(dialogue.utterances))
        for i in range(span.first, span.last + 1)
    }
    utterances = [
        dataclasses.replace(u, turn=turn_of[i]) for i, u in enumerate(dialogue.utterances)
    ]
    samples = []
    for turn, client, therapist in sample_spans(dialogue):
        said = utterances[client.first : client.last + 1]
        answer = utterances[therapist.first : therapist.last + 1]
        samples.append(
            Sample(
                id=sample_id(dialogue.id, turn),
                dialogue_id=dialogue.id,
                problem_type=dialogue.problem_type,
                situation=dialogue.situation,
                history=tuple(utterances[: client.first]),
                client_text=" ".join(u.text for u in said),
                client_clue=" ".join(u.clue for u in said if u.clue),
                labels=turn_labels((*said, *answer)),
                response=" ".join(u.text for u in answer),
                turn=turn,
            )
        )
    return samples


def utterance_samples(dialogue: Dialogue) -> list[Sample]:
    """Makes a dialogue's samples, without media, where only labels of the client's utterances are
    asked for: one per client utterance that has a label. Every utterance is a turn."""
    utterances = [dataclasses.replace(u, turn=i) for i, u in enumerate(dialogue.utterances)]
    return [
        Sample(
            id=sample_id(dialogue.id, u.turn + 1) if len(utterances) > 1 else dialogue.id,
            dialogue_id=dialogue.id,
            problem_type=dialogue.problem_type,
            situation=dialogue.situation,
            history=tuple(utterances[: u.turn]),
            client_text=u.text,
            client_clue=u.clue,
            labels=u.labels,
            turn=u.turn + 1,
        )
        for u in utterances
        if u.speaker == CLIENT and u.labels
    ]


def sample_id(dialogue_id: str, turn: int) -> str:
    """Returns the id of the sample whose target is therapist turn `turn` of a dialogue."""
    return f"{dialogue_id}_{turn}"


def labelling_sample_id(dialogue_id: str, utterance: Utterance) -> str:
    """Returns the id of the sample whose prediction labels a history utterance (`predicted`)."""
    therapist_turn = utterance.turn + (utterance.speaker == CLIENT)
    return sample_id(dialogue_id, therapist_turn)
