"""Screens a reply before it is shown, sentence by sentence while it is written.

Like `screen.py`, patterns of plain wordings: what they miss is shown.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

from mm_jax.evaluation.screen import plain
from mm_jax.rewards.combine import screen as harmful

REPLACEMENT = (
    "[This reply is not shown: it {fault}. This is a research model, not a person and not a "
    "therapist; for questions of health please ask a professional.]"
)
NOTICE = (
    "You are talking to a machine: a research model, not a person, not a therapist and no help in "
    "a crisis."
)
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


def fault_of(reply: str) -> str:
    """Says why a reply must not be shown, or ""."""
    if harmful(reply):
        return "may do harm"
    words = plain(reply)
    return next((fault for fault, pattern in _PATTERNS.items() if pattern.search(words)), "")


def released(
    pieces: Iterable[str], judge: Callable[[str], str] = fault_of
) -> Iterator[tuple[str, str]]:
    """Yields (text, fault) of a reply that comes in pieces: whole sentences, each once all up to
    its end has passed `judge` (fault "").

    With a fault, or an error of `judge`, the rest is replaced and nothing follows.
    """
    text, shown = "", 0
    for piece, last in _with_last(pieces):
        text += piece
        end = len(text) if last else max((m.end() for m in _END.finditer(text)), default=0)
        if end <= shown:
            continue
        try:
            fault = judge(text[:end])
        except Exception:  # whatever it is: what was not screened is not shown
            fault = "could not be screened"
        if fault:
            yield REPLACEMENT.format(fault=fault), fault
            return
        yield text[shown:end], ""
        shown = end


def _with_last(pieces: Iterable[str]) -> Iterator[tuple[str, bool]]:
    for piece in pieces:
        yield piece, False
    yield "", True
