"""Writes out a conversation's history: its labels, its lines, and the compressor's input."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

from mm_jax.data.labels import LabelSpace
from mm_jax.data.records import SPEAKERS, Sample, Utterance, labelling_sample_id
from mm_jax.data.tokenizer import Tokenizer

HISTORY_REGIMES = ("gold", "predicted", "none")


Shown = Mapping[str, str] | None  # an utterance's labels by task; None in the regime "none"


def history_line(utterance: Utterance, labels: Shown, space: LabelSpace) -> tuple[str, str]:
    """Returns (caption, text) of an utterance as the compressor reads it (spec section 3).

    Captions are `Therapist(strategy) (emotion)` or `Client (emotion)`: labels with guidance, which
    are acts, come first. The text begins with a space.
    """
    role, states = SPEAKERS[utterance.speaker], ""
    for task in space.by_speaker[utterance.speaker]:
        label = (labels or {}).get(task.name)
        if label and task.guidance:
            role += f"({label})"
        elif label:
            states += f" ({label})"
    role += states
    text = f"{utterance.text} {utterance.clue}" if utterance.clue else utterance.text
    return role, f" {text}"


def history_labels(
    sample: Sample, regime: str, predictions: Mapping[str, Mapping[str, str]] | None = None
) -> list[Shown]:
    """Lists the labels that a regime shows for each utterance of the history.

    `predictions`: sample id -> {task: label}, for the regime "predicted"; a turn that no sample
    predicts (a therapist who opens the dialogue) has no label.
    """
    if regime not in HISTORY_REGIMES:
        raise ValueError(f"history_labels: expected one of {HISTORY_REGIMES}, got {regime!r}")
    if regime == "none":
        return [None] * len(sample.history)
    if regime == "gold":
        return [u.labels for u in sample.history]
    if predictions is None:
        raise ValueError("history_labels 'predicted' needs the predictions of earlier turns")
    # They also label the other speaker's turn of the same sample, which no line shows.
    return [predictions.get(labelling_sample_id(sample.dialogue_id, u), {}) for u in sample.history]


LONG_LINE = 1000  # characters, from which on a line is not kept


def line_ids(tokenizer: Tokenizer, caption: str, text: str) -> tuple[int, ...]:
    """Returns the token ids of a line of `history_line`."""
    known = len(text) < LONG_LINE
    return (known_line_ids if known else known_line_ids.__wrapped__)(tokenizer, caption, text)


@functools.lru_cache(maxsize=16_384)  # every turn of a conversation has them again
def known_line_ids(tokenizer: Tokenizer, caption: str, text: str) -> tuple[int, ...]:
    return (*tokenizer.encode(caption), *tokenizer.encode_data(text))


def newest_lines(
    sample: Sample,
    tokenizer: Tokenizer,
    labels: Sequence[Shown],
    space: LabelSpace,
    limit: int = 0,
) -> tuple[int, list[int]]:
    """Returns the token ids of the newest lines of a history, for prompts that hold words.

    Lines are whole: as many as fit in `limit` tokens (0: all). The number before them is how many
    older utterances were left out.
    """
    lines: list[tuple[int, ...]] = []
    used = 0
    for utterance, shown in zip(reversed(sample.history), reversed(labels), strict=True):
        caption, text = history_line(utterance, shown, space)
        line = line_ids(tokenizer, f"\n{caption}", text)
        used += len(line)
        if limit and used > limit:
            break
        lines.append(line)
    return len(sample.history) - len(lines), [i for line in reversed(lines) for i in line]


@dataclasses.dataclass(frozen=True)
class MemoryBudget:
    """How many memory vectors stand for how many utterances (one for each in the paper).

    `vectors` memory vectors follow every group of `utterances` utterances, and the last one.
    """

    vectors: int = 1
    utterances: int = 1

    def __post_init__(self):
        if self.vectors < 1 or self.utterances < 1:
            raise ValueError(f"memory budget: expected at least 1, got {self}")

    def count(self, utterances: int) -> int:
        """Counts the memory vectors of a history."""
        return -(-utterances // self.utterances) * self.vectors

    def settled(self, utterances: int, memory_index: Sequence[int]) -> int:
        """Counts the tokens that every longer history of the conversation begins with.

        These are the tokens up to the last complete group; `<MEM>` tokens are at `memory_index`.
        """
        complete = utterances // self.utterances * self.vectors
        return int(memory_index[complete - 1]) + 1 if complete else 0


def encode_history(
    sample: Sample,
    tokenizer: Tokenizer,
    labels: Sequence[Shown],
    space: LabelSpace,
    budget: MemoryBudget = MemoryBudget(),
) -> tuple[list[int], list[int]]:
    """Returns the token ids of the compressor's input and the positions of its `<MEM>` tokens."""
    ids: list[int] = []
    memory: list[int] = []
    for i, (utterance, shown) in enumerate(zip(sample.history, labels, strict=True), 1):
        caption, text = history_line(utterance, shown, space)
        ids += line_ids(tokenizer, caption, text)
        if i % budget.utterances == 0 or i == len(sample.history):
            memory += range(len(ids), len(ids) + budget.vectors)
            ids += [tokenizer.memory_id] * budget.vectors
        else:
            ids += tokenizer.encode("\n")
    return ids, memory
