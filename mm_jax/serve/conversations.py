"""Keeps conversations between turns: in memory, and where it is asked for in an SQLite file."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import os
import pathlib
import secrets
import sqlite3
import time

from mm_jax.config.errors import ConfigError
from mm_jax.data.conversation import history_of
from mm_jax.data.history import known_line_ids
from mm_jax.data.labels import LabelSpace
from mm_jax.generation.talk import Conversation
from mm_jax.serve.errors import ApiError

MOST_CONVERSATIONS = 10_000
MOST_CHARACTERS = 1_000_000  # of a conversation
MOST_MEMORIES = 256  # conversations whose compressor's state is held; others are read anew


@dataclasses.dataclass
class Kept:
    """A conversation; busy: a turn of it is being answered; used: when it was last, by the
    clock."""

    id: str
    conversation: Conversation
    created: float
    used: float
    busy: bool = False


class Conversations:
    """Holds conversations by ids that cannot be guessed; those idle for `idle` seconds expire.

    store: an SQLite file that keeps them over restarts, readable by its owner alone. What is
    deleted or expires is overwritten there. Raises ConfigError for a file that cannot be used.
    """

    def __init__(self, space: LabelSpace, idle: float, store: pathlib.Path | None = None):
        self.space, self.idle = space, idle
        self._kept: collections.OrderedDict[str, Kept] = collections.OrderedDict()
        self._db = None
        if store is None:
            return
        try:
            file = os.open(store, os.O_CREAT | os.O_RDWR, 0o600)
            os.fchmod(file, 0o600)
            os.close(file)
            self._db = sqlite3.connect(store, timeout=5)
            self._db.execute("pragma secure_delete=on")
            self._db.execute(
                "create table if not exists conversations "
                "(id text primary key, created real, used real, body text)"
            )
            self._db.commit()
            rows = self._db.execute("select id, created, used, body from conversations").fetchall()
            for name, created, used, body in sorted(rows, key=lambda row: row[2]):
                self._kept[name] = Kept(name, self._read(json.loads(body)), created, used)
            self.expire()
        except (OSError, sqlite3.Error, ValueError, KeyError, ConfigError) as error:
            raise ConfigError(f"--store: {store}: {error}") from error

    def __len__(self) -> int:
        return len(self._kept)

    def create(self, conversation: Conversation) -> Kept:
        """Keeps a conversation; where there are too many, the one that was used least lately
        goes."""
        if len(self._kept) >= MOST_CONVERSATIONS:
            self.delete(next(name for name, kept in self._kept.items() if not kept.busy))
        now = time.time()
        kept = Kept(secrets.token_urlsafe(18), conversation, now, now)
        self.save(kept, conversation)
        return kept

    def get(self, name: str) -> Kept:
        """Returns a conversation. Raises ApiError if there is none, or no more."""
        kept = self._kept.get(name)
        if kept is None or (kept.used <= time.time() - self.idle and not kept.busy):
            raise ApiError(404, "there is no such conversation; it may have expired", "id")
        return kept

    def take(self, name: str) -> Kept:
        """Returns a conversation that is to change. Raises ApiError while a turn is answered."""
        kept = self.get(name)
        if kept.busy:
            raise ApiError(409, "a turn of this conversation is being answered", "id")
        kept.used = time.time()
        self._newest(name)
        return kept

    def _newest(self, name: str) -> None:
        """Puts a conversation in the last place; those beyond the limit lose their memories."""
        self._kept.move_to_end(name)
        for old in itertools.islice(reversed(self._kept.values()), MOST_MEMORIES, None):
            old.conversation.memories.clear()

    def save(self, kept: Kept, talk: Conversation) -> None:
        """Keeps what became of a conversation. Raises ApiError, and then nothing has changed."""
        if sum(len(u.text) for u in talk.history) > MOST_CHARACTERS:
            raise ApiError(413, "the conversation is too long; begin another", "id")
        now = time.time()
        if self._db is not None:
            body = {
                "problem": talk.problem,
                "situation": talk.situation,
                "history": talk.entries(),
            }
            try:
                self._db.execute(
                    "insert or replace into conversations values (?, ?, ?, ?)",
                    (kept.id, kept.created, now, json.dumps(body)),
                )
                self._db.commit()
            except sqlite3.Error as error:
                self._db.rollback()
                raise ApiError(500, f"the conversation cannot be stored: {error}") from error
        kept.conversation, kept.used = talk, now
        self._kept[kept.id] = kept
        self._newest(kept.id)

    def delete(self, name: str) -> None:
        """Forgets a conversation. Raises sqlite3.Error, and then it is kept."""
        if self._db is not None:
            try:
                self._db.execute("delete from conversations where id = ?", (name,))
                self._db.commit()
            except sqlite3.Error:
                self._db.rollback()
                raise
        self._kept.pop(name, None)
        known_line_ids.cache_clear()  # its words are there too

    def expire(self) -> None:
        """Deletes what nobody has used for long."""
        limit = time.time() - self.idle
        # The least recently used come first.
        while self._kept:
            kept = next(iter(self._kept.values()))
            if kept.used > limit:
                return
            if kept.busy:
                self._kept.move_to_end(kept.id)
                kept.used = time.time()
                continue
            self.delete(kept.id)

    def close(self) -> None:
        if self._db is not None:
            self._db.close()

    def _read(self, body: dict) -> Conversation:
        history = history_of(body["history"], self.space)
        return Conversation(self.space, history, body["problem"], body["situation"])
