"""Screens what a client says, and a reply before it is shown, sentence by sentence.

Like `screen.py`, patterns of plain wordings: what they miss is shown.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Callable, Sequence

import mm_jax
from mm_jax.config.errors import ConfigError, require
from mm_jax.config.load import module_of
from mm_jax.data.records import CLIENT, Utterance
from mm_jax.evaluation.screen import plain, screen_client
from mm_jax.rewards.combine import screen as harmful

RUNNING = 4  # of the client's earlier turns, which are read together with the newest
_CARERS = (
    r"(therapist|psychologist|psychiatrist|psychotherapist|doctor|physician|counsell?or|nurse)"
)
_ILLNESS = (
    r"((major|clinical|manic|severe|bipolar|borderline|generali[sz]ed|social|post ?-?traumatic|"
    r"obsessive|attention|eating|personality|panic)[\w -]* (disorder|depression)|"
    r"depression|ptsd|adhd|ocd|schizophrenia|bipolar|psychosis|autism|anorexia|bulimia|dementia)"
)
_MEDICINE = (
    r"(prozac|zoloft|xanax|valium|lorazepam|diazepam|sertraline|fluoxetine|escitalopram|citalopram|"
    r"lithium|ritalin|adderall|ketamine|antidepressants?|medications?|medicines?|meds|pills|dose|"
    r"dosage|benzodiazepines?|tranquilli[sz]ers?|ssris?|opioids?|melatonin|sedatives?)"
)
# On the words of `plain`: lower case, no apostrophes, short forms written out.
_FAULTS = {
    "claims to be a person": rf"\bi am (a |an )?(real |actual |living )?(human|person)\b|"
    rf"\bi am not (a |an )?(ai|bot|chatbot|machine|robot|program|computer)\b|"
    rf"\b(i am|as|speaking as) (a|an|your) ((fully |board )?(licen[sc]ed|certified|registered|"
    rf"qualified|professional|trained) )?{_CARERS}\b|\bi am (licen[sc]ed|board certified)\b",
    "gives a diagnosis": rf"\byou (clearly |probably |likely |definitely |certainly |do )?"
    rf"(have|suffer from|are suffering from|are showing signs of|meet the criteria for) "
    rf"(an? |the )?{_ILLNESS}\b|"
    rf"\byou are (clearly |probably |likely |clinically )?(depressed and need|bipolar|"
    rf"schizophrenic|psychotic|autistic)\b|\bi (would )?diagnose\b",
    "advises on medicine": rf"\b(take|try|start|stop|increase|double|reduce|skip|prescribe)"
    rf"( taking)?( your| some| an?| the| more| of| this| these| you| \d+ ?(mg|milligrams)?)* "
    rf"{_MEDICINE}\b|\b\d+ ?(mg|milligrams?)\b",
}
_PATTERNS = {fault: re.compile(pattern) for fault, pattern in _FAULTS.items()}
_END = re.compile(r"[.!?\u2026]+[\"'\u201d\u2019)\]]*\s|\n")


@dataclasses.dataclass(frozen=True)
class Texts:
    """What is shown in place of a reply: `crisis` to words of danger, `replaced` instead of what a
    reply must not say; `notice` before the first words."""

    crisis: str
    replaced: str
    notice: str

    @classmethod
    def load(cls, spec: str | None = None) -> Texts:
        """Reads `path.py[:locale]` (default: configs/safety.py). Raises ConfigError."""
        spec = spec or str(pathlib.Path(mm_jax.__file__).parents[1] / "configs" / "safety.py")
        path, _, locale = spec.partition(":")
        found = module_of("--safety", path, "get_texts").get_texts(locale)
        names = {field.name for field in dataclasses.fields(cls)}
        require(
            set(found) == names and all(isinstance(text, str) for text in found.values()),
            f"--safety: {spec}: expected texts {', '.join(sorted(names))}, got {sorted(found)}",
        )
        for name, given in (("crisis", {"danger": "x"}), ("replaced", {"fault": "x"})):
            try:
                found[name].format(**given)
            except (KeyError, IndexError, ValueError) as error:
                said = f"it may hold {{{next(iter(given))}}} and no other braces"
                raise ConfigError(f"--safety: {spec}: {name}: {said}") from error
        return cls(**found)


def danger_of(words: str, history: Sequence[Utterance] = ()) -> str:
    """Names the danger that a client's words state, alone or with those before them, or "".

    What nobody has answered yet counts as said now; what was answered does not count again.
    """
    answered = max((i for i, u in enumerate(history) if u.speaker != CLIENT), default=-1)
    now = [u.text for u in history[answered + 1 :]] + [words]
    found = next(filter(None, map(screen_client, now)), "")
    before = [u.text for u in history[: answered + 1] if u.speaker == CLIENT][-RUNNING:]
    while before and screen_client(" ".join(before)):
        del before[0]
    return found or screen_client(" ".join([*before, *now]))


def fault_of(reply: str) -> str:
    """Says why a reply must not be shown, or ""."""
    if harmful(reply):
        return "may do harm"
    words = plain(reply)
    return next((fault for fault, pattern in _PATTERNS.items() if pattern.search(words)), "")


class Release:
    """Releases a reply that comes in pieces: whole sentences, each once all up to its end has
    passed `judge`, which names the fault of a text or returns "".

    texts: what takes its place; cut(text): what of it belongs to the reply; stops: the reply ends
    before any of these. After a fault, or an error of `judge`, a notice replaces the rest. shown:
    what was released; fault: why not all; closed: nothing more will be released.
    """

    def __init__(
        self,
        texts: Texts,
        cut: Callable[[str], str] = str.strip,
        stops: Sequence[str] = (),
        judge: Callable[[str], str] = fault_of,
    ):
        self.texts, self.cut, self.stops, self.judge = texts, cut, stops, judge
        self.written = self.shown = self.fault = ""
        self.closed = self.stopped = False

    def add(self, piece: str, last: bool = False) -> str:
        """Returns what a further piece lets be shown; with `last` the reply ends."""
        if self.closed:
            return ""
        self.written += piece
        text = self.cut(self.written)
        found = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            text, last, self.stopped = text[: min(found)], True, True
        end = len(text)
        if not last:
            # What may become one of the stops waits.
            sure = end - max((_begun(text, stop) for stop in self.stops), default=0)
            ends = [m.end() for m in _END.finditer(text) if m.end() <= sure]
            end = max(ends, default=0)
        new = text[len(self.shown) : end]
        self.closed = last
        if new:
            try:
                self.fault = self.judge(text[:end])
            except Exception:  # whatever it is: what was not screened is not shown
                self.fault = "could not be screened"
            if self.fault:
                new, self.closed = self.texts.replaced.format(fault=self.fault), True
        self.shown += new
        return new


def _begun(text: str, stop: str) -> int:
    """Counts the characters at the end of a text with which `stop` begins."""
    return next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0)
