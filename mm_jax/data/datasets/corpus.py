"""Holds a data set before it is built: dialogues or clips with labels, their samples and splits."""

from __future__ import annotations

import abc
import collections
import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mm_jax.data.datasets import common
from mm_jax.data.datasets.common import SPLITS, DataError
from mm_jax.data.labels import LabelSpace
from mm_jax.data.media import Clip, inside
from mm_jax.data.recording import VIDEO_SUFFIXES
from mm_jax.data.records import (
    CLIENT,
    Dialogue,
    Sample,
    Utterance,
    dialogue_samples,
    merge_turns,
    utterance_samples,
)

CLIP_SUFFIXES = (*VIDEO_SUFFIXES, ".wav", ".flac", ".m4a", ".mp3", ".ogg", ".opus")

if TYPE_CHECKING:
    from mm_jax.data.datasets.request import DataRequest


@dataclasses.dataclass(frozen=True)
class Entry:
    """A dialogue or a clip; split and fold: as given, "" if not; client: who it is, "" if not
    known; where: its file and line."""

    dialogue: Dialogue
    where: str
    split: str = ""
    fold: str = ""
    client: str = ""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """What a folder holds; is_inferred: the label space was, from the labels that occur."""

    space: LabelSpace
    entries: tuple[Entry, ...]
    is_inferred: bool

    @property
    def utterances(self) -> Iterator[Utterance]:
        return (u for entry in self.entries for u in entry.dialogue.utterances)

    @property
    def has_media(self) -> bool:
        """Tells whether a client's utterance has a clip."""
        return any(u.media and u.speaker == CLIENT for u in self.utterances)


def has_turns(space: LabelSpace) -> bool:
    """Tells whether a sample is a therapist's turn, and not a single utterance of a client."""
    return space.reply or any(task.about != CLIENT for task in space.tasks)


def samples_of(dialogue: Dialogue, space: LabelSpace) -> list[tuple[Sample, tuple[Utterance, ...]]]:
    """Lists a dialogue's samples, each with the client's utterances that it shows."""
    said = dialogue.utterances
    if not has_turns(space):
        found = utterance_samples(dialogue)
        return [(sample, said[sample.turn - 1 : sample.turn]) for sample in found]
    found, spans = dialogue_samples(dialogue), merge_turns(said)
    if not space.reply:
        found = [dataclasses.replace(sample, response="") for sample in found]
    shown = [spans[sample.turn - 1] for sample in found]
    return [(s, said[t.first : t.last + 1]) for s, t in zip(found, shown, strict=True)]


def clip_entries(root: pathlib.Path, take: Callable, example: str) -> tuple[Entry, ...]:
    """Lists the single clips below a folder whose names say what they are.

    `take(name)` returns (id, client, text, labels, rank) or None: of one id the clip with the least
    rank counts, a video before a sound; names that begin with "._" are no clips. Raises DataError.
    """
    found: dict[str, tuple] = {}
    for path in sorted(root.rglob("*")):
        suffix = path.suffix.lower()
        if suffix not in CLIP_SUFFIXES or path.name.startswith("._"):
            continue
        if (taken := take(path.stem)) is None:
            continue
        name, client, text, labels, rank = taken
        rank = (rank, CLIP_SUFFIXES.index(suffix))
        if name not in found or rank < found[name][0]:
            media = path.relative_to(root).as_posix()
            said = Utterance(CLIENT, text, labels, media=media)
            entry = Entry(Dialogue(name, (said,)), str(path), client=client)
            found[name] = (rank, entry)
    if not found:
        raise DataError(f"{root}: no clips are found; expected names such as {example}")
    return tuple(entry for _, entry in found.values())


def utterance_names(dialogue: Dialogue) -> list[str]:
    """Names a dialogue's utterances, as transcripts do: a single clip as its dialogue."""
    count = len(dialogue.utterances)
    return [f"{dialogue.id} {i + 1}" if count > 1 else dialogue.id for i in range(count)]


# ---- splits --------------------------------------------------------------------------------------


def split_entries(corpus: Corpus, val_share: float, fold: int, seed: int) -> dict[str, list[Entry]]:
    """Returns the entries of train, val and test: as given, or test is a fold, or all are drawn.

    What is drawn is stratified by labels, and by client or else dialogue: val and test have about
    `val_share` each. Raises DataError.
    """
    entries, folds = corpus.entries, [e for e in corpus.entries if e.fold]
    if entries[0].split:
        parts = {name: [e for e in entries if e.split == name] for name in SPLITS}
    elif folds:
        lacking = next((e for e in entries if not e.fold), None)
        if lacking is not None:
            raise DataError(f"{lacking.where}: fold: missing, but {folds[0].where} has one")
        rest = [e for e in entries if int(e.fold) != fold]
        parts = drawn(rest, corpus.space, {"train": 1 - val_share, "val": val_share}, seed)
        parts["test"] = [e for e in entries if int(e.fold) == fold]
    else:
        shares = {"train": 1 - 2 * val_share, "val": val_share, "test": val_share}
        parts = drawn(entries, corpus.space, shares, seed)
    empty = [name for name, own in parts.items() if not own]
    if folds and "test" in empty:
        known = ", ".join(map(str, sorted({int(e.fold) for e in folds})))
        raise DataError(f"--fold: no clip has fold {fold}; there are {known}")
    if empty:
        people = len({e.client for e in entries})
        raise DataError(
            f"{', '.join(empty)}: nothing is in this split; expected dialogues in each of train, "
            "val and test"
            + (f", and there are {people} clients, each for one split" if entries[0].client else "")
        )
    seen: dict[str, tuple[str, Entry]] = {}
    for name, own in parts.items():
        for entry in own:
            other, first = seen.setdefault(entry.client, (name, entry))
            if entry.client and other != name:
                raise DataError(
                    f"{entry.where}: {entry.client!r} is in {name}, and in {other} at "
                    f"{first.where}; a person belongs to one split"
                )
    return parts


def drawn(
    entries: Sequence[Entry], space: LabelSpace, shares: Mapping[str, float], seed: int
) -> dict[str, list[Entry]]:
    """Draws splits: clients (or dialogues) in random order, larger ones first, each to the split
    that lacks most of its labels."""
    groups: dict[tuple[str, str], list[Entry]] = collections.defaultdict(list)
    for entry in entries:
        kind = ("client", entry.client) if entry.client else ("dialogue", entry.dialogue.id)
        groups[kind].append(entry)
    members = [groups[key] for key in sorted(groups)]
    counts = [
        collections.Counter(
            key
            for entry in own
            for sample, _ in samples_of(entry.dialogue, space)
            for key in (("sample", ""), *sample.labels.items())
        )
        for own in members
    ]
    total = sum(counts, collections.Counter())
    order = np.random.default_rng(seed).permutation(len(members))
    order = sorted(order, key=lambda i: -counts[i]["sample", ""])
    wanted = {name: {key: share * n for key, n in total.items()} for name, share in shares.items()}
    have = {name: collections.Counter() for name in shares}

    def need(name: str, i: int) -> float:
        # Of a label that is rare, train gets what there is.
        return sum(
            n / total[key] * (1 - have[name][key] / wanted[name][key])
            for key, n in counts[i].items()
            if name == "train" or wanted[name][key] >= 0.5
        )

    def fits(name: str, i: int) -> bool:
        size, limit = counts[i]["sample", ""], wanted[name]["sample", ""]
        return name == "train" or have[name]["sample", ""] + size <= 1.25 * limit

    parts: dict[str, list[Entry]] = {name: [] for name in shares}
    for k, i in enumerate(order):
        empty = [name for name in shares if not parts[name]]
        able = [name for name in shares if fits(name, i)]
        # The last and smallest ones go where there is nothing yet.
        name = max(empty if len(order) - k <= len(empty) else able, key=lambda name: need(name, i))
        parts[name] += members[i]
        have[name] += counts[i]
    return parts


# ---- the builder ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Described:
    """What a build is: the part of its name before what its media are, its label space, and the
    options that make it again; media: where the clips are, None for text alone."""

    name: str
    space: LabelSpace
    media: pathlib.Path | None
    options: Mapping[str, object] = dataclasses.field(default_factory=dict)


class CorpusBuilder(common.SampleBuilder):
    """Builds therapist turns, or single utterances of clients where only those have labels."""

    @classmethod
    @abc.abstractmethod
    def describe(cls, request: DataRequest) -> Described:
        """Describes the build that is asked for. Raises ConfigError or DataError."""

    @staticmethod
    @abc.abstractmethod
    def read(config: common.BuilderConfig) -> Corpus:
        """Reads the raw files. Raises DataError."""

    @functools.cached_property
    def corpus(self) -> Corpus:
        return self.read(self.builder_config)

    def splits(self):
        config, corpus = self.builder_config, self.corpus
        drawn_by = {name: config.options[name] for name in ("val_share", "fold", "seed")}
        where = pathlib.Path(config.media or config.raw)
        pending = functools.partial(pending_samples, where, corpus)
        splits = {
            name: functools.partial(pending, entries)
            for name, entries in split_entries(corpus, **drawn_by).items()
        }
        if corpus.has_media:
            every = itertools.chain.from_iterable(made() for made in splits.values())
            common.require_input(every, pathlib.Path(config.media), self.clips_are)
        return splits

    clips_are = "the files that the data set names"


def pending_samples(
    media: pathlib.Path,
    corpus: Corpus,
    entries: Sequence[Entry],
    hear: Callable[[str, Sequence[Clip]], str] | None = None,
) -> Iterator[common.Pending]:
    """Yields samples with the clips of the client's utterances that have one."""
    lacking = "none given" if corpus.has_media else ""

    def clip(said: Utterance) -> Clip:
        return Clip(inside(media, said.media), said.start, said.end or None)

    for entry in entries:
        dialogue = entry.dialogue
        if hear is not None:
            names = utterance_names(dialogue)
            heard = (
                dataclasses.replace(u, text=hear(name, (clip(u),))) if not u.text else u
                for name, u in zip(names, dialogue.utterances, strict=True)
            )
            dialogue = dataclasses.replace(dialogue, utterances=tuple(heard))
        for sample, said in samples_of(dialogue, corpus.space):
            clips = tuple(clip(u) for u in said if u.media)
            yield common.Pending(sample, clips, status="" if clips else lacking)
