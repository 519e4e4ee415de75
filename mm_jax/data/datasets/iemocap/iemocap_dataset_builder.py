"""Builds IEMOCAP with TFDS: emotions of the utterances in acted conversations.

Raw files: Session{1..5}/dialog/{EmoEvaluation,transcriptions}/*.txt, and the videos of
dialog/avi/DivX or the sounds of sentences/wav. Everybody is a client; utterances of other emotions
are context.
"""

from __future__ import annotations

import pathlib
import re

from mm_jax.config.files import read_text
from mm_jax.data.datasets.common import DataError
from mm_jax.data.datasets.corpus import Corpus, CorpusBuilder, Described, Entry
from mm_jax.data.labels import read_labels
from mm_jax.data.records import CLIENT, Dialogue, Utterance

SESSIONS = range(1, 6)
SPACES = {n: read_labels(pathlib.Path(__file__).parent / f"labels_{n}.json") for n in (4, 6)}
# The field's customs: excitement is happiness among four, a class of its own among six.
EMOTIONS = {
    4: {"ang": "angry", "hap": "happy", "exc": "happy", "neu": "neutral", "sad": "sad"},
    6: {"ang": "angry", "hap": "happy", "exc": "excited", "neu": "neutral", "sad": "sad"},
}
EMOTIONS[6]["fru"] = "frustrated"
RATED = re.compile(r"\[[\d.]+ - [\d.]+\]\t(\S+)\t(\w+)\t")
SAID = re.compile(r"(Ses\d\d[FM]_\w+_([FM])(?:XX)?\d+) \[([\d.]+)-([\d.]+)\]: (.*)")


class Builder(CorpusBuilder):
    """IEMOCAP: session `fold` is test, another one val."""

    @classmethod
    def describe(cls, request):
        name = f"fold{request.fold}_{request.classes}classes"
        options = dict(classes=request.classes)
        return Described(name, SPACES[request.classes], request.raw, options)

    @staticmethod
    def read(config):
        root, classes = pathlib.Path(config.raw), config.options["classes"]
        entries = [e for n in SESSIONS for e in read_session(root, n, EMOTIONS[classes])]
        return Corpus(SPACES[classes], tuple(entries), is_inferred=False)


def read_session(root: pathlib.Path, number: int, emotions: dict[str, str]) -> list[Entry]:
    """Reads a session's conversations. Raises DataError."""
    folder = root / f"Session{number}" / "dialog"
    rated = sorted(p for p in (folder / "EmoEvaluation").glob("Ses*.txt"))
    if not rated:
        raise DataError(f"IEMOCAP: {folder / 'EmoEvaluation'} has no Ses*.txt")
    entries = []
    for path in rated:
        if path.name.startswith("._"):
            continue
        labels = dict(RATED.findall(read_text(path)))
        words = folder / "transcriptions" / path.name
        if not words.is_file():
            raise DataError(f"IEMOCAP: {words} does not exist")
        found = [m for line in read_text(words).split("\n") if (m := SAID.match(line.strip()))]
        unsaid = sorted(set(labels) - {m[1] for m in found})
        if unsaid:
            raise DataError(f"{words}: no words of {unsaid[:3]}, which {path.name} rates")
        found.sort(key=lambda m: float(m[3]))
        said = []
        for name, who, start, end, text in (m.groups() for m in found):
            emotion = emotions.get(labels.get(name, ""))
            own = {"emotion": emotion} if emotion else {}
            clip, times = clip_of(root, number, path.stem, name), (float(start), float(end))
            cut = times if clip.endswith(".avi") else (0.0, 0.0)
            said.append(Utterance(CLIENT, f"{who}: {text.strip()}", own, "", 0, clip, *cut))
        if any(u.labels for u in said):
            dialogue = Dialogue(path.stem, tuple(said))
            entries.append(Entry(dialogue, str(path), fold=str(number), client=f"session {number}"))
    return entries


def clip_of(root: pathlib.Path, number: int, dialogue: str, name: str) -> str:
    """Returns the video of the whole conversation where there is one, or the utterance's sound."""
    video = pathlib.Path(f"Session{number}", "dialog", "avi", "DivX", f"{dialogue}.avi")
    sound = pathlib.Path(f"Session{number}", "sentences", "wav", dialogue, f"{name}.wav")
    return (video if (root / video).is_file() else sound).as_posix()
