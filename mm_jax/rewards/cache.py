"""A cache of answers on disk (sqlite), so that no response is paid for twice."""

from __future__ import annotations

import hashlib
import json
import pathlib
import sqlite3
import threading

from mm_jax.config.errors import ConfigError


def cache_key(**fields) -> str:
    """SHA-256 of everything an answer depends on."""
    text = json.dumps(fields, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


class Cache:
    """key -> JSON value. Failures are never put in. Several processes may share the file."""

    def __init__(self, path: pathlib.Path | None):
        path and path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        try:
            self._db = sqlite3.connect(
                ":memory:" if path is None else str(path), timeout=30, check_same_thread=False
            )
            self._db.execute("pragma journal_mode=wal")
            self._db.execute(
                "create table if not exists answers (key text primary key, value text)"
            )
            self._db.commit()
        except sqlite3.OperationalError as error:  # locked, or nowhere to write
            raise ConfigError(f"{path}: {error}") from error
        except sqlite3.DatabaseError as error:
            raise ConfigError(
                f"{path}: {error}; remove it: answers are then paid for again, and what was spent "
                "is forgotten"
            ) from error

    def get(self, key: str):
        """The value, or None."""
        with self._lock:
            found = self._db.execute("select value from answers where key = ?", (key,)).fetchone()
        return None if found is None else json.loads(found[0])

    def put(self, key: str, value) -> None:
        with self._lock:
            self._db.execute(
                "insert or replace into answers values (?, ?)", (key, json.dumps(value))
            )
            self._db.commit()

    def add(self, key: str, amount: float) -> float:
        """Adds to the number at a key (0 at first), and what it is then."""
        with self._lock:
            (total,) = self._db.execute(
                "insert into answers values (?, ?) on conflict (key) do update set "
                "value = value + excluded.value returning value",
                (key, amount),
            ).fetchone()
            self._db.commit()
        return float(total)

    def close(self) -> None:
        with self._lock:
            self._db.close()
