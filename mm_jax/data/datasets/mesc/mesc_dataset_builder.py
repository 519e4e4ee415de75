"""TFDS builder of MESC, from `MESC.csv` and `{train,val,test}.json` (spec section 1).

Text always, media where the user has the videos.
"""

from __future__ import annotations

import collections
import csv
import dataclasses
import functools
import io
import itertools
import pathlib
from collections.abc import Iterator

from mm_jax.config.files import read_json, read_text
from mm_jax.data.datasets import common
from mm_jax.data.datasets.common import DataError
from mm_jax.data.labels import built_in
from mm_jax.data.media import Clip, MediaError, inside, media_files
from mm_jax.data.records import (
    CLIENT,
    CLIENT_EMOTION,
    STRATEGY,
    THERAPIST,
    THERAPIST_EMOTION,
    Dialogue,
    Utterance,
    dialogue_samples,
    merge_turns,
)

COLUMNS = (
    "Utterance",
    "Speaker",
    "Emotion",
    "Strategy",
    "Dialogue_ID",
    "Utterance_ID",
    "Season",
    "Episode",
    "StartTime",
    "EndTime",
)
SPEAKERS = {"Client": CLIENT, "Therapist": THERAPIST}
EXPECTED_SAMPLES = {"train": 3721, "val": 445, "test": 454}
# Label counts of the test split (spec section 1).
EXPECTED_TEST_LABELS = {
    CLIENT_EMOTION: {
        "neutral": 184,
        "anger": 107,
        "depression": 100,
        "disgust": 31,
        "joy": 17,
        "sadness": 12,
        "fear": 3,
    },
    THERAPIST_EMOTION: {"neutral": 451, "sadness": 3},
    STRATEGY: {
        "open question": 165,
        "interpretation": 71,
        "restatement": 65,
        "communication skills": 49,
        "self-disclosure": 42,
        "approval": 28,
        "advisement": 12,
        "guiding the pace and depth of the conversation": 12,
        "structuring the therapy": 10,
    },
}


def parse_time(text: str) -> float:
    """Converts "HH:MM:SS,mmm" to seconds."""
    clock, _, milli = text.strip().partition(",")
    hours, minutes, seconds = (int(part) for part in clock.split(":"))
    return 3600 * hours + 60 * minutes + seconds + int(milli or 0) / 1000


def _fold(text: str) -> str:
    return " ".join(text.split()).casefold()


def _label(value: str, task: str, where: str) -> str:
    label, allowed = _fold(value), built_in("mesc")[task].labels
    if label not in allowed:
        raise DataError(f"{where}: expected one of {', '.join(allowed)}; got {value!r}")
    return label


def read_csv(path: pathlib.Path) -> dict[str, list[Utterance]]:
    """Maps each Dialogue_ID to its utterances, in order, with clean text. Raises DataError."""
    if not path.is_file():
        raise DataError(f"MESC: {path} does not exist; --raw must be the folder with MESC.csv")
    dialogues: dict[str, list[Utterance]] = collections.OrderedDict()
    with io.StringIO(read_text(path), newline="") as file:
        reader = csv.DictReader(file)
        missing = [c for c in COLUMNS if c not in (reader.fieldnames or ())]
        if missing:
            raise DataError(f"{path}: missing columns {missing}; got {reader.fieldnames}")
        for row in reader:
            where = f"{path} line {reader.line_num}"
            if row["Speaker"] not in SPEAKERS:
                raise DataError(
                    f"{where}: Speaker: expected {list(SPEAKERS)}, got {row['Speaker']!r}"
                )
            speaker = SPEAKERS[row["Speaker"]]
            emotion = CLIENT_EMOTION if speaker == CLIENT else THERAPIST_EMOTION
            labels = {emotion: _label(row["Emotion"], emotion, f"{where}: Emotion")}
            if speaker == THERAPIST:
                labels[STRATEGY] = _label(row["Strategy"], STRATEGY, f"{where}: Strategy")
            try:
                start, end = parse_time(row["StartTime"]), parse_time(row["EndTime"])
            except ValueError as error:
                raise DataError(
                    f"{where}: StartTime/EndTime: expected HH:MM:SS,mmm, got "
                    f"{row['StartTime']!r}, {row['EndTime']!r}"
                ) from error
            rows = dialogues.setdefault(row["Dialogue_ID"], [])
            if row["Utterance_ID"] != str(len(rows)):
                raise DataError(
                    f"{where}: Utterance_ID of dialogue {row['Dialogue_ID']}: expected "
                    f"{len(rows)}, got {row['Utterance_ID']!r}"
                )
            rows.append(
                Utterance(
                    speaker=speaker,
                    text=row["Utterance"].strip(),
                    labels=labels,
                    media=f"S{row['Season']}E{row['Episode']}",
                    start=start,
                    end=end,
                )
            )
    return dialogues


def _match(entry: dict, by_length: dict[int, list[str]], rows: dict[str, list[Utterance]]) -> str:
    said = entry["dialog"]
    hits = [
        key
        for key in by_length.get(len(said), ())
        if all(
            _fold(a["text"]).startswith(_fold(b.text)) for a, b in zip(said, rows[key], strict=True)
        )
    ]
    if len(hits) != 1:
        raise DataError(
            f"a dialogue of {len(said)} utterances starting {said[0]['text'][:60]!r} matches "
            f"{len(hits)} Dialogue_IDs of MESC.csv; expected exactly 1"
        )
    return hits[0]


def _clue(full: str, clean: str) -> str:
    return " ".join(" ".join(full.split())[len(" ".join(clean.split())) :].split())


def read_utterances(raw: pathlib.Path, split: str) -> list[Utterance]:
    """Lists every utterance, with its clue sentences, of a split that has a json file.

    For statistics. Raises DataError.
    """
    rows = read_csv(raw / "MESC.csv")
    by_length = collections.defaultdict(list)
    for key, utterances in rows.items():
        by_length[len(utterances)].append(key)
    return [
        dataclasses.replace(utterance, clue=_clue(said["text"], utterance.text))
        for key, entry in _read_entries(raw / f"{split}.json", by_length, rows).items()
        for utterance, said in zip(rows[key], entry["dialog"], strict=True)
    ]


def _read_entries(path: pathlib.Path, by_length, rows) -> dict[str, dict]:
    """Maps each Dialogue_ID to its entry in a split's json. Raises DataError."""
    listed = read_json(path)
    try:
        entries = {_match(entry, by_length, rows): entry for entry in listed}
    except (DataError, KeyError, TypeError) as error:
        raise DataError(f"{path}: {error}") from error
    if len(entries) != len(listed):
        raise DataError(f"{path}: two dialogues match the same Dialogue_ID")
    return entries


def read_splits(raw: pathlib.Path, clues: bool) -> dict[str, list[Dialogue]]:
    """Maps each split to its dialogues, with the csv's clean text.

    Problem type, situation and clue sentences exist only in the json files; if train.json is absent
    they are left out of every split, so that train and test prompts look alike.
    """
    rows = read_csv(raw / "MESC.csv")
    by_length = collections.defaultdict(list)
    for key, utterances in rows.items():
        by_length[len(utterances)].append(key)
    entries: dict[str, dict[str, dict]] = {}
    for split in ("val", "test", "train"):
        path = raw / f"{split}.json"
        if not path.is_file():
            if split != "train":
                raise DataError(f"MESC: {path} does not exist; it defines the {split} split")
            continue
        entries[split] = _read_entries(path, by_length, rows)
    both = set(entries["val"]) & set(entries["test"])
    if both:
        raise DataError(f"MESC: dialogues {sorted(both)} are in both val.json and test.json")
    with_train = "train" in entries
    if clues and not with_train:
        raise DataError(
            "MESC: clue sentences were asked for, but train.json, the only source of those of the "
            f"train split, is not in {raw}"
        )
    held_out = set(entries["val"]) | set(entries["test"])
    members = {
        "train": entries.get("train") or [key for key in rows if key not in held_out],
        "val": entries["val"],
        "test": entries["test"],
    }
    splits = {}
    for split, keys in members.items():
        splits[split] = []
        for key in keys:
            entry = entries[split][key] if with_train else None
            utterances = rows[key]
            if entry is not None and clues:
                utterances = [
                    dataclasses.replace(u, clue=_clue(said["text"], u.text))
                    for u, said in zip(utterances, entry["dialog"], strict=True)
                ]
            splits[split].append(
                Dialogue(
                    id=key,
                    utterances=tuple(utterances),
                    problem_type=_fold(entry["problem_type"]) if entry else "",
                    situation=" ".join(entry["situation"].split()) if entry else "",
                )
            )
    return splits


def check_counts(splits: dict[str, list[Dialogue]]) -> None:
    """Raises DataError unless sample and test-label counts are exactly those of the release."""
    problems = []
    for split, expected in EXPECTED_SAMPLES.items():
        got = sum(len(dialogue_samples(d)) for d in splits[split])
        if got != expected:
            problems.append(f"{split}: expected {expected} samples, got {got}")
    test = [s for d in splits["test"] for s in dialogue_samples(d)]
    for task, expected in EXPECTED_TEST_LABELS.items():
        got = dict(collections.Counter(s.target(task) for s in test))
        if got != expected:
            problems.append(f"test {task}: expected {expected}, got {got}")
    if problems:
        raise DataError(
            "MESC: the files are not the released data set (pass --no-check_counts to build a "
            "data set of another size on purpose):\n  " + "\n  ".join(problems)
        )


# ---- the builder ---------------------------------------------------------------------------------


def turn_clips(files: dict[str, pathlib.Path], dialogue: Dialogue, turn: int) -> list[Clip]:
    """Lists a turn's clips: `{Dialogue_ID}_{Utterance_ID}.*`, or cuts of `S{season}E{episode}.*`.

    `files`: `media_files` of the media folder. Raises MediaError("missing") if there is none at
    all, and for a name that leads out of the folder.
    """
    span = merge_turns(dialogue.utterances)[turn]
    clips, found = [], False
    for i in range(span.first, span.last + 1):
        utterance, name = dialogue.utterances[i], f"{dialogue.id}_{i}"
        found |= name in files or utterance.media in files
        for asked in (name, utterance.media):
            inside(pathlib.Path(), asked)
        if name in files:
            clips.append(Clip(files[name]))
        elif utterance.media in files:
            clips.append(Clip(files[utterance.media], utterance.start, utterance.end))
        else:
            clips.append(Clip(pathlib.Path(name)))  # does not exist, and is counted as missing
    if not found:
        raise MediaError("missing")
    return clips


class Builder(common.SampleBuilder):
    """MESC: 3,721 train / 445 val / 454 test therapist turns."""

    def splits(self):
        config = self.builder_config
        splits = read_splits(pathlib.Path(config.raw), clues=config.options["clues"])
        if config.options["check_counts"]:
            check_counts(splits)
        media = pathlib.Path(config.media) if config.media else None
        files = None if media is None else media_files(media)
        pending = {
            name: functools.partial(pending_samples, dialogues, files)
            for name, dialogues in splits.items()
        }
        if media is not None:
            common.require_input(
                itertools.chain.from_iterable(samples() for samples in pending.values()),
                media,
                "{Dialogue_ID}_{Utterance_ID}.mp4 (such as 12_0.mp4) or whole episodes "
                "S{Season}E{Episode}.mp4 (such as S1E3.mp4), or .mkv, .avi, ...",
            )
        return pending


def pending_samples(
    dialogues: list[Dialogue], files: dict[str, pathlib.Path] | None
) -> Iterator[common.Pending]:
    """Yields samples with the clips of their client turns; `files` None means text only."""
    for dialogue in dialogues:
        for sample in dialogue_samples(dialogue):
            if files is None:
                yield common.Pending(sample)
                continue
            try:
                clips = turn_clips(files, dialogue, sample.turn - 1)
            except MediaError as error:
                yield common.Pending(sample, status=error.reason)
            else:
                yield common.Pending(sample, clips=tuple(clips))
