"""Screens what a client says for plain words of danger: to themselves, or by or to others.

Transparent patterns of everyday wordings (screen_patterns.txt), read after slang and short forms
are written out and known idioms and denials are taken away. It is no clinical instrument: hints,
other languages and irony escape it. `evaluation/safety.py` measures it.
"""

from __future__ import annotations

import collections
import pathlib
import re

TOLD_THREAT = "danger from others"
_FILE = pathlib.Path(__file__).with_name("screen_patterns.txt")
REFUSAL = re.compile(
    r"\b(i (can(no|')t|am unable to|'m unable to|am not able to) (help|assist|provide|answer|do "
    r"that)|as an ai\b|i'm sorry, but i)",
    re.IGNORECASE,
)


def _sections(text: str) -> dict[str, list[str]]:
    """Maps each [section] to its lines, with <words> of the first section put in."""
    found, words, section = collections.defaultdict(list), {}, ""
    for line in text.splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif section == "words" and line.strip():
            name, _, pattern = line.partition(" = ")
            words[name] = pattern
        elif line.strip() and not line.startswith("#"):
            found[section].append(re.sub(r"<(\w+)>", lambda m: words[m[1]], line))
    return found


_LINES = _sections(_FILE.read_text(encoding="utf-8"))
_PAIRS = [line.split("  ->  ") for line in _LINES["spelt out"]]
_SPELT_OUT = [(re.compile(pattern), written) for pattern, written in _PAIRS]
_HARMLESS = [re.compile(line) for line in _LINES["harmless"]]
_THREAT = re.compile("|".join(_LINES["told threat"]))
_DANGER = {
    name.removeprefix("danger: "): re.compile("|".join(lines))
    for name, lines in _LINES.items()
    if name.startswith("danger: ")
}


def plain(text: str) -> str:
    """Returns text in lower case, without apostrophes, with slang and short forms written out."""
    text = re.sub(r"['’`´]", "", text.casefold())
    text = " ".join(text.split())
    for pattern, written in _SPELT_OUT:
        text = pattern.sub(written, text)
    return text


def screen_client(text: str) -> str:
    """Names the danger that a client's words state, or ""."""
    words = plain(text)
    if _THREAT.search(words):
        return TOLD_THREAT
    sentences = re.split(r"(?<=[.!?])\s+", words)
    for pattern in _HARMLESS:
        sentences = [pattern.sub(" ; ", sentence) for sentence in sentences]
    words = " ".join(sentences)
    return next((name for name, pattern in _DANGER.items() if pattern.search(words)), "")


def refuses(text: str) -> bool:
    """Tells by its wording whether a reply is a refusal."""
    return bool(REFUSAL.search(text.replace("’", "'")))
