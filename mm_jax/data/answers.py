"""Writes and parses answers. Nothing is guessed: a line without a known label is unparseable."""

from __future__ import annotations

import dataclasses
import re

from mm_jax.data.records import (
    CLIENT_EMOTION,
    DFEW_EMOTIONS,
    LABEL_SPACES,
    MESC_EMOTIONS,
    MESC_STRATEGIES,
    STRATEGY,
    THERAPIST_EMOTION,
)

# The answer: one line per task, then the response (spec section 2).
ANSWER_FIELDS = {
    CLIENT_EMOTION: "Client's emotion:",
    THERAPIST_EMOTION: "Therapist's emotion:",
    STRATEGY: "Therapist's strategy:",
}

RESPONSE_FIELD = "Therapist's response:"


def answer_tasks(label_space: str) -> tuple[str, ...]:
    """Returns the classification tasks of a label space, in the order of the answer's lines."""
    return tuple(t for t in ANSWER_FIELDS if t in LABEL_SPACES[label_space])


def has_response(label_space: str) -> bool:
    """Tells whether answers of a label space end in a response."""
    return STRATEGY in LABEL_SPACES[label_space]


# Other spellings and word forms of the same label, nothing that needs interpretation.
ALIASES = {
    MESC_EMOTIONS: {
        "angry": "anger",
        "sad": "sadness",
        "disgusted": "disgust",
        "depressed": "depression",
        "joyful": "joy",
        "happy": "joy",
        "happiness": "joy",
        "fearful": "fear",
        "afraid": "fear",
    },
    DFEW_EMOTIONS: {
        "happiness": "happy",
        "sadness": "sad",
        "anger": "angry",
        "surprised": "surprise",
        "disgusted": "disgust",
        "fearful": "fear",
    },
    MESC_STRATEGIES: {
        "open questions": "open question",
        "open-ended question": "open question",
        "self disclosure": "self-disclosure",
        "communication skill": "communication skills",
        "structuring therapy": "structuring the therapy",
        "guiding the pace and depth": "guiding the pace and depth of the conversation",
        "other": "others",
    },
}


@dataclasses.dataclass(frozen=True)
class Parsed:
    """A parsed answer.

    labels: task -> label, "" if unparseable; response: "" if absent; status: "ok" or what is wrong.
    """

    labels: dict[str, str]
    response: str
    status: str


def _field_pattern(field: str) -> re.Pattern:
    who, what = field.rstrip(":").split("'s ")
    return re.compile(
        rf"^[ \t>*_#\-]*{who}(?:['’]?s)?[ \t]+{what}[ \t*_]*:[ \t*_]*", re.IGNORECASE | re.MULTILINE
    )


_PATTERNS = {task: _field_pattern(field) for task, field in ANSWER_FIELDS.items()}
_RESPONSE = _field_pattern(RESPONSE_FIELD)


def normalise_label(text: str, allowed: tuple[str, ...]) -> str:
    """Returns the allowed label that `text` spells, but for case and punctuation, or ""."""
    folded = " ".join(text.replace("’", "'").split()).casefold().strip(" \t.,;:!*_\"'`[]()")
    folded = ALIASES.get(allowed, {}).get(folded, folded)
    return folded if folded in allowed else ""


def parse_answer(text: str, label_space: str) -> Parsed:
    """Parses the answer lines. A field given twice with different labels is unparseable."""
    tasks = answer_tasks(label_space)
    with_response = has_response(label_space)
    head, response = text, ""
    if with_response and (match := _RESPONSE.search(text)):
        head, response = text[: match.start()], text[match.end() :].strip()
    labels, problems = {}, []
    for task in tasks:
        found = set()
        for match in _PATTERNS[task].finditer(head):
            line = head[match.end() :].split("\n", 1)[0]
            found.add(normalise_label(line, LABEL_SPACES[label_space][task]))
        labels[task] = found.pop() if len(found) == 1 else ""
        if not labels[task]:
            problems.append(task)
    if with_response and not response:
        problems.append("response")
    status = "ok" if not problems else "unparseable: " + ", ".join(problems)
    return Parsed(labels, response, status)


def cut_at_fields(response: str) -> str:
    """Cuts a reply off where the model went on with another line of the answer."""
    starts = [m.start() for p in (*_PATTERNS.values(), _RESPONSE) if (m := p.search(response))]
    return response[: min(starts, default=len(response))].strip()


def format_answer(labels: dict[str, str], response: str, label_space: str) -> str:
    """Writes an answer's text from its fields (the inverse of `parse_answer`)."""
    lines = [f"{ANSWER_FIELDS[t]} {labels[t]}" for t in answer_tasks(label_space)]
    if has_response(label_space):
        lines.append(f"{RESPONSE_FIELD} {response}")
    return "\n".join(lines)
