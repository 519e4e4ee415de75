"""Reads the project's own prompts back, as evaluation scripts send them (`chat_messages`).

A prompt that is told apart is answered as a sample of a data set is: the same tokens are shown to
the model, and its answer has the labels' lines, as the prompt asks.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from mm_jax.config.files import well_formed
from mm_jax.data.history import history_line
from mm_jax.data.labels import LabelSpace
from mm_jax.data.prompts import SYSTEM, chat_messages, user_segments
from mm_jax.data.records import SPEAKERS, Sample, Utterance
from mm_jax.data.tokenizer import AUDIO, HISTORY, VIDEO
from mm_jax.serve.requests import AudioPart, Message, TextPart

_ROLE = re.compile(rf"({'|'.join(SPEAKERS.values())})((?: ?\([^()\n]{{1,80}}\))*) ")
# Stand for clips between the texts; no text holds them.
_MARKS = {VIDEO: "\x00v", AUDIO: "\x00a"}


def read_prompt(messages: Sequence[Message], space: LabelSpace) -> Sample | None:
    """Returns the sample that a prompt was made from, without clips; None for other messages."""
    if [m.role for m in messages] != ["system", "user"]:
        return None
    template = next((t for t, text in SYSTEM.items() if text == messages[0].content), None)
    text = _marked(messages[1].content)
    if template is None or text is None:
        return None
    sample = _sample_of(text, template, space)
    # What was read must give the very same prompt.
    marks = {place: [{"type": "mark", "text": mark}] for place, mark in _MARKS.items()}
    media = {place: parts for place, parts in marks.items() if _MARKS[place] in text}
    shown = [u.labels for u in sample.history]
    content = chat_messages(sample, template, space, shown, media)[1]["content"]
    again = content if isinstance(content, str) else "".join(part["text"] for part in content)
    return sample if again == text else None


def _marked(content) -> str | None:
    """Returns a message's text with marks in place of its clips."""
    if isinstance(content, str):
        return well_formed(content) if "\x00" not in content else None
    text = ""
    for part in content or ():
        if isinstance(part, TextPart):
            if "\x00" in part.text:
                return None
            text += well_formed(part.text)
        else:
            mark = _MARKS[AUDIO if isinstance(part, AudioPart) else VIDEO]
            text += "" if text.endswith(mark) else mark
    return text


def _sample_of(text: str, template: str, space: LabelSpace) -> Sample:
    """Reads the parts of a prompt, each from its caption to that of the next."""
    blank = Sample(id="prompt", dialogue_id="prompt", client_text="")
    (tail,) = user_segments(blank, template, space, "")

    def caption(**part) -> str:
        return user_segments(dataclasses.replace(blank, **part), template, space, "")[0]

    def of_media(modality: str, place: str) -> str:
        own = user_segments(blank, template, space, modality)[0].removesuffix(tail)
        return own.replace(place, _MARKS[place])

    anyone = (Utterance(next(iter(SPEAKERS)), ""),)
    parts = [
        ("problem_type", caption(problem_type="x") + " "),
        ("situation", caption(situation="x") + " "),
        ("", of_media("v", VIDEO)),
        ("", of_media("a", AUDIO)),
        ("history", caption(history=anyone).removesuffix(tail).removesuffix(f"{HISTORY}\n") + "\n"),
        ("client_text", caption(client_text="x") + " "),
        ("client_clue", caption(client_clue="x") + " "),
    ]
    body, found = text.removesuffix(tail), {}
    for i, (name, lead) in enumerate(parts):
        if not body.startswith(lead):
            continue
        body = body[len(lead) :]
        if not name:
            continue
        ends = [at for _, later in parts[i + 1 :] if (at := body.find("\n" + later)) >= 0]
        end = min(ends, default=len(body) - 1)
        found[name], body = body[: max(0, end)], body[end + 1 :]
    if "history" in found:
        found["history"] = _utterances(found["history"], space)
    return dataclasses.replace(blank, **found)


def _utterances(text: str, space: LabelSpace) -> tuple[Utterance, ...]:
    """Reads the lines of a history; a line without a speaker goes on with the one before."""
    speakers = {role: speaker for speaker, role in SPEAKERS.items()}
    utterances: list[Utterance] = []
    for line in text.split("\n"):
        match = _ROLE.match(line)
        if match is None:
            if utterances:
                last = utterances[-1]
                utterances[-1] = dataclasses.replace(last, text=f"{last.text}\n{line}")
            continue
        speaker, labels = speakers[match[1]], {}
        for label in re.findall(r"\(([^()]*)\)", match[2]):
            for task in space.by_speaker[speaker]:
                if label in task.labels and task.name not in labels:
                    labels[task.name] = label
                    break
        found = Utterance(speaker, line[match.end() :], labels)
        if "".join(history_line(found, labels, space)) != line:  # these brackets are words
            found = Utterance(speaker, line[len(match[1]) + 1 :])
        before = utterances[-1] if utterances else None
        turn = before.turn + (before.speaker != speaker) if before else 0
        utterances.append(dataclasses.replace(found, turn=turn))
    return tuple(utterances)
