"""Tests what is kept between turns, and how a model thread and a reply end."""

import asyncio
import itertools
import sqlite3
import time

import numpy as np
import pytest

from mm_jax.config.errors import ConfigError
from mm_jax.data.labels import built_in
from mm_jax.data.records import CLIENT, THERAPIST
from mm_jax.evaluation.care import Release, Texts
from mm_jax.generation.live import Draft, Piece, Turn
from mm_jax.generation.predictor import Prediction
from mm_jax.generation.talk import Conversation
from mm_jax.serve import conversations
from mm_jax.serve.conversations import Conversations
from mm_jax.serve.counters import Counters
from mm_jax.serve.errors import ApiError
from mm_jax.serve.model import ModelError, ModelThread
from mm_jax.serve.replies import Choice, of_shown

SPACE = built_in("mesc")


def talk(words="My unmistakable words."):
    made = Conversation(SPACE, problem="work")
    made.keep(words, "I see.", {"client_emotion": "sadness", "strategy": "others"})
    return made


def test_a_store_survives_restarts_and_forgets(tmp_path):
    path = tmp_path / "store.sqlite"
    path.touch(0o644)
    first = Conversations(SPACE, 60, path)
    kept, other = first.create(talk()), first.create(talk("Others."))
    assert oct(path.stat().st_mode)[-3:] == "600"
    first.close()
    again = Conversations(SPACE, 60, path)
    found = again.get(kept.id).conversation
    assert found.entries() == talk().entries()
    assert found.problem == "work"
    assert [u.speaker for u in found.history] == [CLIENT, THERAPIST]
    assert b"unmistakable" in path.read_bytes()
    again.delete(kept.id)
    assert b"unmistakable" not in path.read_bytes()
    with pytest.raises(ApiError, match="no such conversation"):
        again.get(kept.id)
    again.close()
    time.sleep(0.02)
    expired = Conversations(SPACE, 0.01, path)
    assert len(expired) == 0
    assert other.id not in path.read_text("latin-1")
    expired.close()
    path.write_bytes(b"no database" * 50)
    with pytest.raises(ConfigError, match="--store"):
        Conversations(SPACE, 60, path)


def test_a_store_that_fails_changes_nothing(tmp_path):
    kept_all = Conversations(SPACE, 60, tmp_path / "store.sqlite")
    kept = kept_all.create(talk())
    before = kept.conversation.entries()

    class Full:
        """A database on a full disk: what is written cannot be committed."""

        def __init__(self, db):
            self.execute, self.rollback = db.execute, db.rollback

        def commit(self):
            raise sqlite3.OperationalError("disk is full")

    whole, kept_all._db = kept_all._db, Full(kept_all._db)
    longer = talk()
    longer.keep("More.", "Yes.")
    with pytest.raises(ApiError, match="disk is full"):
        kept_all.save(kept, longer)
    with pytest.raises(sqlite3.OperationalError):
        kept_all.delete(kept.id)
    assert kept_all.get(kept.id).conversation.entries() == before
    whole.commit()
    again = Conversations(SPACE, 60, tmp_path / "store.sqlite")
    assert again.get(kept.id).conversation.entries() == before


def test_limits_of_what_is_kept(monkeypatch):
    monkeypatch.setattr(conversations, "MOST_CONVERSATIONS", 3)
    monkeypatch.setattr(conversations, "MOST_MEMORIES", 2)
    monkeypatch.setattr(conversations, "MOST_CHARACTERS", 100)
    kept_all = Conversations(SPACE, 60)
    made = []
    for _ in range(3):
        own = talk()
        own.memories["x"] = "memory"
        made.append(kept_all.create(own))
    assert [len(kept.conversation.memories) for kept in made] == [0, 1, 1]
    made[0].busy = True
    kept_all.create(talk())  # the least used that is not at work goes
    assert kept_all.get(made[0].id) is made[0]
    with pytest.raises(ApiError):
        kept_all.get(made[1].id)
    with pytest.raises(ApiError, match="being answered"):
        kept_all.take(made[0].id)
    with pytest.raises(ApiError, match="too long"):
        kept_all.save(made[2], talk("x" * 200))
    kept_all.idle = -1  # all but the one at work expire
    kept_all.expire()
    assert len(kept_all) == 1


class FakeLive:
    """Fails at the second step, after it has said something final of one turn."""

    def __init__(self):
        self.turns, self.steps, self.fill, self.waiting = [], 0, 0, ()

    def submit(self, turn):
        self.turns.append(turn)

    def cancel(self, name):
        self.turns = [turn for turn in self.turns if turn.name != name]

    def clear(self):
        self.turns = []

    @property
    def is_idle(self):
        return len(self.turns) < (2 if self.steps < 2 else 1)

    def step(self):
        self.steps += 1
        if self.steps == 1:
            return [Draft(turn.name, Prediction({}, "text", ""), 1) for turn in self.turns]
        if self.steps == 2:
            self.turns.pop()  # told what is lost with the error
            raise RuntimeError("out of memory")
        none = np.zeros(0, np.int32), np.zeros(0, np.float32)
        told = [Piece(t.name, 0, "Hi.", *none, "ended", None) for t in self.turns]
        self.turns = []
        return told


def test_a_step_that_fails_fails_its_turns_alone():
    thread = ModelThread(FakeLive(), Counters())

    async def ask(name):
        return [event async for event in thread.answer(Turn(name, None))]

    async def run():
        failed = await asyncio.gather(ask(1), ask(2), return_exceptions=True)
        assert all(isinstance(error, ModelError) for error in failed)
        (piece,) = await asyncio.wait_for(ask(3), 5)
        assert piece.text == "Hi."

    asyncio.run(asyncio.wait_for(run(), 20))
    assert thread.is_alive
    thread.stop()
    assert not thread.is_alive


def test_tokens_beyond_what_is_shown_are_not_told():
    def cut(text):
        return text.split("\nTherapist")[0].strip()

    release = Release(Texts.load(), cut)
    tokens = [
        " I",
        " hear",
        " you.",
        "\nTherapist",
        "'s",
        " strategy:",
        " You",
        " have depression.",
    ]
    for token in tokens:
        release.add(token)
    release.add("", last=True)
    ends = list(itertools.accumulate(map(len, tokens)))
    choice = Choice(release, "stop", [{"token": token} for token in tokens], ends=ends)
    assert release.shown == "I hear you."
    assert "".join(row["token"] for row in of_shown(choice)) == " I hear you."
