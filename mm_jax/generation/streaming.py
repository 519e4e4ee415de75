"""Turns tokens that come a few at a time into text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

INCOMPLETE = "\ufffd"  # stands for bytes that are no character yet


class TextStream:
    """Gives the text of a growing answer piece by piece, never a part of a character.

    decode(ids) -> text, such as `Tokenizer.decode`.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]):
        self.decode, self.ids, self.told = decode, [], ""

    def add(self, ids: Sequence[int], last: bool = False) -> str:
        """Returns the text that further tokens complete; with `last` also what stays incomplete."""
        self.ids += [int(i) for i in ids]
        text = self.decode(self.ids)
        if not last:
            text = text.rstrip(INCOMPLETE)
        new, self.told = text[len(self.told) :], max(text, self.told, key=len)
        return new
