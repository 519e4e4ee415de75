"""Defines a page's tables, and writes their numbers."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Sequence

from mm_jax.evaluation.scores import Interval

Rows = list[Sequence[str] | str]


@dataclasses.dataclass(frozen=True)
class Table:
    """Holds a header and rows of cells; a row that is one string is a group heading. `best`: the
    indices of the rows to mark."""

    header: Sequence[str]
    rows: Rows
    best: Collection[int] = ()

    @property
    def kinds(self) -> list[str]:
        """Chooses each column's CSS class: words align left, numbers right, long texts wrap."""
        kinds = []
        for i in range(len(self.header)):
            texts = [row[i] for row in self.rows if not isinstance(row, str)]
            if i and any(re.match(r"[+\-]?\d", text) for text in texts):
                kinds.append("number")
            else:
                kinds.append("long" if max(map(len, texts), default=0) > 60 else "words")
        return kinds

    @property
    def widths(self) -> list[int]:
        """Computes each column's width in characters in Markdown, where the best rows are bold."""
        widths = [max(3, len(text)) for text in self.header]
        for place, row in enumerate(self.rows):
            if not isinstance(row, str):
                bold = 4 if place in self.best else 0
                widths = [max(w, len(text) + bold) for w, text in zip(widths, row, strict=True)]
        return widths


def best_row(rows: Rows, column: int) -> list[int]:
    """Finds the row whose cell in a column begins with the largest number."""
    values = [
        -1.0 if isinstance(r, str) or r[column] == "–" else float(r[column].split()[0])
        for r in rows
    ]
    return [values.index(max(values))]


def number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def spread(interval: Interval, digits: int = 1) -> str:
    return f"{interval[0]:.{digits}f} to {interval[1]:.{digits}f}"


def with_interval(mean: float | None, interval: Interval | None) -> str:
    if mean is None or interval is None:
        return "–"
    return f"{mean:.1f} ({spread(interval)})"


def share(found: dict) -> str:
    """Writes a {"mean", "interval"} as a cell."""
    return with_interval(found["mean"], found["interval"])


def difference(found: dict | None) -> str:
    """Writes a `paired_difference` as a cell."""
    if found is None:
        return "–"
    p = "p < 0.001" if found["p"] < 0.001 else f"p {found['p']:.3f}"
    return f"{found['difference']:+.1f} ({spread(found['interval'])}), {p}"


def counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {n}" for name, n in counts.items()) or "none"
