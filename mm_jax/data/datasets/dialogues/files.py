"""Reads people's own data: dialogues.jsonl or clips.csv, and labels.json (docs/data.md).

Every problem of the files is found before anything is built, each with its file and line.
"""

from __future__ import annotations

import collections
import csv
import difflib
import io
import json
import pathlib
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from mm_jax.config.errors import ConfigError, one_of, require
from mm_jax.config.files import BYTE_ORDER_MARKS, read_text, well_formed
from mm_jax.data.datasets.common import SPLITS, DataError
from mm_jax.data.datasets.corpus import Corpus, Entry, has_turns, samples_of
from mm_jax.data.labels import LABELS_FILE, LabelSpace, inferred, read_labels
from mm_jax.data.media import MediaError, inside
from mm_jax.data.records import CLIENT, SPEAKERS, Dialogue, Utterance

DIALOGUES_FILE, CLIPS_FILE = "dialogues.jsonl", "clips.csv"
DIALOGUE_KEYS = ("id", "split", "client", "problem", "situation", "utterances")
SAID_KEYS = ("speaker", "text", "clue", "media", "start", "end")
CLIP_COLUMNS = ("file", "split", "fold", "speaker", "text")
SHOWN = 20  # problems that an error names
LONGEST = 10_000_000  # bytes of a line
LONGEST_SECONDS = 1e6
MOST_LABELS = 100  # of a task that is inferred: more are no labels


class Problems:
    """Collects what is wrong with files, to tell it all at once."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def attempt(self, function: Callable, *arguments):
        """Returns what a function does, or None where it raises ConfigError."""
        try:
            return function(*arguments)
        except ConfigError as error:
            self.found.append(str(error))
            return None

    def raise_any(self) -> None:
        if not self.found:
            return
        count, alike = len(self.found), collections.defaultdict(list)
        for text in self.found:  # told once, but for the place
            alike[re.sub(r"(line|utterance) \d+", r"\1", text)].append(text)
        shown = [
            own[0] + (f" (and {len(own) - 1} more like it)" if len(own) > 1 else "")
            for own in alike.values()
        ]
        left = count - sum(len(own) for own in list(alike.values())[:SHOWN])
        more = [f"... and {left} more"] if left else []
        what = "problem" if count == 1 else "problems"
        raise DataError(f"{count} {what}:\n  " + "\n  ".join(shown[:SHOWN] + more))


def read_folder(root: pathlib.Path, heard: bool = False) -> Corpus:
    """Reads a folder. heard: clips without text will get their words.

    Raises DataError with all its problems, or ConfigError for labels.json.
    """
    files = [root / name for name in (DIALOGUES_FILE, CLIPS_FILE) if (root / name).is_file()]
    require(
        len(files) == 1,
        f"--raw: expected one of {DIALOGUES_FILE} and {CLIPS_FILE} in {root}, got "
        + (" and ".join(path.name for path in files) or "neither"),
    )
    (path,), problems = files, Problems()
    own = root / LABELS_FILE
    space = read_labels(own) if own.is_file() else None
    if path.name == DIALOGUES_FILE:
        found, entries = read_dialogues(path, space, problems, heard)
    else:
        found, entries = read_clips(path, space, problems)
    problems.raise_any()
    require(bool(entries), f"{path}: it is empty")
    dialogues: dict[str, str] = {}
    samples: dict[str, str] = {}
    for entry in entries:
        # Samples of "a" and "a_1" may be named alike, too.
        own = {s.id for s, _ in samples_of(entry.dialogue, found)}
        for names, seen in (({entry.dialogue.id}, dialogues), (own, samples)):
            if twice := sorted(names & seen.keys()):
                problems.found.append(
                    f"{entry.where}: id: {twice[0]!r} is that of {seen[twice[0]]} too"
                )
                break
            seen |= dict.fromkeys(names, entry.where)
        for i, said in enumerate(entry.dialogue.utterances):
            if said.media and not _is_file(inside(root, said.media)):
                of_clip = path.name == CLIPS_FILE
                place = entry.where if of_clip else f"{entry.where}: utterance {i + 1}"
                problems.found.append(f"{place}: media: there is no {said.media:.100} in {root}")
    given = [entry for entry in entries if entry.split]
    if given and len(given) < len(entries):
        other = next(entry for entry in entries if not entry.split)
        problems.found.append(f"{other.where}: split: missing, but {given[0].where} has one")
    problems.raise_any()
    return Corpus(found, tuple(entries), space is None)


def _is_file(path: pathlib.Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # such as a name that is too long
        return False


# ---- dialogues.jsonl -----------------------------------------------------------------------------


def read_dialogues(
    path: pathlib.Path, space: LabelSpace | None, problems: Problems, heard: bool
) -> tuple[LabelSpace | None, list[Entry]]:
    lines = [
        (where, value)
        for where, line in text_lines(path, problems)
        if line.strip() and (value := problems.attempt(_parsed, line, where)) is not None
    ]
    unread = [" not JSON: " in text for text in problems.found]
    if len(unread) > 1 and all(unread) and not lines:
        raise DataError(f"{path}: expected one dialogue per line, and each on one line")
    checked = [x for x in lines if problems.attempt(_check_dialogue, *x)]
    if space is None and not problems.found:
        space = problems.attempt(_inferred_space, checked, path, heard)
    if space is None:
        return None, []
    entries = [problems.attempt(_entry, value, where, space, problems) for where, value in checked]
    return space, [entry for entry in entries if entry is not None]


def text_lines(path: pathlib.Path, problems: Problems) -> Iterator[tuple[str, str]]:
    """Yields (file and number, text) of every line: UTF-8, or what a byte order mark says."""
    data = path.read_bytes()
    if data.startswith(tuple(mark for mark, _ in BYTE_ORDER_MARKS)):
        lines = [line.encode("utf-8") for line in read_text(path).split("\n")]
    else:
        lines = data.split(b"\n")
    for number, line in enumerate(lines, 1):
        where = f"{path} line {number}"
        if len(line) > LONGEST:
            problems.found.append(
                f"{where}: {len(line) / 1e6:.1f} MB; expected a dialogue of at most "
                f"{LONGEST / 1e6:.0f} MB"
            )
            continue
        try:
            text = line.decode("utf-8")
            if "\0" in text:
                raise ValueError("it holds a zero byte; UTF-16 needs a byte order mark")
        except ValueError as error:
            problems.found.append(f"{where}: expected UTF-8: {error}")
            return  # more lines of another encoding would say nothing new
        yield where, text


def _parsed(line: str, where: str) -> dict:
    """Parses a dialogue's line strictly. Raises ConfigError."""

    def unique(pairs: list[tuple[str, object]]) -> dict:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(k for k in found if [key for key, _ in pairs].count(k) > 1)
            raise ValueError(f"the key {twice!r} occurs twice")
        return found

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no number of JSON")

    try:
        value = json.loads(line, object_pairs_hook=unique, parse_constant=refuse)
    except RecursionError as error:
        raise ConfigError(f"{where}: not JSON: nested too deep") from error
    except ValueError as error:
        raise ConfigError(f"{where}: not JSON: {error}") from error
    require(isinstance(value, dict), f"{where}: expected an object, got {value!r:.60}")
    return value


def _text(value: Mapping, key: str, where: str, compose: bool = True) -> str:
    """Returns a text field, "" where it is missing or null. Raises ConfigError.

    compose: write accents as one with their letters (NFC); not in paths, which are bytes.
    """
    found = value.get(key)
    require(
        found is None or isinstance(found, str),
        f"{where}: {key}: expected text, got {found!r:.60}",
    )
    found = well_formed(found or "").strip()
    found = unicodedata.normalize("NFC", found) if compose else found
    odd = [c for c in found if not c.isprintable() and not c.isspace() and ord(c) < 160]
    require(not odd, f"{where}: {key}: holds the control character {odd[:1]}")
    return found


def known_keys(value: Mapping, known: Iterable[str], where: str) -> None:
    """Raises ConfigError for the first key that is not known, naming the nearest one."""
    known = tuple(known)
    for key in value:
        if key not in known and not key.startswith("_"):  # such are people's own notes
            close = difflib.get_close_matches(key, known, 1)
            hint = f"; did you mean {close[0]}?" if close else f"; know {', '.join(known)}"
            raise ConfigError(f"{where}: unknown key {key!r:.60}{hint}")


def _check_dialogue(where: str, value: dict) -> bool:
    """Raises ConfigError unless a dialogue has its form, labels aside."""
    known_keys(value, DIALOGUE_KEYS, where)
    name = value.get("id")
    require(
        isinstance(name, str) and name.strip() == name != "" and name.isprintable(),
        f"{where}: id: expected text, got {name!r:.60}",
    )
    if value.get("split") is not None:
        one_of(f"{where}: split", value["split"], SPLITS)
    for key in ("client", "problem", "situation"):
        _text(value, key, where)
    said = value.get("utterances")
    require(isinstance(said, list), f"{where}: utterances: expected a list, got {said!r:.60}")
    require(bool(said), f"{where}: utterances: the dialogue is empty")
    for i, utterance in enumerate(said):
        at = f"{where}: utterance {i + 1}"
        require(isinstance(utterance, dict), f"{at}: expected an object, got {utterance!r:.60}")
        speaker = utterance.get("speaker")
        require(
            isinstance(speaker, str) and speaker.strip().lower() in SPEAKERS,
            f"{at}: speaker: expected client or therapist, got {speaker!r:.60}",
        )
    return True


def speaker_of(utterance: Mapping) -> str:
    return utterance["speaker"].strip().lower()


def _inferred_space(
    lines: Sequence[tuple[str, dict]], path: pathlib.Path, heard: bool
) -> LabelSpace:
    """Describes the labels that occur: every key of an utterance that is not part of the format.

    One of both speakers is two tasks, client_KEY and therapist_KEY.
    """
    found: dict[str, dict[str, set[str]]] = {speaker: {} for speaker in SPEAKERS}
    reply = False
    for where, value in lines:
        for i, said in enumerate(value["utterances"]):
            speaker = speaker_of(said)
            words = said.get("text") or (heard and said.get("media"))
            reply |= speaker != CLIENT and bool(words)
            for key, label in said.items():
                if key in SAID_KEYS or key.startswith("_") or label is None:
                    continue
                at = f"{where}: utterance {i + 1}: {key}"
                require(isinstance(label, str), f"{at}: expected text, got {label!r:.60}")
                if not label.strip():
                    continue
                if key not in found[speaker]:
                    _check_label_key(key, at)
                labels = found[speaker].setdefault(key, set())
                labels.add(unicodedata.normalize("NFC", label.strip()))
                require(
                    len(labels) <= MOST_LABELS,
                    f"{at}: more than {MOST_LABELS} different labels; describe the labels in "
                    f"{LABELS_FILE}",
                )
    tasks = {}
    for speaker, own in found.items():
        others = [keys for name, keys in found.items() if name != speaker]
        for key, labels in own.items():
            name = f"{speaker}_{key}" if any(key in keys for keys in others) else key
            require(name not in tasks, f"{path}: labels {key!r} and {name!r} would be one task")
            tasks[name] = (speaker, labels)
    require(bool(tasks), f"{path}: no utterance has a label; see docs/data.md for the format")
    return inferred(tasks, reply, path)


def _check_label_key(key: str, where: str) -> None:
    """Raises ConfigError for a key that cannot be a task's, or is like one of the format."""
    close = difflib.get_close_matches(key.lower(), SAID_KEYS, 1, cutoff=0.75)
    require(
        not close and re.fullmatch("[a-z][a-z0-9_]*", key) is not None,
        f"{where}: taken for a label, as all keys but {', '.join(SAID_KEYS)} are; expected "
        + (f"{close[0]}?" if close else "a name of lower-case letters, digits and _"),
    )


def _entry(value: dict, where: str, space: LabelSpace, problems: Problems) -> Entry | None:
    said = [
        problems.attempt(_utterance, utterance, f"{where}: utterance {i + 1}", space)
        for i, utterance in enumerate(value["utterances"])
    ]
    if None in said:
        return None
    dialogue = Dialogue(
        value["id"],
        tuple(said),
        _text(value, "problem", where),
        _text(value, "situation", where),
    )
    require(
        bool(samples_of(dialogue, space)),
        f"{where}: utterances: nothing to predict: expected "
        + (
            f"a therapist's utterance after a client's (without replies: \"reply\": false in "
            f"{LABELS_FILE})"
            if has_turns(space)
            else "a client's utterance with a label"
        ),
    )
    return Entry(dialogue, where, value.get("split") or "", client=_text(value, "client", where))


def _utterance(value: dict, where: str, space: LabelSpace) -> Utterance:
    speaker = speaker_of(value)
    names = [n for t in space.tasks for n in (t.name, t.key)]
    known_keys(value, dict.fromkeys((*SAID_KEYS, *names)), where)
    text, media = _text(value, "text", where), _text(value, "media", where, compose=False)
    require(bool(text or media), f"{where}: expected text or media")
    if media:
        _inside(media, f"{where}: media")
    start, end = (_seconds(value, key, where) for key in ("start", "end"))
    require(media != "" or start is end is None, f"{where}: start and end belong to media")
    require(end is None or end > (start or 0.0), f"{where}: end: expected after start, got {end}")
    labels = space.labels_of(value, speaker, where)
    clue = _text(value, "clue", where)
    return Utterance(speaker, text, labels, clue, 0, media, start or 0.0, end or 0.0)


def _inside(name: str, where: str) -> None:
    try:
        inside(pathlib.Path(), name)
    except MediaError as error:
        raise ConfigError(f"{where}: expected a path inside the folder, got {name!r}") from error


def _seconds(value: Mapping, key: str, where: str) -> float | None:
    found = value.get(key)
    require(
        found is None
        or (
            isinstance(found, int | float)
            and not isinstance(found, bool)
            and 0 <= found < LONGEST_SECONDS
        ),
        f"{where}: {key}: expected seconds from 0 on, got {found!r:.60}",
    )
    return None if found is None else float(found)


# ---- clips.csv -----------------------------------------------------------------------------------


def read_clips(
    path: pathlib.Path, space: LabelSpace | None, problems: Problems
) -> tuple[LabelSpace | None, list[Entry]]:
    """Reads single clips: file,label,split?,fold?,speaker?,text? with a header."""
    text = read_text(path)
    head = text.partition("\n")[0]
    delimiter = max(",;\t", key=head.count)  # as spreadsheets write it
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = [name.strip() for name in reader.fieldnames or ()]
    except csv.Error as error:
        raise ConfigError(f"{path} line 1: not CSV: {error}") from error
    twice = [name for name in header if name and header.count(name) > 1]
    require(not twice, f"{path} line 1: the column {twice[:1]} occurs twice")
    tasks = {"label": "label"} if space is None else {}
    for task in space.tasks if space else ():
        able = [task.name, task.key, *(["label"] if len(space.tasks) == 1 else [])]
        column = next((name for name in able if name in header), None)
        require(
            column is not None,
            f"{path} line 1: expected a column {able[-1]} for {task.name}, got {header}",
        )
        tasks[column] = task.name
    for column in ("file", *tasks):
        require(column in header, f"{path} line 1: expected a column {column}, got {header}")
    known_keys(dict.fromkeys(filter(None, header)), (*CLIP_COLUMNS, *tasks), f"{path} line 1")
    # Spreadsheets leave empty columns at the end.
    reader.fieldnames = [name or f"_{i}" for i, name in enumerate(header)]
    rows: list[tuple[str, dict]] = []
    try:
        for row in reader:
            where, extra = f"{path} line {reader.line_num}", row.pop(None, [])
            if any(extra) or None in row.values():
                count = len(extra) + sum(value is not None for value in row.values())
                problems.found.append(
                    f"{where}: expected {len(header)} fields, got {count}; a text with "
                    f"{delimiter!r} in it belongs in double quotes"
                )
            elif any(value.strip() for value in row.values()):
                rows.append((where, row))
    except csv.Error as error:
        raise ConfigError(f"{path} line {reader.line_num}: not CSV: {error}") from error
    if space is None:
        labels = {row["label"].strip() for _, row in rows} - {""}
        require(
            len(labels) <= MOST_LABELS,
            f"{path}: column label: more than {MOST_LABELS} different labels; describe the labels "
            f"in {LABELS_FILE}",
        )
        space = problems.attempt(inferred, {"label": (CLIENT, labels)}, False, path)
        if space is None:
            return None, []
    if space.reply or any(task.about != CLIENT for task in space.tasks):
        raise ConfigError(
            f"{path}: clips have neither replies nor labels of a therapist; {LABELS_FILE} needs "
            '"reply": false and tasks about the client'
        )
    entries = [problems.attempt(_clip, row, where, space, tasks) for where, row in rows]
    return space, [entry for entry in entries if entry is not None]


def _clip(row: dict, where: str, space: LabelSpace, names: Mapping[str, str]) -> Entry:
    file = _text(row, "file", where, compose=False)
    require(pathlib.PurePosixPath(file).name != "", f"{where}: file: expected a path")
    _inside(file, f"{where}: file")
    given = {task: _text(row, column, where) for column, task in names.items()}
    require(any(given.values()), f"{where}: {', '.join(names)}: expected a label")
    labels = space.labels_of(given, CLIENT, where)
    split, fold = _text(row, "split", where), _text(row, "fold", where)
    require(not (split and fold), f"{where}: expected split or fold, got both")
    if split:
        one_of(f"{where}: split", split, SPLITS)
    fold = fold.removesuffix(".0")  # as spreadsheets write it
    require(not fold or fold.isdecimal(), f"{where}: fold: expected a number, got {fold!r}")
    name = file.replace("\\", "/").removeprefix("./")
    name = str(pathlib.PurePosixPath(name).with_suffix(""))
    said = Utterance(CLIENT, _text(row, "text", where), labels, media=file)
    return Entry(Dialogue(name, (said,)), where, split, fold, _text(row, "speaker", where))
