"""The base class of all config sections: frozen, typed, with one-line errors."""

from __future__ import annotations

import difflib
import typing
from typing import Any

import pydantic

from mm_jax.config.errors import ConfigError


def field(default: Any, meaning: str, **bounds: Any) -> Any:
    """Declares a field: its default, one line of meaning, and its bounds (ge, gt, le, lt)."""
    return pydantic.Field(default, description=meaning, **bounds)


class Section(pydantic.BaseModel):
    """Part of a config: frozen, strictly typed, without unknown fields or infinite numbers.

    Raises ConfigError with one line per problem: "field: expected ..., got ...".
    """

    model_config = pydantic.ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False
    )

    def __init__(self, **values: Any):
        try:
            super().__init__(**values)
        except pydantic.ValidationError as error:
            problems = error.errors()
            wrong = {one["loc"][0] for one in problems if one["type"] == "literal_error"}
            # What is left of a tuple without its wrong values may be too short, which says nothing.
            lines = [
                line
                for one in problems
                if one["type"] != "too_short" or one["loc"][0] not in wrong
                for line in self._problems(one)
            ]
            raise ConfigError("\n".join(lines)) from None

    @classmethod
    def _problems(cls, error: dict) -> list[str]:
        key = ".".join(part for part in error["loc"] if isinstance(part, str))
        kind, got = error["type"], error["input"]
        if kind == "value_error":  # of a validator, or of a section inside
            lines = str(error["ctx"]["error"]).splitlines()
            return [f"{key}.{line}" if key else line for line in lines]
        if kind == "extra_forbidden":
            return [f"{key}: no such field{nearest(key, cls.model_fields)}"]
        declared = cls.model_fields[error["loc"][0]]
        if kind in ("missing", "too_short", "too_long"):  # a tuple's number of values
            inner = [a for a in typing.get_args(declared.annotation) if a is not ...]
            expected = f"{len(inner)} values" if len(inner) > 1 else "at least one value"
            return [f"{key}: expected {expected}, got {got!r}"]
        expected = {
            "literal_error": f"one of {error.get('ctx', {}).get('expected')}",
            "finite_number": "finite numbers",
        }.get(kind, described_range(declared) if kind.endswith(("_equal", "_than")) else "")
        expected = expected or error["msg"].removeprefix("Input should be ")
        return [f"{key}: expected {expected}, got {got!r}"]


def nearest(key: str, known: Any) -> str:
    """Returns "; did you mean ...?" if a known key is close, else ""."""
    close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.4)
    return f"; did you mean {close[0]}?" if close else ""


def described_range(field: pydantic.fields.FieldInfo) -> str:
    """Returns a field's bounds in words, or "" if it has none."""
    bounds = {k: getattr(m, k) for m in field.metadata for k in ("ge", "gt", "le", "lt")
              if hasattr(m, k)}  # fmt: skip
    low, high = bounds.get("ge", bounds.get("gt")), bounds.get("le", bounds.get("lt"))
    if high is None:
        return "" if low is None else f"at least {low:g}" if "ge" in bounds else f"above {low:g}"
    if "ge" in bounds and "le" in bounds:
        return f"{low:g} to {high:g}"
    below, above = ("<=" if kind in bounds else "<" for kind in ("ge", "le"))
    return f"{low:g} {below} value {above} {high:g}"
