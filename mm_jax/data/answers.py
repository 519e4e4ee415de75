"""Writes and parses answers. Nothing is guessed: a line without a known label is unparseable."""

from __future__ import annotations

import dataclasses

from mm_jax.data.labels import RESPONSE_FIELD, LabelSpace, field_pattern


@dataclasses.dataclass(frozen=True)
class Parsed:
    """A parsed answer.

    labels: task -> label, "" if unparseable; response: "" if absent; status: "ok" or what is wrong.
    """

    labels: dict[str, str]
    response: str
    status: str


_RESPONSE = field_pattern(RESPONSE_FIELD)


def parse_answer(text: str, space: LabelSpace) -> Parsed:
    """Parses the answer lines. A field given twice with different labels is unparseable."""
    head, response = text, ""
    if space.reply and (match := _RESPONSE.search(text)):
        head, response = text[: match.start()], text[match.end() :].strip()
    labels, problems = {}, []
    for task in space.tasks:
        found = set()
        for match in field_pattern(task.field).finditer(head):
            line = head[match.end() :].split("\n", 1)[0]
            found.add(task.normalise(line))
        labels[task.name] = found.pop() if len(found) == 1 else ""
        if not labels[task.name]:
            problems.append(task.name)
    if space.reply and not response:
        problems.append("response")
    status = "ok" if not problems else "unparseable: " + ", ".join(problems)
    return Parsed(labels, response, status)


def cut_at_fields(response: str, space: LabelSpace) -> str:
    """Cuts a reply off where the model went on with another line of the answer."""
    patterns = (*(field_pattern(task.field) for task in space.tasks), _RESPONSE)
    starts = [m.start() for p in patterns if (m := p.search(response))]
    return response[: min(starts, default=len(response))].strip()


def format_answer(labels: dict[str, str], response: str, space: LabelSpace) -> str:
    """Writes an answer's text from its fields (the inverse of `parse_answer`)."""
    lines = [f"{task.field} {labels[task.name]}" for task in space.tasks]
    if space.reply:
        lines.append(f"{RESPONSE_FIELD} {response}")
    return "\n".join(lines)
