"""A report's parts, written once, rendered as HTML and as Markdown, and the page they stand on."""

from __future__ import annotations

import dataclasses
import html
import pathlib
import re
from collections.abc import Sequence

from mm_jax.config.files import write_whole

STYLE = """
:root { color-scheme: light dark; --ink: #1c2733; --soft: #58687a; --page: #ffffff; --line: #8496a8;
  --band: #f4f7fa; --group: #e6edf4; --edge: #d6dde4; --right: #17743b; --wrong: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #dfe6ee; --soft: #9fb0c1; --page: #12181f;
  --line: #5d6f82; --band: #1a222b; --group: #24303c; --edge: #33414f; --right: #6fce95;
  --wrong: #ff8f86; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 1250px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.7em; margin-bottom: 0; overflow-wrap: anywhere; }
h2 { margin-top: 2em; border-bottom: 1px solid var(--edge); }
table { border-collapse: collapse; margin: .6em 0; font-size: 13.5px; display: block;
  overflow-x: auto; }
th, td { padding: .28em .7em; text-align: right; white-space: nowrap; }
th:first-child, td:first-child, .words, .long { text-align: left; }
td.long { white-space: normal; min-width: 22em; overflow-wrap: anywhere; }
thead th { border-bottom: 2px solid var(--line); }
tbody tr:nth-child(even) { background: var(--band); }
tr.group td { background: var(--group); font-weight: 600; text-align: left; }
.note { color: var(--soft); font-size: 13.5px; overflow-wrap: anywhere; }
.warning { border-left: 4px solid var(--wrong); padding-left: .8em; }
img { max-width: 100%; background: #fff; border-radius: 6px; }
.frames img { width: 96px; margin-right: 4px; }
.talk { border-left: 3px solid var(--line); padding: .2em 1em; margin: 1em 0; }
.talk p { margin: .15em 0; overflow-wrap: anywhere; } .who { font-weight: 600; }
.right { color: var(--right); } .wrong { color: var(--wrong); }
@media (max-width: 600px) { body { font-size: 14px; margin: 1em auto; }
  table { font-size: 12.5px; } th, td { padding: .25em .45em; }
  td:first-child { white-space: normal; min-width: 9em; } }
@page { margin: 1cm; }
@media print { body { max-width: none; font-size: 10pt; margin: 0; }
  h2, h3 { break-after: avoid; }
  table { display: table; font-size: 7pt; }
  th, td { padding: .15em .3em; white-space: normal; } img, .talk, tr { break-inside: avoid; } }
"""


@dataclasses.dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclasses.dataclass(frozen=True)
class Note:
    text: str
    kind: str = "note"  # or "warning"


@dataclasses.dataclass(frozen=True)
class Table:
    """A row that is one string is a group heading."""

    header: Sequence[str]
    rows: Sequence[Sequence[str] | str]


@dataclasses.dataclass(frozen=True)
class Raw:
    """HTML alone (plots, conversations); report.md has not got it."""

    html: str


Block = Heading | Note | Table | Raw


def render_html(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{html.escape(text)}</h{level}>"
        case Note(text, kind):
            return f'<p class="{kind}">{html.escape(text)}</p>'
        case Table(header, rows):
            whole = [row for row in rows if not isinstance(row, str)]
            kinds = [_column_class([row[i] for row in whole]) for i in range(len(header))]

            def cells(tag: str, texts: Sequence[str]) -> str:
                return "".join(
                    f"<{tag}{kind}>{html.escape(text)}</{tag}>"
                    for text, kind in zip(texts, kinds, strict=True)
                )

            body = []
            for row in rows:
                if isinstance(row, str):
                    cell = f'<td colspan="{len(header)}">{html.escape(row)}</td>'
                    body.append(f'<tr class="group">{cell}</tr>')
                else:
                    body.append(f"<tr>{cells('td', row)}</tr>")
            head = f"<thead><tr>{cells('th', header)}</tr></thead>"
            return f"<table>{head}<tbody>{''.join(body)}</tbody></table>"
        case Raw(text):
            return text


def _column_class(texts: Sequence[str]) -> str:
    """Columns of words stand left, and long ones wrap; numbers stand right."""
    if any(re.match(r"[+\-]?\d", text) for text in texts):
        return ""
    return ' class="long"' if max(map(len, texts), default=0) > 60 else ' class="words"'


def render_markdown(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {text}\n"
        case Note(text, kind):
            return f"**{text}**\n" if kind == "warning" else f"{text}\n"
        case Table(header, rows):
            lines = [_line(header), "|---" * len(header) + "|"]
            for row in rows:
                blank = [""] * (len(header) - 1)
                lines.append(_line([f"**{row}**", *blank] if isinstance(row, str) else row))
            return "\n".join(lines) + "\n"
        case Raw():
            return ""


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"


def number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def spread(interval: Sequence[float], digits: int = 1) -> str:
    return f"{interval[0]:.{digits}f} to {interval[1]:.{digits}f}"


def difference(found: dict | None) -> str:
    """A `paired_difference` as a cell."""
    if found is None:
        return "–"
    p = "p < 0.001" if found["p"] < 0.001 else f"p {found['p']:.3f}"
    return f"{found['difference']:+.1f} ({spread(found['interval'])}), {p}"


def with_interval(mean: float | None, interval: Sequence[float] | None) -> str:
    if mean is None or interval is None:
        return "–"
    return f"{mean:.1f} ({spread(interval)})"


def page(title: str, body: str) -> str:
    """A whole HTML page in the report's style."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>{body}</body></html>"
    )


def write_pages(stem: pathlib.Path, title: str, blocks: Sequence[Block]) -> str:
    """Writes STEM.html and STEM.md; returns the Markdown."""
    body = "\n".join(map(render_html, blocks))
    text = "\n".join(t for t in map(render_markdown, blocks) if t)
    write_whole(stem.with_name(stem.name + ".html"), page(title, body))
    write_whole(stem.with_name(stem.name + ".md"), text)
    return text
