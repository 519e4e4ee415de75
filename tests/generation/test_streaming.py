"""Tests that streamed text is whole characters and adds up to the text."""

import numpy as np
import pytest

from mm_jax.data import tokenizer
from mm_jax.generation.streaming import INCOMPLETE, TextStream

TEXT = "Zoé said: “ja” 🙂🙂 … 你好, that is 5 €."


@pytest.fixture(scope="module")
def tok():
    return tokenizer.train(["so it is and so it goes"] * 3, 300)  # most characters are bytes


@pytest.mark.parametrize("seed", range(5))
def test_pieces_are_whole_characters(tok, seed):
    rng, ids = np.random.default_rng(seed), tok.encode_data(TEXT)
    assert len(ids) > len(TEXT)
    stream, pieces = TextStream(tok.decode), []
    while ids:
        count = int(rng.integers(1, 4))
        part, ids = ids[:count], ids[count:]
        pieces.append(stream.add(part, last=not ids))
    assert "".join(pieces) == TEXT
    assert not any(INCOMPLETE in piece for piece in pieces)


def test_what_stays_incomplete_comes_last(tok):
    ids = tok.encode_data("a🙂")[:-1]
    stream = TextStream(tok.decode)
    assert stream.add(ids) == "a"
    assert set(stream.add([], last=True)) == {INCOMPLETE}
