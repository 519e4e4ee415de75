"""Reads and writes predictions.jsonl as typed rows; nothing else reads or writes the file."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from flax import nnx

from mm_jax.config.errors import ConfigError, require
from mm_jax.config.files import parse_json, read_text, well_formed, write_whole
from mm_jax.data.labels import LabelSpace
from mm_jax.data.prompts import MODALITIES
from mm_jax.data.records import Sample
from mm_jax.generation.predictor import Prediction, Predictor


@dataclasses.dataclass(frozen=True)
class PredictionRow:
    """Holds one line of predictions.jsonl, its fields in the file's order.

    gold and predicted: task (and "response") -> text, "" where unparseable; modality: what reached
    the model, of modality_asked; history_labels: the regime of past turns' labels. Fields that are
    None are left out of the file.
    """

    id: str
    dialogue_id: str | None = None
    turn: int | None = None
    label_space: str = ""
    modality: str = "text"
    modality_asked: str = "text"
    history_labels: str = ""
    gold: Mapping[str, str] = dataclasses.field(default_factory=dict)
    predicted: Mapping[str, str] = dataclasses.field(default_factory=dict)
    raw_text: str | None = None
    status: str = ""
    finished: bool | None = None
    video_status: str | None = None
    audio_status: str | None = None
    cue: str | None = None
    probabilities: Mapping[str, Mapping[str, float]] | None = None

    @property
    def system(self) -> tuple[str, str]:
        """Names the set of rows it belongs to: (modality asked, history labels)."""
        return self.modality_asked, self.history_labels

    @property
    def outcome(self) -> str:
        """Returns the status without details: scored, ok, unparseable, refused, failed, trivial."""
        return self.status.split(":")[0]

    @property
    def response(self) -> str:
        return self.predicted.get("response") or ""

    def label(self, task: str) -> str:
        return self.predicted.get(task) or ""

    def right(self, task: str) -> float:
        """Returns 1.0 where the label is right, else 0.0; NaN without a gold label."""
        gold = self.gold.get(task)
        return float(self.predicted.get(task) == gold) if gold else np.nan

    def distribution(self, task: str) -> Mapping[str, float]:
        """Returns label -> probability; empty where labels were not scored."""
        return (self.probabilities or {}).get(task) or {}

    def dump(self) -> dict:
        return {name: value for name, value in vars(self).items() if value is not None}


SAMPLE_FIELDS = ("id", "dialogue_id", "turn", "video_status", "audio_status")


def gold_of(sample: Sample, space: LabelSpace) -> dict[str, str]:
    """Returns the gold fields of a sample as its prediction holds them."""
    gold = {task: sample.target(task) for task in space.names}
    return gold | ({"response": sample.response} if space.reply else {})


def row_of(
    sample: Sample,
    prediction: Prediction,
    space: LabelSpace,
    modality_asked: str,
    history_labels: str,
) -> PredictionRow:
    """Builds the row of a sample's prediction."""
    reply = {"response": prediction.response} if space.reply else {}
    return PredictionRow(
        **{name: getattr(sample, name) for name in SAMPLE_FIELDS},
        label_space=space.name,
        modality=prediction.modality,
        modality_asked=modality_asked,
        history_labels=history_labels,
        gold=gold_of(sample, space),
        predicted=prediction.labels | reply,
        raw_text=prediction.text,
        status=prediction.status,
        finished=prediction.finished,
        cue=sample.cue or None,
        probabilities=prediction.probabilities,
    )


def predict_rows(
    predictor: Predictor,
    params: nnx.State,
    samples: Sequence[Sample],
    modality: str,
    regime: str,
    respond: bool = True,
    known: Mapping[str, Mapping[str, str]] | None = None,
    progress: Callable[[int], None] = lambda n: None,
) -> list[PredictionRow]:
    """Predicts samples as rows (see `Predictor.predict`)."""
    found = predictor.predict(params, samples, modality, regime, respond, known, progress)
    space = predictor.prompter.label_space
    return [row_of(s, p, space, modality, regime) for s, p in zip(samples, found, strict=True)]


# --- The file -----------------------------------------------------------------------------------

REQUIRED = ("id", "gold", "predicted", "label_space", "status")
REQUIRED += ("modality", "modality_asked", "history_labels")
CHOICES = {
    "modality_asked": MODALITIES,
    "modality": MODALITIES,
}
TYPES = {
    "id": str,
    "label_space": str,
    "dialogue_id": str,
    "turn": int,
    "history_labels": str,
    "gold": dict,
}
TYPES |= {"raw_text": str, "status": str, "finished": bool, "cue": str}
TYPES |= {"video_status": str, "audio_status": str}
SUM_TOLERANCE = 0.05  # of probabilities that were written with two digits
FIELDS = tuple(f.name for f in dataclasses.fields(PredictionRow))


def write_predictions(path: pathlib.Path, rows: Iterable[PredictionRow]) -> None:
    """Writes predictions.jsonl atomically."""
    lines = (well_formed(json.dumps(row.dump(), ensure_ascii=False)) + "\n" for row in rows)
    write_whole(path, "".join(lines))


def read_predictions(path: pathlib.Path, required: Sequence[str] = REQUIRED) -> list[PredictionRow]:
    """Reads predictions.jsonl; raises ConfigError naming the line and what is wrong with it.

    A predicted field that is not text becomes "" (unparseable); unknown fields are ignored.
    """
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            rows.append(parse_row(line, f"{path} line {number}", required))
    require(bool(rows), f"{path}: no predictions")
    return rows


def parse_row(line: str, where: str, required: Sequence[str] = REQUIRED) -> PredictionRow:
    """Parses one line; `where` names it in errors."""
    try:
        row = parse_json(line)
    except ValueError as error:
        raise ConfigError(f"{where}: not JSON: {error}") from error
    require(isinstance(row, dict), f"{where}: expected an object, got {line[:60]!r}")
    missing = [name for name in required if name not in row]
    require(not missing, f"{where}: missing fields {missing}")
    for name, allowed in CHOICES.items():
        require(
            name not in row or row[name] in allowed,
            f"{where}: {name}: expected one of {sorted(allowed)}, got {row.get(name)!r}",
        )
    known = {name: row[name] for name in FIELDS if row.get(name) is not None or name in required}
    for name, kind in TYPES.items():
        if name in known:
            value = known[name] = _well_formed(known[name])
            require(
                isinstance(value, kind) and isinstance(value, bool) == (kind is bool),
                f"{where}: {name}: expected {kind.__name__}, got {value!r}",
            )
    require(
        all(isinstance(v, str) for v in known.get("gold", {}).values()),
        f"{where}: gold: expected text for every task, got {known.get('gold')!r}",
    )
    given = known["predicted"] if isinstance(known.get("predicted"), dict) else {}
    known["predicted"] = {
        name: _well_formed(value) if isinstance(value, str) else "" for name, value in given.items()
    }
    if "probabilities" in known:
        _check_probabilities(known["probabilities"], where)
    return PredictionRow(**known)


def _well_formed(value: object) -> object:
    return well_formed(value) if isinstance(value, str) else value


def _check_probabilities(found: object, where: str) -> None:
    """Raises ConfigError unless `found` maps tasks to distributions."""
    where = f"{where}: probabilities"
    require(isinstance(found, dict), f"{where}: expected task -> label -> number, got {found!r}")
    for task, values in found.items():
        require(isinstance(values, dict), f"{where}: {task}: expected label -> number")
        for label, value in values.items():
            require(
                isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1,
                f"{where}: {task}: {label}: expected a number from 0 to 1, got {value!r}"
                + (" (per cent?)" if isinstance(value, int | float) and value > 1 else ""),
            )
        total = sum(values.values())
        require(
            not values or abs(total - 1) <= SUM_TOLERANCE,
            f"{where}: {task}: expected to add up to 1, got {total:.3f}",
        )


def file_hash(path: pathlib.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- Sets of rows -------------------------------------------------------------------------------

Groups = dict[tuple[str, str], list[PredictionRow]]


def read_groups(
    path: pathlib.Path,
    by_id: Mapping[str, Sample],
    space: LabelSpace,
    where: str,
    partial: bool,
) -> Groups:
    """Reads the rows by (modality, history labels), with the gold of the data set.

    Raises ConfigError where an id is unknown, occurs twice, or (unless `partial`) is missing, and
    where rows have another label space.
    """
    rows = read_predictions(path)
    for row in rows:
        at = f"{path}: id {row.id}"
        require(
            row.label_space == space.name,
            f"{at}: label_space: expected {space.name!r}, got {row.label_space!r}",
        )
        for task, values in (row.probabilities or {}).items():
            require(task in space.names, f"{at}: probabilities: unknown task {task!r}")
            odd = sorted(set(values) - set(space[task].labels))
            require(not odd, f"{at}: probabilities: {task}: unknown labels {odd[:3]}")
    unknown = sorted({r.id for r in rows} - set(by_id))
    require(
        not unknown,
        f"{path}: {len(unknown)} ids are not in {where}, such as {unknown[:3]}; pass --split or "
        "--data",
    )
    groups: Groups = {}
    for row in rows:
        true = gold_of(by_id[row.id], space)
        differing = sorted(k for k, v in row.gold.items() if k in true and v != true[k])
        require(
            not differing,
            f"{path}: id {row.id}: the gold {differing} are not those of {where}; another "
            "version of the data set?",
        )
        groups.setdefault(row.system, []).append(dataclasses.replace(row, gold=true))
    for (modality, regime), own in groups.items():
        ids = collections.Counter(r.id for r in own)
        twice = sorted(name for name, n in ids.items() if n > 1)
        what = f"{path} ({modality}, history labels {regime})"
        require(not twice, f"{what}: {len(twice)} ids occur twice, such as {twice[:3]}")
        missing = sorted(set(by_id) - set(ids))
        require(
            partial or not missing,
            f"{what}: {len(missing)} of {len(by_id)} ids of {where} are missing, such as "
            f"{missing[:3]}; pass --partial to evaluate the others",
        )
    return groups


def main_system(systems: Iterable[tuple[str, str]]) -> tuple[str, str]:
    """Chooses the system with the most modalities, the first of several."""
    return max(systems, key=lambda key: len(key[0].replace("text", "")))


def main_group(groups: Groups) -> list[PredictionRow]:
    return groups[main_system(groups)]


def read_responses(
    path: pathlib.Path, by_id: Mapping[str, Sample], space: LabelSpace, where: str
) -> list[PredictionRow]:
    """Reads the rows of a file's main system, which must hold responses."""
    rows = main_group(read_groups(path, by_id, space, where, partial=True))
    require(any(r.response for r in rows), f"{path}: these predictions have no replies")
    return rows


def other_files(run: pathlib.Path, given: Sequence[pathlib.Path] | None) -> list[pathlib.Path]:
    """Lists the predictions of other models: those given, or all in the run's `baselines/`."""
    return sorted((run / "baselines").glob("*.jsonl")) if given is None else list(given)


def row_names(paths: Sequence[pathlib.Path], reserved: Sequence[str] = ()) -> list[str]:
    """Names every file by its stem, or by its whole path where the stem is taken."""
    counts = collections.Counter([p.stem for p in paths])
    return [p.stem if counts[p.stem] == 1 and p.stem not in reserved else str(p) for p in paths]


def merge_shards(parts: Sequence[pathlib.Path], order: Sequence[str]) -> list[PredictionRow]:
    """Returns the rows of all shares as one process would have written them; deletes the shares.

    `order`: the sample ids of the split. Raises FileNotFoundError where a share is missing.
    """
    # A share of fewer dialogues than processes may be empty.
    rows = [row for part in parts if part.stat().st_size for row in read_predictions(part)]
    place = {name: i for i, name in enumerate(order)}
    systems = list(dict.fromkeys(row.system for row in rows))
    rows.sort(key=lambda row: (systems.index(row.system), place[row.id]))
    for part in parts:
        part.unlink(missing_ok=True)
    return rows


def evenly_spread(items: Sequence, count: int) -> list:
    """Returns at most `count` items, evenly spread."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]
