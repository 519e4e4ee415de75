"""predictions.jsonl: one JSON object per prediction, with one reader and one writer."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable

from mm_jax.config.files import write_whole
from mm_jax.data.prompts import MODALITIES
from mm_jax.data.records import LABEL_SPACES


def write_predictions(path: pathlib.Path, rows: Iterable[dict]) -> None:
    """Writes predictions.jsonl, whole or not at all."""
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def text_or_nothing(value) -> str:
    """A predicted field: text without lone surrogates, which no file can hold."""
    if not isinstance(value, str):
        return ""
    return value.encode("utf-8", "replace").decode("utf-8")


REQUIRED_FIELDS = (
    "id",
    "gold",
    "predicted",
    "label_space",
    "status",
    "modality",
    "modality_asked",
    "history_labels",
)


def read_predictions(path: pathlib.Path) -> list[dict]:
    """Reads predictions.jsonl; a predicted field that is no text becomes "" (unparseable).

    Raises ValueError naming the line and what is wrong with it.
    """
    rows = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path} line {number}: not JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path} line {number}: expected an object, got {line[:60]!r}")
            missing = [name for name in REQUIRED_FIELDS if name not in row]
            if missing:
                raise ValueError(f"{path} line {number}: missing fields {missing}")
            for name, allowed in (("label_space", LABEL_SPACES), ("modality_asked", MODALITIES)):
                if row[name] not in allowed:
                    raise ValueError(
                        f"{path} line {number}: {name}: expected one of {sorted(allowed)}, got "
                        f"{row[name]!r}"
                    )
            for name, kind in (("id", str), ("history_labels", str), ("status", str),
                               ("modality", str), ("gold", dict)):  # fmt: skip
                if not isinstance(row[name], kind):
                    raise ValueError(
                        f"{path} line {number}: {name}: expected {kind.__name__}, got {row[name]!r}"
                    )
            given = row["predicted"] if isinstance(row["predicted"], dict) else {}
            row["predicted"] = {k: text_or_nothing(v) for k, v in given.items()}
            if not isinstance(row.get("probabilities", {}), dict):
                del row["probabilities"]
            rows.append(row)
    if not rows:
        raise ValueError(f"{path}: no predictions")
    return rows
