"""Prints docs/config.md, generated from the config's schema; --write writes it (`make docs`)."""

from __future__ import annotations

import argparse
import pathlib
import sys
import typing

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from mm_jax.config.schema import Config
from mm_jax.config.section import Section, described_range
from mm_jax.config.stage import Stage

TARGET = ROOT / "docs" / "config.md"
HEAD = """# Configuration

Every field of a run: its type, default, range or choices, and meaning. Made from
`mm_jax/config/schema.py` by `make docs`; a test checks that it is fresh.

A config file is Python that returns a ConfigDict (`configs/base.py` is the paper's). Any field is
set on the command line by `--config.KEY=VALUE`, for example
`--config.stage.sft.learning_rate=1e-5`. Unknown keys, wrong types and impossible combinations are
refused before anything is built.
"""


def reference() -> str:
    """Returns the whole page."""
    lines = [HEAD]
    for title, section in sections(Config, ""):
        lines += [f"## {title}", "", first_paragraph(section), ""]
        lines += ["| field | type | default | range | meaning |", "|---|---|---|---|---|"]
        for name, field in section.model_fields.items():
            if child_of(field.annotation) is None:
                cells = (f"`{name}`", described_type(field.annotation), default_of(field))
                lines.append(
                    "| " + " | ".join((*cells, described_range(field), field.description)) + " |"
                )
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def sections(section: type[Section], path: str):
    """Yields (title, section) of a section and all its subsections, in the order of the fields."""
    yield path.rstrip(".") or "The run", section
    for name, field in section.model_fields.items():
        child = child_of(field.annotation)
        if child is not None:
            yield from sections(child, f"{path}{name}.{'NAME.' if child is Stage else ''}")


def child_of(annotation) -> type[Section] | None:
    candidates = (annotation, *typing.get_args(annotation))
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, Section)), None)


def first_paragraph(section: type[Section]) -> str:
    return " ".join(section.__doc__.split("\n\n")[0].split())


def described_type(annotation) -> str:
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Literal:
        return ", ".join(f"`{a}`" for a in arguments)
    if typing.get_origin(annotation) is tuple:
        if arguments[-1] is Ellipsis:
            return f"any of {described_type(arguments[0])}" if arguments[0] is not str else "names"
        return f"{len(arguments)} x {described_type(arguments[0])}"
    return annotation.__name__


def default_of(field) -> str:
    value = field.default
    if isinstance(value, tuple):
        return f"`({', '.join(map(str, value))})`"
    return f"`{value}`" if value != "" else "empty"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {TARGET.relative_to(ROOT)}")
    if parser.parse_args().write:
        TARGET.write_text(reference())
    else:
        print(reference(), end="")


if __name__ == "__main__":
    main()
