"""Reads small files with clear errors, and writes them whole or not at all."""

from __future__ import annotations

import codecs
import json
import pathlib
import re

from mm_jax.config.errors import ConfigError


def write_whole(path: pathlib.Path, text: str) -> None:
    """Writes a file whole or not at all, even if the process dies."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


MULTI_BYTE = re.compile(  # characters of UTF-8
    rb"[\xc3-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}"
)
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark begins it
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_text(path: pathlib.Path) -> str:
    """Reads a text file as people save them: UTF-8, UTF-16 or UTF-32 with a mark, or cp1252.

    Line ends become "\\n". Raises ConfigError if it is none of these, or damaged UTF-8.
    """
    data = path.read_bytes()
    marked = [name for mark, name in BYTE_ORDER_MARKS if data.startswith(mark)]
    for encoding in marked[:1] or ("utf-8", "cp1252"):
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError as error:
            # Bytes that make up characters of UTF-8 are seldom anything else.
            broken = data.decode("utf-8", "replace").count("\ufffd")
            if encoding == "utf-8" and len(MULTI_BYTE.findall(data)) > broken:
                raise ConfigError(
                    f"{path}: damaged UTF-8: byte {data[error.start]:#04x} at {error.start} of "
                    f"{len(data)}"
                ) from error
            continue
        if "\0" not in text:
            return text.replace("\r\n", "\n").replace("\r", "\n")
    raise ConfigError(
        f"{path}: not a text file; expected UTF-8 (or UTF-16 with a byte order mark, or Windows' "
        f"cp1252), got bytes {data[:12]!r}"
    )


def parse_json(text: str):
    """Parses JSON. Raises ValueError, also where it is nested too deep to be parsed."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def read_json(path: pathlib.Path):
    """Reads a JSON file. Raises ConfigError naming the file if it is not JSON."""
    try:
        return parse_json(read_text(path))
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON: {error}") from error


def well_formed(text: str) -> str:
    """Replaces lone surrogates, which no file, tokenizer or terminal can take."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
