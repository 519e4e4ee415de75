"""Turns samples into text and token ids: the ECoT template, chat turns, and all length arithmetic.

Media are tokens on the host: `<video>`, `<audio>` and `<history>` are repeated to their exact
counts, and the model puts features in their places. `SpanLengths` computes every length.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from mm_jax.config.errors import UserError
from mm_jax.data.history import (
    MemoryBudget,
    Shown,
    encode_history,
    history_line,
    newest_lines,
)
from mm_jax.data.labels import RESPONSE_FIELD, LabelSpace, Task
from mm_jax.data.records import Sample
from mm_jax.data.tokenizer import AUDIO, HISTORY, VIDEO, Tokenizer

MODALITIES = ("text", "a", "v", "av")
PLACEHOLDER = re.compile(f"({VIDEO}|{AUDIO}|{HISTORY})")

SYSTEM = {
    "ecot": (
        "You are an expert in emotional psychology. You sit with a client as their therapist, "
        "notice what they feel from their words, face and voice, and answer with care."
    ),
    "short": "Support the client.",
}

COMPRESSOR_SYSTEM = {
    "ecot": "Below are numbered memory vectors of a therapy conversation. Write its lines out.",
    "short": "Recall.",
}


def balancing_weights(labels: Sequence[str]) -> dict[str, float]:
    """Maps each label to 1 / sqrt(its share), scaled so that the mean over `labels` is 1."""
    counts = collections.Counter(label for label in labels if label)
    total = sum(math.sqrt(n) for n in counts.values())
    return {label: counts.total() / (math.sqrt(n) * total) for label, n in counts.items()}


def user_segments(
    sample: Sample,
    template: str,
    space: LabelSpace,
    modality: str,
    previous: dict[str, list[str]] | None = None,
) -> list[str]:
    """Writes the user message as segments: template text at even indices, data text at odd ones.

    `previous` holds the last labels of every task in the history, oldest first; they are shown in
    the form of the answer. Data text never turns into special tokens; empty parts are left out with
    their captions. A word is tokenised with the space before it, so data segments begin with one.
    """
    full = template == "ecot"
    segments: list[str] = [""]

    def caption(text: str) -> None:
        segments[-1] += text

    def data(text: str) -> None:
        segments.extend([f" {text}", ""])

    if sample.problem_type:
        caption("The client's problem:" if full else "Problem:")
        data(sample.problem_type)
        caption("\n")
    if sample.situation:
        caption("The client's situation:" if full else "Situation:")
        data(sample.situation)
        caption("\n")
    if "v" in modality:
        caption(f"The client's face while speaking: {VIDEO}\n" if full else f"{VIDEO}\n")
    if "a" in modality:
        caption(f"The client's voice: {AUDIO}\n" if full else f"{AUDIO}\n")
    if sample.history:
        caption(f"The conversation so far: {HISTORY}\n" if full else f"{HISTORY}\n")
    if sample.client_text:
        caption("The client now says:" if full else "Client:")
        data(sample.client_text)
        caption("\n")
    if sample.client_clue:
        caption("What can be seen:")
        data(sample.client_clue)
        caption("\n")
    if previous:
        caption("The last labels, the newest at the end:\n" if full else "Before:\n")
        for task, last in previous.items():
            caption(f"{space[task].field} {', '.join(last)}\n")
    if not full:
        caption("Answer:")
        return segments
    caption(
        "\nThink in four steps.\n1. Understand: what happened, and what does the client need?\n"
        f"2. {space.asks}\n"
    )
    if space.reply:
        caption(
            "3. Write a reply that is empathic, truthful and safe, and takes up some of the "
            "client's own words.\n"
            "4. Consider how the reply will affect the client, and mend it if it could hurt.\n"
        )
    caption("Answer in this form:")
    for task in space.tasks:
        caption(f"\n{task.field} ...")
    if space.reply:
        caption(f"\n{RESPONSE_FIELD} ...")
    return segments


def last_labels(
    sample: Sample, labels: Sequence[Shown], space: LabelSpace, count: int
) -> dict[str, list[str]]:
    """Returns each task's last labels in the history, at most `count`, oldest first.

    Tasks are in the order of the answer; tasks without labels are left out.
    """
    found: dict[str, list[str]] = {task: [] for task in space.names}
    for utterance, shown in zip(sample.history, labels, strict=True):
        for task in space.by_speaker[utterance.speaker]:
            label = (shown or {}).get(task.name)
            found[task.name] += [label] if label else []
    return {task: all_labels[-count:] for task, all_labels in found.items() if all_labels}


def chat_messages(
    sample: Sample,
    template: str,
    space: LabelSpace,
    labels: Sequence[Shown],
    media: Mapping[str, list[dict]] | None = None,
) -> list[dict]:
    """Writes the prompt as messages for another chat model, with the history written out.

    `labels` as in `Prompter.example`. The template is the same, so that answers parse alike. media:
    the content parts that take the place of VIDEO and AUDIO; without any the content is text.
    """
    media = media or {}
    lines = [
        "".join(history_line(utterance, shown, space))
        for utterance, shown in zip(sample.history, labels, strict=True)
    ]
    modality = "v" * (VIDEO in media) + "a" * (AUDIO in media)
    content: list[dict] = [{"type": "text", "text": ""}]
    for i, segment in enumerate(user_segments(sample, template, space, modality)):
        # Only the template's own words hold placeholders.
        for piece in [segment] if i % 2 else PLACEHOLDER.split(segment):
            if i % 2 == 0 and piece in media:
                content += [*media[piece], {"type": "text", "text": ""}]
            elif i % 2 == 0 and piece == HISTORY:
                content[-1]["text"] += "\n" + "\n".join(lines)
            else:
                content[-1]["text"] += piece
    content = [part for part in content if part["type"] != "text" or part["text"]]
    return [
        {"role": "system", "content": SYSTEM[template]},
        {"role": "user", "content": content if media else content[0]["text"]},
    ]


@dataclasses.dataclass(frozen=True)
class SpanLengths:
    """Computes the token counts of media spans from shapes and configuration alone.

    patches_per_side: of one frame; connector_padding: 0 for stc_connector_v35, 1 for the older
    stc_connector (Conv3d kernel 2, stride 2); mel_patches: BEATs patches per time step (128 / 16).
    """

    patches_per_side: int
    connector_padding: int = 0
    mel_patches: int = 8
    patch_frames: int = 16

    def video_tokens(self, num_frames: int) -> int:
        """Counts the tokens of a clip of `num_frames` frames: t' * h' * w'."""

        def halve(n: int) -> int:
            return (n + 2 * self.connector_padding - 2) // 2 + 1

        side = halve(self.patches_per_side)
        return halve(num_frames) * side * side

    def audio_tokens(self, fbank_frames: int) -> int:
        """Counts the tokens of `fbank_frames` frames: whole patches in time x mel patches."""
        return fbank_frames // self.patch_frames * self.mel_patches


@dataclasses.dataclass(frozen=True)
class Example:
    """One tokenised sample (numpy).

    tokens int32[T]; loss_weights float32[T] (weight of predicting tokens[t]); history_tokens
    int32[H] and memory_index int32[U] (the positions of its `<MEM>` tokens); a longer history
    begins with its first `settled` tokens; media as in `Sample`.
    """

    id: str
    tokens: np.ndarray
    loss_weights: np.ndarray
    history_tokens: np.ndarray
    memory_index: np.ndarray
    settled: int
    frames: np.ndarray
    fbank: np.ndarray


class PromptError(UserError, ValueError):
    """Reports an example that cannot be built; `reason` is short, so that it can be counted."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class Prompter:
    """Turns samples into examples for one model and data set.

    template: "ecot" or "short".
    label_weight: loss weight of the labels' own tokens; in reconstructions of a history, of each
        line's role and labels (all other tokens weigh 1).
    balance: task -> label -> a factor on that weight, 1 if missing.
    with_response: whether answers continue after the labels; in reconstructions, whether lines do.
    max_length: longest allowed sequence; longer examples are refused, never cut (0: no limit).
    parts: the parts of the model; what it cannot read is not shown.
    previous_labels: how many of each task's last labels in the history the prompt also names.
    budget: memory vectors of the history.
    history: how the prompt shows the history: as a compressor's "memory" vectors, as "text" (its
        newest lines), or "both" (the newest lines, and memory vectors of the older ones).
    history_tokens: as many whole lines are shown as fit in so many tokens (0: all).
    most_vectors: only so many memory vectors are shown, the newest (0: all). The compressor has
        read the whole history before it wrote them.
    """

    tokenizer: Tokenizer
    plan: SpanLengths
    label_space: LabelSpace
    template: str = "ecot"
    label_weight: float = 1.0
    balance: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    with_response: bool = True
    max_length: int = 0
    parts: tuple[str, ...] = ("vision", "audio", "compressor")
    previous_labels: int = 0
    budget: MemoryBudget = MemoryBudget()
    history: str = "memory"
    history_tokens: int = 0
    most_vectors: int = 0

    def __post_init__(self):
        if self.template not in SYSTEM:
            raise ValueError(f"template: expected one of {sorted(SYSTEM)}, got {self.template!r}")

    def modality(self, sample: Sample, wanted: str) -> str:
        """Returns `wanted` without what sample or model lack, or "text" if nothing is left."""
        if wanted not in MODALITIES:
            raise ValueError(f"modality: expected one of {MODALITIES}, got {wanted!r}")
        audio = wanted in ("a", "av") and "audio" in self.parts and len(sample.fbank) > 0
        video = wanted in ("v", "av") and "vision" in self.parts and len(sample.frames) > 0
        return "a" * audio + "v" * video or "text"

    def split_history(self, sample: Sample, labels: Sequence[Shown]) -> tuple[int, list[int]]:
        """Returns how many of the oldest utterances the compressor reads, and the token ids of the
        lines that the prompt holds."""
        if self.history == "memory":
            return len(sample.history), []
        older, lines = newest_lines(
            sample, self.tokenizer, labels, self.label_space, self.history_tokens
        )
        return (older if self.history == "both" else 0), lines

    def prompt(self, sample: Sample, modality: str, labels: Sequence[Shown]) -> list[int]:
        """Returns prompt ids with every placeholder repeated; `labels` as in `example`."""
        return self._prompt(sample, modality, labels, *self.split_history(sample, labels))

    def _prompt(self, sample, modality, labels, older: int, lines: list[int]) -> list[int]:
        """Builds the prompt of a history that `split_history` split."""
        modality = self.modality(sample, modality)
        tok, plan = self.tokenizer, self.plan
        spans = {
            tok.video_id: [tok.video_id] * plan.video_tokens(len(sample.frames)),
            tok.audio_id: [tok.audio_id] * plan.audio_tokens(len(sample.fbank)),
        }
        vectors = self.budget.count(older)
        if self.most_vectors:
            vectors = min(vectors, self.most_vectors)
        spans[tok.history_id] = [tok.history_id] * vectors + lines
        segments = user_segments(
            sample,
            self.template,
            self.label_space,
            "" if modality == "text" else modality,
            last_labels(sample, labels, self.label_space, self.previous_labels)
            if self.previous_labels
            else None,
        )
        user: list[int] = []
        for i, segment in enumerate(segments):
            if i % 2:
                user += self.tokenizer.encode_data(segment)
            else:
                for token in self.tokenizer.encode(segment):
                    user += spans.get(token, [token])
        return tok.prompt(SYSTEM[self.template], user)

    def lead_ids(self, field: str, first: bool) -> list[int]:
        """Returns the ids of the start of an answer line, such as "\\nTherapist's emotion:"."""
        return self.tokenizer.encode(field if first else f"\n{field}")

    def label_ids(self, label: str) -> list[int]:
        """Returns the ids of a label as it appears in an answer line."""
        return self.tokenizer.encode(f" {label}")

    def ending_ids(self, task: Task) -> list[int]:
        """Returns the id that ends a label where the tokens of one begin another's, else none.

        It must be scored with the labels: "fear" alone is never less likely than "fear of heights".
        """
        ids = sorted(self.label_ids(label) for label in task.labels)
        # Sorted lists that begin alike stand together.
        if all(long[: len(short)] != short for short, long in itertools.pairwise(ids)):
            return []
        space, after = self.label_space, self.label_space.names.index(task.name) + 1
        if after < len(space.tasks):
            return self.lead_ids(space.tasks[after].field, first=False)[:1]
        if space.reply and self.with_response:
            return self.lead_ids(RESPONSE_FIELD, first=False)[:1]
        return [self.tokenizer.end_id]

    def answer(self, sample: Sample) -> tuple[list[int], list[float]]:
        """Returns the ids of the target answer with its end token, and their loss weights.

        The answer has one line for every task with a gold label, then the response.
        """
        ids: list[int] = []
        weights: list[float] = []

        def add(piece: list[int], weight: float) -> None:
            ids.extend(piece)
            weights.extend([weight] * len(piece))

        for task in self.label_space.tasks:
            label = sample.target(task.name)
            if label:
                factor = self.balance.get(task.name, {}).get(label, 1.0)
                add(self.lead_ids(task.field, first=not ids), 1.0)
                add(self.label_ids(label), self.label_weight * factor)
        if self.label_space.reply and sample.response and self.with_response:
            add(self.lead_ids(RESPONSE_FIELD, first=not ids), 1.0)
            add(self.tokenizer.encode_data(f" {sample.response}"), 1.0)
        add([self.tokenizer.end_id], 1.0)
        return ids, weights

    def example(
        self,
        sample: Sample,
        modality: str,
        labels: Sequence[Shown],
        with_answer: bool = True,
    ) -> Example:
        """Returns tokens, targets and media of one sample. Raises PromptError if it does not fit.

        `labels`: the labels that the history shows for every utterance (see `history_labels`).
        """
        modality = self.modality(sample, modality)
        if "compressor" not in self.parts and self.history == "memory":
            sample, labels = dataclasses.replace(sample, history=()), []
        older, lines = self.split_history(sample, labels)
        prompt = self._prompt(sample, modality, labels, older, lines)
        ids, weights = self.answer(sample) if with_answer else ([], [])
        compressed = dataclasses.replace(sample, history=sample.history[:older])
        history, memory = encode_history(
            compressed, self.tokenizer, labels[:older], self.label_space, self.budget
        )
        self._check_length(sample.id, len(prompt) + len(ids))
        return Example(
            id=sample.id,
            tokens=np.array(prompt + ids, np.int32),
            loss_weights=np.array([0.0] * len(prompt) + weights, np.float32),
            history_tokens=np.array(history, np.int32),
            memory_index=np.array(memory[-self.most_vectors :], np.int32),
            settled=self.budget.settled(older, memory),
            frames=sample.frames if "v" in modality else sample.frames[:0],
            fbank=sample.fbank if modality in ("a", "av") else sample.fbank[:0],
        )

    def reconstruction(self, sample: Sample, labels: Sequence[Shown], first: int = 0) -> Example:
        """Builds an example of compressor pre-training: memory vectors in, the history's text out.

        (Spec stage 0.) The lines are numbered from `first` + 1 on, and the memory vectors by the
        first line that they hold, so that the model can find the right vector among many.
        """
        if not sample.history:
            raise PromptError("no history", sample.id)
        tok = self.tokenizer
        history, memory = encode_history(sample, tok, labels, self.label_space, self.budget)
        user: list[int] = []
        for i in range(0, len(sample.history), self.budget.utterances):
            user += tok.encode(f"{first + i + 1}:") + [tok.history_id] * self.budget.vectors
        prompt = tok.prompt(COMPRESSOR_SYSTEM[self.template], user)
        target: list[int] = []
        weights: list[float] = []
        for i, (utterance, shown) in enumerate(zip(sample.history, labels, strict=True)):
            caption, text = history_line(utterance, shown, self.label_space)
            number = f"{first + i + 1}:"
            for piece, weight in (
                (tok.encode(f"\n{number}" if i else number), 1.0),
                (tok.encode(f" {caption}"), self.label_weight),
                (tok.encode_data(text) if self.with_response else [], 1.0),
            ):
                target += piece
                weights += [weight] * len(piece)
        target.append(tok.end_id)
        weights.append(1.0)
        self._check_length(sample.id, len(prompt) + len(target))
        return Example(
            id=sample.id,
            tokens=np.array(prompt + target, np.int32),
            loss_weights=np.array([0.0] * len(prompt) + weights, np.float32),
            history_tokens=np.array(history, np.int32),
            memory_index=np.array(memory, np.int32),
            settled=0,
            frames=sample.frames[:0],
            fbank=sample.fbank[:0],
        )

    def _check_length(self, name: str, length: int) -> None:
        if self.max_length and length > self.max_length:
            raise PromptError(
                "too long", f"sample {name} has {length} tokens, max_length is {self.max_length}"
            )
