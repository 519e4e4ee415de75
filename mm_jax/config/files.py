"""Reads small files with clear errors, and writes them whole or not at all."""

from __future__ import annotations

import json
import pathlib

from mm_jax.config.errors import ConfigError


def write_whole(path: pathlib.Path, text: str) -> None:
    """Writes a file whole or not at all, even if the process dies."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def read_json(path: pathlib.Path):
    """Reads a JSON file. Raises ConfigError naming the file if it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON: {error}") from error
