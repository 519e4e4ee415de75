"""Small files, read with a clear error and written whole or not at all."""

from __future__ import annotations

import json
import pathlib

from mm_jax.config.errors import ConfigError


def write_whole(path: pathlib.Path, text: str) -> None:
    """Writes a file, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def read_json(path: pathlib.Path):
    """A file's JSON. Raises ConfigError naming the file where it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON: {error}") from error
