"""Describes what the labels of a data set are: its tasks, as labels.json holds them (docs/data.md).

A built data set, a run and an exported processor each hold the description that they were made
with, so that no code knows the labels of a particular data set.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import json
import pathlib
import re
import string
import unicodedata
from collections.abc import Iterable, Mapping

from mm_jax.config.errors import require
from mm_jax.config.files import read_json, write_whole
from mm_jax.data.records import CLIENT, SPEAKERS, THERAPIST

LABELS_FILE = "labels.json"
BUILT_IN = ("mesc", "dfew", "meld", "esconv", "cremad", "ravdess")
RESPONSE_FIELD = "Therapist's response:"
# Keys of an utterance, and names of scores; no task can have such a name.
TAKEN = ("speaker", "text", "clue", "media", "start", "end", "id", "response", "rouge_l", "n")
_NAME = re.compile("[a-z][a-z0-9_]*")
_AROUND = " \t.,;:!*_\"'`[]()"


@dataclasses.dataclass(frozen=True)
class Task:
    """A classification task.

    caption: starts its line of the answer; about: the speaker whose utterances have these labels;
    guidance: label -> one line on when to choose it (all labels, or none); aliases: other
    spellings -> label.
    """

    name: str
    caption: str
    about: str
    labels: tuple[str, ...]
    guidance: Mapping[str, str] = dataclasses.field(default_factory=dict)
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def field(self) -> str:
        """Returns the start of the task's line in an answer."""
        return f"{self.caption}:"

    @property
    def key(self) -> str:
        """Returns the name without the speaker in front, as an utterance may have it."""
        return self.name.removeprefix(f"{self.about}_")

    @property
    def options(self) -> str:
        """Writes the labels out for a prompt, with their guidance."""
        if self.guidance:
            return "; ".join(f"{label}: {self.guidance[label]}" for label in self.labels)
        return ", ".join(self.labels)

    @functools.cached_property
    def spellings(self) -> dict[str, str]:
        """Maps folded spellings to labels."""
        own = {folded(label): label for label in self.labels}
        return {folded(alias): label for alias, label in self.aliases.items()} | own

    def normalise(self, text: str) -> str:
        """Returns the label that `text` spells, but for case and punctuation, or ""."""
        return self.spellings.get(folded(text), "")


@dataclasses.dataclass(frozen=True)
class LabelSpace:
    """The tasks of a data set in the order of the answer, and whether answers end in a reply.

    instruction: what the prompt asks for; "{task name}" stands for that task's labels.
    """

    name: str
    tasks: tuple[Task, ...]
    reply: bool
    instruction: str = ""

    def __getitem__(self, name: str) -> Task:
        return next(task for task in self.tasks if task.name == name)

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(task.name for task in self.tasks)

    @functools.cached_property
    def by_speaker(self) -> dict[str, tuple[Task, ...]]:
        """Maps each speaker to the tasks about them."""
        return {s: tuple(t for t in self.tasks if t.about == s) for s in (CLIENT, THERAPIST)}

    @functools.cached_property
    def asks(self) -> str:
        """Returns the instruction with the labels in it."""
        if self.instruction:
            return self.instruction.format(**{task.name: task.options for task in self.tasks})
        lists = (f"{task.caption}: {task.options}." for task in self.tasks)
        return "Predict one label for each line of the answer. " + " ".join(lists)

    def labels_of(self, entry: Mapping, speaker: str, where: str) -> dict[str, str]:
        """Reads the labels of an utterance that a person wrote down.

        A key is the task's name, with or without the speaker in front ("emotion" of a client is
        client_emotion). Raises ConfigError for a label that is not allowed.
        """
        found: dict[str, str] = {}
        for task in self.tasks:
            for key in dict.fromkeys((task.name, task.key)):
                given = entry.get(key) or ""
                require(isinstance(given, str), f"{where}: {key}: expected text, got {given!r:.60}")
                if not given or (task.about != speaker and key != task.name):
                    continue
                require(
                    task.about == speaker,
                    f"{where}: {key}: a label of the {task.about}'s utterances, not of the "
                    f"{speaker}'s (labels.json: about, which is client where it is not given)",
                )
                label = task.normalise(given)
                require(
                    bool(label),
                    f"{where}: {key}: expected one of {list(task.labels)}, got {given!r:.60}",
                )
                require(
                    found.get(task.name, label) == label,
                    f"{where}: {key}: {label!r}, but {task.name} is {found.get(task.name)!r}",
                )
                found[task.name] = label
        return found

    def dump(self) -> dict:
        """Returns what `parse_labels` reads."""
        tasks = [
            {
                "name": task.name,
                "caption": task.caption,
                "about": task.about,
                "labels": dict(task.guidance) if task.guidance else list(task.labels),
                **({"aliases": dict(task.aliases)} if task.aliases else {}),
            }
            for task in self.tasks
        ]
        own = {"instruction": self.instruction} if self.instruction else {}
        return {"name": self.name, "reply": self.reply, **own, "tasks": tasks}


def folded(text: str) -> str:
    """Returns a label's spelling without case, outer punctuation and runs of spaces."""
    return _plain(text).strip(_AROUND)


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).replace("’", "'").split()).casefold()


@functools.cache
def field_pattern(field: str) -> re.Pattern:
    """Returns the pattern of an answer line's start, such as "Client's emotion:", as models vary
    it: bold, quoted, listed, without the apostrophe."""
    words = (re.escape(word) for word in field.rstrip(":").split())
    words = (re.sub(r"'s$", r"(?:['’]?s)?", word) for word in words)
    caption = r"[ \t]+".join(words)
    return re.compile(rf"^[ \t>*_#\-]*{caption}[ \t*_]*:[ \t*_]*", re.IGNORECASE | re.MULTILINE)


def parse_labels(value: object, where: str) -> LabelSpace:
    """Reads a description of tasks. Raises ConfigError naming what is wrong."""
    known = {"name", "reply", "instruction", "tasks"}
    require(isinstance(value, dict), f"{where}: expected an object, got {value!r:.60}")
    require(set(value) <= known, f"{where}: unknown {sorted(set(value) - known)}; know {known}")
    name, reply = value.get("name", "own"), value.get("reply", True)
    require(isinstance(name, str) and bool(name), f"{where}: name: expected text, got {name!r}")
    require(isinstance(reply, bool), f"{where}: reply: expected true or false, got {reply!r}")
    listed = value.get("tasks")
    require(isinstance(listed, list) and listed != [], f"{where}: tasks: expected a list of tasks")
    tasks = tuple(_task(task, f"{where}: tasks[{i}]") for i, task in enumerate(listed))
    keys = [key for task in tasks for key in dict.fromkeys((task.name, task.key))]
    shared = {task.key for task in tasks if task.name == f"{task.about}_{task.key}"}
    for key, n in collections.Counter(keys).items():
        # client_mood and therapist_mood are both "mood" where their speakers are.
        both = key in shared and key not in [task.name for task in tasks]
        require(n == 1 or both, f"{where}: tasks: two are written as {key!r}")
    fields = [task.field for task in tasks]
    for field, other in itertools.permutations((*fields, RESPONSE_FIELD), 2):
        require(
            not field_pattern(field).match(f"{other} x"),
            f"{where}: caption: {field!r} and {other!r} would be taken for each other",
        )
    instruction = value.get("instruction", "")
    require(
        instruction == "" or _is_line(instruction),
        f"{where}: instruction: expected a line of text without < and >, got {instruction!r:.60}",
    )
    space = LabelSpace(name, tasks, reply, instruction)
    try:
        braces = list(string.Formatter().parse(instruction))
        plain = all(n is None or (n in space.names and not f and not c) for _, n, f, c in braces)
    except ValueError:
        plain = False
    require(
        plain,
        f"{where}: instruction: expected only {[f'{{{t}}}' for t in space.names]} in braces, got "
        f"{instruction!r:.60}",
    )
    return space


def _task(value: object, where: str) -> Task:
    known = {"name", "caption", "about", "labels", "aliases"}
    require(isinstance(value, dict), f"{where}: expected an object, got {value!r:.60}")
    require(set(value) <= known, f"{where}: unknown {sorted(set(value) - known)}; know {known}")
    name = value.get("name")
    require(
        isinstance(name, str) and bool(_NAME.fullmatch(name)),
        f"{where}: name: expected lower-case letters, digits and _, got {name!r}",
    )
    where = f"{where} {name}"
    about = value.get("about", CLIENT)
    require(about in (CLIENT, THERAPIST), f"{where}: about: expected client or therapist")
    require(
        not {name, name.removeprefix(f"{about}_")} & set(TAKEN),
        f"{where}: name: {name.removeprefix(f'{about}_')!r} has another meaning",
    )
    caption = value.get("caption", default_caption(name, about))
    require(
        _is_line(caption) and ":" not in caption,
        f"{where}: caption: expected a line without :, < and >, got {caption!r}",
    )
    labels = value.get("labels")
    guidance = labels if isinstance(labels, dict) else {}
    require(
        isinstance(labels, list | dict),
        f"{where}: labels: expected a list of labels, or label -> guidance, got {labels!r:.60}",
    )
    odd = [text for text in [*labels, *guidance.values()] if not _is_line(text)]
    require(
        not odd, f"{where}: labels: expected lines of text without < and >, got {odd[:1]!r:.80}"
    )
    require(len(labels) > 1, f"{where}: labels: expected at least two, got {list(labels)}")
    for label in labels:
        require(
            folded(label) == _plain(label),
            f"{where}: labels: {label!r} begins or ends with punctuation",
        )
    aliases = value.get("aliases", {})
    require(
        isinstance(aliases, dict) and all(map(_is_line, aliases)),
        f"{where}: aliases: expected spelling -> label, got {aliases!r:.60}",
    )
    unknown = [x for x in aliases.values() if x not in tuple(labels)]
    require(not unknown, f"{where}: aliases: {unknown[:1]} is not one of the labels")
    spelt = [folded(label) for label in (*labels, *aliases)]
    twice = [x for x, n in collections.Counter(spelt).items() if n > 1]
    require(
        not twice,
        f"{where}: labels and aliases: {twice[:1]} is there twice (case does not count)",
    )
    return Task(name, caption, about, tuple(labels), dict(guidance), dict(aliases))


def default_caption(name: str, about: str) -> str:
    """Returns the caption of a task without one: "Client's mood"."""
    short = name.removeprefix(f"{about}_").replace("_", " ")
    return f"{SPEAKERS[about]}'s {short}"


def _is_line(text: object) -> bool:
    """Tells whether `text` can stand in a prompt: a line that holds no special token."""
    whole = isinstance(text, str) and text == text.strip() != "" and text.isprintable()
    return whole and "<" not in text and ">" not in text


def inferred(
    tasks: Mapping[str, tuple[str, Iterable[str]]], reply: bool, path: pathlib.Path
) -> LabelSpace:
    """Describes tasks by the labels that occur in a file: task -> (about, labels)."""
    listed = [
        {"name": task, "about": about, "labels": sorted(set(labels))}
        for task, (about, labels) in tasks.items()
    ]
    description = {"reply": reply, "tasks": listed}
    return parse_labels(description, f"{path}: the labels found")


def write_labels(folder: pathlib.Path, space: LabelSpace) -> None:
    write_whole(folder / LABELS_FILE, json.dumps(space.dump(), indent=1, ensure_ascii=False) + "\n")


def read_labels(path: pathlib.Path) -> LabelSpace:
    """Reads a labels.json. Raises ConfigError."""
    return parse_labels(read_json(path), str(path))


@functools.cache
def built_in(name: str) -> LabelSpace:
    """Reads the description of a data set that this package builds, one of BUILT_IN."""
    return read_labels(pathlib.Path(__file__).parent / "datasets" / name / LABELS_FILE)
