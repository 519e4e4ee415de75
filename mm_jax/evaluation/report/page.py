"""Writes a page of sections as HTML (one file without outside references) and as Markdown."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Sequence

import jinja2
from markupsafe import Markup

from mm_jax.config.files import write_whole
from mm_jax.evaluation.report.tables import Table, number, share, spread

TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
    autoescape=jinja2.select_autoescape(("html",)),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
TEMPLATES.filters |= {"number": number, "share": share, "spread": spread}
_WORDS = TEMPLATES.get_template("words.txt").module


def words(name: str, *values: object) -> list[str]:
    """Renders a macro of words.txt as paragraphs, each on one line."""
    paragraphs = getattr(_WORDS, name)(*values).split("\n\n")
    return [" ".join(text.split()) for text in paragraphs if text.strip()]


@dataclasses.dataclass(frozen=True)
class Note:
    """Holds a paragraph of a kind: "lead" (what a reader must not miss) or "warning"."""

    text: str
    kind: str


@dataclasses.dataclass(frozen=True)
class Talk:
    """Holds a sample's conversation. frames: image sources; lines: (who, words); fields: (task,
    predicted, gold); response and gold_response: None where there are none."""

    about: str
    frames: Sequence[str]
    lines: Sequence[tuple[str, str]]
    fields: Sequence[tuple[str, str, str]]
    response: str | None
    gold_response: str | None


# A plain string is a paragraph; Markup is in the HTML only.
Part = str | Markup | Note | Table | Talk


class Section:
    """Holds parts below a heading, next to each other if `columns`; a section of level 3 belongs to
    the one of level 2 before it."""

    def __init__(self, title: str, *parts: Part, level: int = 2, columns: bool = False):
        self.title, self.parts, self.level, self.columns = title, parts, level, columns
        self.anchor = re.sub(r"\W+", "-", title.casefold()).strip("-")


@dataclasses.dataclass(frozen=True)
class Page:
    title: str
    parts: Sequence[Part]
    sections: Sequence[Section]


def as_text(page: Page) -> str:
    """Renders a page as Markdown with aligned tables."""
    return TEMPLATES.get_template("page.md").render(page=page).rstrip() + "\n"


def write_pages(stem: pathlib.Path, page: Page) -> str:
    """Writes STEM.html and STEM.md; returns the Markdown."""
    text = as_text(page)
    html = TEMPLATES.get_template("page.html").render(page=page)
    write_whole(stem.with_name(stem.name + ".html"), html)
    write_whole(stem.with_name(stem.name + ".md"), text)
    return text
