"""Writes items for annotators and reads their votes: an HTML page, CSV, or Label Studio."""

from __future__ import annotations

import csv
import io
import json
import pathlib
from collections.abc import Iterator

from mm_jax.config.errors import ConfigError, require
from mm_jax.config.files import parse_json, read_text, write_whole
from mm_jax.evaluation.agreement import CRITERIA, QUALIFICATION, TIE
from tools.annotation.training import training_items

PAGE = pathlib.Path(__file__).with_name("page.html")
QUESTIONS = {
    "Fluency": "reads like natural, clear speech",
    "Identification": "understands what the client feels and why",
    "Comfort": "would ease the client most",
    "Suggestions": "gives the most useful next step, if one is due",
    "Overall": "the best reply",
}
PAGE_TIE = "="  # how the page writes `agreement.TIE`


def write_page(path: pathlib.Path, mark: str, items: list[dict]) -> None:
    """Writes the annotation page with its items; `mark` identifies the study in the answers."""
    data = {
        "set": mark,
        "least_kappa": QUALIFICATION,
        "most": max(3, *(len(i["replies"]) for i in items)),
        "criteria": [{"name": c, "question": QUESTIONS[c]} for c in CRITERIA],
        "training": training_items(),
        "items": items,
    }
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    write_whole(path, PAGE.read_text(encoding="utf-8").replace("__DATA__", text))


def write_label_studio(folder: pathlib.Path, items: list[dict]) -> None:
    """Writes tasks and a labelling config for Label Studio."""
    most = max(len(i["replies"]) for i in items)
    letters = [chr(65 + i) for i in range(most)]
    tasks = [
        {
            "data": {
                "id": item["id"],
                "conversation": [
                    {"author": u["speaker"], "text": u["text"]} for u in item["context"]
                ],
                **dict(zip(letters, item["replies"], strict=False)),
            }
        }
        for item in items
    ]
    write_whole(folder / "label_studio.json", json.dumps(tasks, ensure_ascii=False, indent=1))
    replies = "\n".join(
        f'  <Header value="{x}"/><Text name="reply_{x}" value="${x}"/>' for x in letters
    )
    choices = "\n".join(
        f'  <Header value="{c}: {QUESTIONS[c]}"/>\n'
        f'  <Choices name="{c}" toName="conversation" choice="single" showInline="true" '
        'required="true">'
        + "".join(f'<Choice value="{x}"/>' for x in (*letters, TIE))
        + "</Choices>"
        for c in CRITERIA
    )
    config = (
        '<View>\n  <Paragraphs name="conversation" value="$conversation" nameKey="author" '
        f'textKey="text" layout="dialogue"/>\n{replies}\n{choices}\n</View>\n'
    )
    write_whole(folder / "label_studio_config.xml", config)


def write_csv(path: pathlib.Path, items: list[dict]) -> None:
    letters = [chr(65 + i) for i in range(max(len(i["replies"]) for i in items))]

    def cell(text: str) -> str:
        """Returns text that no spreadsheet takes for a formula."""
        return f"'{text}" if text[:1] in tuple("=+-@\t\r") else text

    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["item", "conversation", *letters, *CRITERIA])
        for item in items:
            talk = "\n".join(f"{u['speaker']}: {u['text']}" for u in item["context"])
            row = [item["id"], talk, *map(cell, item["replies"])]
            writer.writerow([*row, *[""] * len(CRITERIA)])


def shown(key: dict) -> dict[str, dict]:
    """Returns the items that annotators see: those whose replies are not all the same."""
    return {name: item for name, item in key["items"].items() if len(item["systems"]) > 1}


def read_annotations(path: pathlib.Path, key: dict, expected: dict) -> tuple[list[dict], int]:
    """Reads a file's finished records, and counts the unfinished ones.

    Raises ConfigError naming the line and what is wrong.
    """
    text = read_text(path)
    kinds = {".csv": csv_records, ".json": label_studio_records}
    read = kinds.get(path.suffix.lower(), page_records)
    finished, unfinished, seen = [], 0, set()
    for where, r in read(path, text, key):
        fields = {"set": str, "annotator": str, "item": str, "training": bool, "choices": dict}
        missing = sorted(f for f, kind in fields.items() if not isinstance(r.get(f), kind))
        require(not missing, f"{where}: missing or of another type: {missing}")
        require(
            isinstance(r.get("seconds", 0), (int, float)),
            f"{where}: seconds: expected a number, got {r.get('seconds')!r}",
        )
        require(
            r["set"] == key["set"],
            f"{where}: annotates set {r['set']}, this study is {key['set']}",
        )
        known = expected if r["training"] else shown(key)
        require(r["item"] in known, f"{where}: no item {r['item']!r} in this study")
        require(
            (r["annotator"], r["item"]) not in seen,
            f"{where}: {r['annotator']} has {r['item']} twice",
        )
        seen.add((r["annotator"], r["item"]))
        count = 3 if r["training"] else len(key["items"][r["item"]]["systems"])
        allowed = [*(chr(65 + i) for i in range(count)), PAGE_TIE]
        for c, letter in r["choices"].items():
            require(
                c in CRITERIA and letter in allowed,
                f"{where}: expected a choice of {allowed} by {CRITERIA}, got {c!r}: {letter!r}",
            )
        if len(r["choices"]) == len(CRITERIA):
            finished.append({"seconds": 0, **r})
        else:
            unfinished += 1
    return finished, unfinished


def page_records(path: pathlib.Path, text: str, key: dict) -> Iterator[tuple[str, dict]]:
    """Yields (where, record) of the annotation page's JSONL."""
    for n, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                record = parse_json(line)
            except ValueError as error:
                raise ConfigError(f"{path} line {n}: not JSON: {error}") from error
            require(isinstance(record, dict), f"{path} line {n}: expected an object")
            yield f"{path} line {n}", record


def csv_records(path: pathlib.Path, text: str, key: dict) -> Iterator[tuple[str, dict]]:
    """Yields (where, record) of a filled items.csv; the file's name is the annotator's.

    Spreadsheets save it with semicolons or tabs where the comma is the decimal sign.
    """
    header = text.split("\n", 1)[0]
    mark = max(",;\t", key=header.count)
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=mark))
    except csv.Error as error:
        raise ConfigError(f"{path}: not CSV: {error}") from error
    require(
        bool(rows) and {"item", *CRITERIA} <= set(rows[0]),
        f"{path}: expected the columns item, {', '.join(CRITERIA)}, got {header[:100]!r}",
    )
    for n, row in enumerate(rows, 1):
        choices = {c: (row.get(c) or "").strip() for c in CRITERIA}
        choices = {c: PAGE_TIE if x == TIE else x.upper() for c, x in choices.items() if x}
        common = {"set": key["set"], "annotator": path.stem, "training": False}
        yield f"{path} row {n}", {**common, "item": row.get("item"), "choices": choices}


def label_studio_records(path: pathlib.Path, text: str, key: dict) -> Iterator[tuple[str, dict]]:
    """Yields (where, record) of a JSON export of Label Studio."""
    try:
        tasks = parse_json(text)
        for n, task in enumerate(tasks, 1):
            for annotation in task["annotations"]:
                if annotation.get("was_cancelled"):  # the annotator skipped the task
                    continue
                given = {r["from_name"]: r["value"]["choices"][0] for r in annotation["result"]}
                choices = {c: PAGE_TIE if x == TIE else x for c, x in given.items()}
                who = annotation["completed_by"]
                who = (who.get("email") or who["id"]) if isinstance(who, dict) else who
                common = {"set": key["set"], "training": False, "choices": choices}
                yield (
                    f"{path} task {n}",
                    {
                        **common,
                        "annotator": str(who),
                        "item": task["data"]["id"],
                        "seconds": annotation.get("lead_time") or 0,
                    },
                )
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ConfigError(f"{path}: not an export of Label Studio: {error!r}") from error
