"""Holds a conversation: what was said, with the labels that the model gave it."""

from __future__ import annotations

import dataclasses

from mm_jax.data.labels import LabelSpace
from mm_jax.data.records import CLIENT, THERAPIST, Utterance
from mm_jax.generation.memory import ConversationMemory


@dataclasses.dataclass
class Conversation:
    """A conversation that grows by a turn of the client and the reply to it.

    problem, situation: of the client, in a few words; memories: what a compressor has read, so
    that it reads only what is new (`live.Turn`).
    """

    space: LabelSpace
    history: tuple[Utterance, ...] = ()
    problem: str = ""
    situation: str = ""
    memories: dict[str, ConversationMemory] = dataclasses.field(default_factory=dict)

    def keep(self, said: str, reply: str, labels: dict[str, str] | None = None) -> None:
        """Adds a turn and its reply, with what the model said of both."""
        turn = self.history[-1].turn + 1 if self.history else 0
        for i, (speaker, text) in enumerate(((CLIENT, said), (THERAPIST, reply))):
            tasks = self.space.by_speaker[speaker]
            own = {task.name: label for task in tasks if (label := (labels or {}).get(task.name))}
            self.history += (Utterance(speaker, text, own, turn=turn + i),)

    def undo(self) -> bool:
        """Takes the last turn and its reply back; says whether there was one."""
        last = max((i for i, u in enumerate(self.history) if u.speaker == CLIENT), default=None)
        if last is None:
            return False
        self.history = self.history[:last]
        return True

    def entries(self) -> list[dict[str, str]]:
        """Writes the history as `data.conversation.history_of` reads it."""
        rows = []
        for utterance in self.history:
            keys = {task.name: task.key for task in self.space.by_speaker[utterance.speaker]}
            own = {keys[name]: label for name, label in utterance.labels.items()}
            rows.append({"speaker": utterance.speaker, "text": utterance.text, **own})
        return rows
