"""People compare systems' replies, blind: an offline page out, votes in, a report with agreement.

    python tools/human_eval.py export --checkpoint RUN [--others FILE ...] --out STUDY
    python tools/human_eval.py import --study STUDY annotations_ann.jsonl annotations_ben.jsonl
    python tools/human_eval.py report --study STUDY --pair ann ben

export writes annotation.html (one file, works offline; send it to the annotators), the same items
for Label Studio and as CSV, and key.json, which says whose reply is whose: keep it to yourself.
import reads the downloads, checks them, and unblinds them; an annotator whose file is imported
again is replaced. Votes of annotators who did not qualify on the training items are not counted.
The filled CSV (named after its annotator) and Label Studio's JSON export can be imported too; they
hold no training items, so their annotators count where --qualified names them. report writes
report.html, report.md and report.json.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import pathlib
import random
import secrets
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from mm_jax.commands.evaluate import file_hash, main_group, read_groups, row_names
from mm_jax.config import ConfigError, read_config, require
from mm_jax.data.datasets.common import DataError, SampleSource
from mm_jax.evaluation import agreement
from mm_jax.evaluation.agreement import CRITERIA, QUALIFICATION, TIE, Vote
from mm_jax.evaluation.blocks import Heading, Note, Table, number, spread, write_pages, write_whole

PAGE = pathlib.Path(__file__).with_name("human_eval_page.html")
QUESTIONS = {
    "Fluency": "reads like natural, clear speech",
    "Identification": "understands what the client feels and why",
    "Comfort": "would ease the client most",
    "Suggestions": "gives the most useful next step, if one is due",
    "Overall": "the best reply",
}
PAGE_TIE = "="  # how the page writes `agreement.TIE`
# Training items: replies of plainly different worth, with the answers expected.
TRAINING = (
    (
        ["Therapist: How was the week?", "Client: My cat died on Monday. I keep looking for her."],
        [
            "Cats are cheap, buy another one.",
            "I am so sorry. You keep looking for her, as if she might still come in. Would it help "
            "to tell me about her?",
            "Week the was how cat Monday is is.",
        ],
        "BBBBB",
    ),
    (
        ["Client: I failed the exam again and I haven't told my parents."],
        [
            "It hurts to fail twice, and keeping it to yourself must weigh on you too. Shall we "
            "think about how you could tell them?",
            "You failed because you are lazy.",
            "Exam exam parents told the.",
        ],
        "AAAAA",
    ),
    (
        ["Client: Since the fight my sister does not answer. I think I was unfair to her."],
        [
            "Sister fight not does answer does.",
            "Sisters always come back, forget it.",
            "You miss her, and you wonder whether you hurt her. What would you want to say if she "
            "picked up, and could you write it to her?",
        ],
        "CCCCC",
    ),
    (
        ["Client: I can't sleep since the accident. I see the lights every night."],
        [
            "Just close your eyes.",
            "I night sleep lights the can't.",
            "Seeing those lights night after night sounds frightening and exhausting. We could "
            "look for something that helps you settle before bed; what have you tried?",
        ],
        "CCCCC",
    ),
    (
        ["Client: They promoted Jan instead of me. After all these years."],
        [
            "After so many years that must feel like a slap, as if your work went unseen. Would "
            "you like to plan how to ask your boss what was missing?",
            "Jan years years promoted promoted.",
            "Well, Jan is simply better than you.",
        ],
        "AAAAA",
    ),
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("export", help="write the annotation page").add_argument
    add("--checkpoint", required=True, type=pathlib.Path, help="run folder with predictions.jsonl")
    add("--others", type=pathlib.Path, nargs="*", default=[], help="predictions of other systems")
    add("--gold", action="store_true", help="the gold reply takes part as a system")
    add("--split", choices=("train", "val", "test"), default="test", help="what was predicted")
    add("--limit", type=int, default=50, help="items, evenly spread (default 50)")
    add("--turns", type=int, default=8, help="earlier utterances shown (default 8)")
    add("--seed", type=int, help="of the order of the replies (default: a secret one, in key.json)")
    add("--out", required=True, type=pathlib.Path, help="new folder of the study")
    add = commands.add_parser("import", help="read downloaded answers").add_argument
    add("--study", required=True, type=pathlib.Path, help="folder written by export")
    add("files", nargs="+", type=pathlib.Path, help="annotations_*.jsonl, or .csv, or .json")
    add(
        "--qualified",
        nargs="+",
        default=[],
        metavar="NAME",
        help="annotators whose qualification was checked elsewhere",
    )
    add = commands.add_parser("report", help="shares, win rates, agreement").add_argument
    add("--study", required=True, type=pathlib.Path, help="folder with votes.jsonl")
    add("--pair", nargs=2, metavar="NAME", help="the two annotators of every item (default: the "
        "two with the most items); a third and a fourth adjudicate")  # fmt: skip
    args = parser.parse_args(argv)
    try:
        {"export": export, "import": import_votes, "report": report}[args.command](args)
    except (ConfigError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def export(args: argparse.Namespace) -> None:
    require(args.limit > 0, f"--limit: expected at least 1, got {args.limit}")
    require(args.turns >= 0, f"--turns: expected at least 0, got {args.turns}")
    require(not args.out.exists(), f"--out: {args.out} exists")
    config = read_config(args.checkpoint / "config.json")
    by_id = {s.id: s for s in SampleSource(config.data.folder, args.split, light=True)}
    files = [args.checkpoint / "predictions.jsonl", *args.others]
    own = args.checkpoint.resolve().name
    names = [own, *row_names(args.others, (own, "gold reply"))]
    systems, sources = {}, {}
    for file, name in zip(files, names, strict=True):
        rows = main_group(read_groups(file, by_id, f"split {args.split}", partial=True))
        systems[name] = {r["id"]: r["predicted"].get("response") or "" for r in rows}
        require(any(systems[name].values()), f"{file}: these predictions have no replies")
        sources[name] = {
            "file": file.name,
            "sha256": file_hash(file),
            "modality": rows[0]["modality_asked"],
            "history_labels": rows[0]["history_labels"],
        }
    if args.gold:
        systems["gold reply"] = {s.id: s.response for s in by_id.values()}
        sources["gold reply"] = {"file": f"{args.split} split"}
    require(
        2 <= len(systems) <= 9,
        f"export: expected 2 to 9 systems, got {list(systems)}; add --others or --gold",
    )
    shared = [i for i in by_id if all(i in replies for replies in systems.values())]
    require(bool(shared), f"export: {list(systems)} have no sample in common")
    if args.gold:  # a later turn of a dialogue would show the gold reply of an earlier one
        shared = list({by_id[i].dialogue_id: i for i in shared}.values())
    count = min(args.limit, len(shared))
    chosen = [by_id[shared[i * len(shared) // count]] for i in range(count)]
    # Nothing in the page may tell the order of the replies: neither seed nor mark follow from it.
    seed = secrets.randbits(64) if args.seed is None else args.seed
    rng, items, key = random.Random(seed), [], {}
    for number_, sample in enumerate(chosen, 1):
        order = list(systems)
        rng.shuffle(order)
        name = f"item_{number_:03d}"
        context = [
            {"speaker": u.speaker.capitalize(), "text": u.text}
            for u in sample.history[max(0, len(sample.history) - args.turns) :]
        ]
        context.append({"speaker": "Client", "text": sample.client_text})
        replies = [systems[s][sample.id] for s in order]
        items.append({"id": name, "context": context, "replies": replies})
        key[name] = {"sample": sample.id, "systems": order}
    mark = secrets.token_hex(6)
    data = {
        "set": mark,
        "least_kappa": QUALIFICATION,
        "most": max(len(systems), 3),
        "criteria": [{"name": c, "question": QUESTIONS[c]} for c in CRITERIA],
        "training": training_items(),
        "items": items,
    }
    args.out.mkdir(parents=True)
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    write_whole(args.out / "annotation.html", PAGE.read_text().replace("__DATA__", text))
    write_label_studio(args.out, items)
    write_csv(args.out / "items.csv", items)
    secret = {
        "set": mark,
        "date": now(),
        "run": args.checkpoint.resolve().name,
        "split": args.split,
        "seed": seed,
        "systems": sources,
        "items": key,
    }
    write_whole(args.out / "key.json", json.dumps(secret, indent=1))
    print(
        f"{count} items of {len(systems)} systems in {args.out / 'annotation.html'}; key.json says "
        "whose reply is whose: do not send it along"
    )


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def training_items() -> list[dict]:
    items = []
    for i, (lines, replies, answers) in enumerate(TRAINING, 1):
        context = [dict(zip(("speaker", "text"), x.split(": ", 1), strict=True)) for x in lines]
        expected = dict(zip(CRITERIA, answers, strict=True))
        items.append(
            {"id": f"training_{i}", "context": context, "replies": replies, "expected": expected}
        )
    return items


def write_label_studio(folder: pathlib.Path, items: list[dict]) -> None:
    """Tasks and a labelling config for Label Studio."""
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
        """Text that no spreadsheet takes for a formula."""
        return f"'{text}" if text[:1] in tuple("=+-@\t\r") else text

    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["item", "conversation", *letters, *CRITERIA])
        for item in items:
            talk = "\n".join(f"{u['speaker']}: {u['text']}" for u in item["context"])
            row = [item["id"], talk, *map(cell, item["replies"])]
            writer.writerow([*row, *[""] * len(CRITERIA)])


def import_votes(args: argparse.Namespace) -> None:
    key = json.loads((args.study / "key.json").read_text())
    expected = {i["id"]: i["expected"] for i in training_items()}
    people: dict[str, dict] = {}
    for file in args.files:
        records, unfinished = read_annotations(file, key, expected)
        if unfinished:
            print(f"{file}: {unfinished} items are not finished and not counted")
        for record in records:
            own = people.setdefault(
                record["annotator"], {"file": file, "training": {}, "items": {}, "attempts": 1}
            )
            require(
                own["file"] == file,
                f"{file}: annotator {record['annotator']!r} is in {own['file']} too",
            )
            own["training" if record["training"] else "items"][record["item"]] = record
            own["attempts"] = record.get("attempts", 1)
    votes, summary = [], {}
    for name, own in sorted(people.items()):
        pairs = [
            (own["training"][i]["choices"][c], answer)
            for i, answers in expected.items()
            if i in own["training"]
            for c, answer in answers.items()
        ]
        whole = len(own["training"]) == len(expected)
        value = agreement.kappa(*zip(*pairs, strict=True)) if whole else None
        qualified = name in args.qualified or (value is not None and value > QUALIFICATION)
        summary[name] = {
            "file": own["file"].name,
            "sha256": file_hash(own["file"]),
            "items": len(own["items"]),
            "qualification_kappa": value,
            "training_attempts": own["attempts"],
            "qualified_elsewhere": name in args.qualified,
            "qualified": qualified,
            "median_seconds": median([r["seconds"] for r in own["items"].values()]),
        }
        for item, record in own["items"].items():
            order = key["items"][item]["systems"]
            for criterion, letter in record["choices"].items():
                choice = TIE if letter == PAGE_TIE else order[ord(letter) - 65]
                votes.append(
                    {
                        **Vote(name, item, criterion, choice)._asdict(),
                        "sample": key["items"][item]["sample"],
                        "qualified": qualified,
                    }
                )
    before = args.study / "annotators.json"
    if before.is_file():  # of other annotators, imported earlier
        kept = json.loads(before.read_text())["annotators"]
        old = [json.loads(x) for x in (args.study / "votes.jsonl").read_text().splitlines()]
        votes = [v for v in old if v["annotator"] not in summary] + votes
        summary = {**kept, **summary}
    found = {"set": key["set"], "date": now(), "annotators": summary}
    write_whole(args.study / "votes.jsonl", "".join(json.dumps(v) + "\n" for v in votes))
    write_whole(before, json.dumps(found, indent=1))
    for name, own in summary.items():
        print(
            f"{name}: {own['items']} items, qualification kappa "
            f"{number(own['qualification_kappa'])}{'' if own['qualified'] else ': NOT QUALIFIED'}"
        )
    print(f"{len(votes)} votes in {args.study / 'votes.jsonl'}")


def read_annotations(path: pathlib.Path, key: dict, expected: dict) -> tuple[list[dict], int]:
    """The finished records of a file, and how many are not. Raises ConfigError naming the line and
    what is wrong."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: expected UTF-8: {error}") from error
    read = {".csv": csv_records, ".json": label_studio_records}.get(path.suffix, page_records)
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
        known = expected if r["training"] else key["items"]
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


def page_records(path: pathlib.Path, text: str, key: dict):
    """(where, record) of the annotation page's JSONL."""
    for n, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ConfigError(f"{path} line {n}: not JSON: {error}") from error
            require(isinstance(record, dict), f"{path} line {n}: expected an object")
            yield f"{path} line {n}", record


def csv_records(path: pathlib.Path, text: str, key: dict):
    """(where, record) of a filled items.csv; the annotator is the file's name."""
    for n, row in enumerate(csv.DictReader(text.splitlines(keepends=True)), 1):
        choices = {c: (row.get(c) or "").strip() for c in CRITERIA}
        choices = {c: PAGE_TIE if x == TIE else x.upper() for c, x in choices.items() if x}
        common = {"set": key["set"], "annotator": path.stem, "training": False}
        yield f"{path} row {n}", {**common, "item": row.get("item"), "choices": choices}


def label_studio_records(path: pathlib.Path, text: str, key: dict):
    """(where, record) of a JSON export of Label Studio."""
    try:
        tasks = json.loads(text)
        for n, task in enumerate(tasks, 1):
            for annotation in task["annotations"]:
                given = {r["from_name"]: r["value"]["choices"][0] for r in annotation["result"]}
                choices = {c: PAGE_TIE if x == TIE else x for c, x in given.items()}
                common = {"set": key["set"], "training": False, "choices": choices}
                yield (
                    f"{path} task {n}",
                    {
                        **common,
                        "annotator": str(annotation["completed_by"]),
                        "item": task["data"]["id"],
                        "seconds": annotation.get("lead_time") or 0,
                    },
                )
    except (json.JSONDecodeError, KeyError, TypeError, IndexError) as error:
        raise ConfigError(f"{path}: not an export of Label Studio: {error!r}") from error


def median(values: list[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None


def report(args: argparse.Namespace) -> None:
    key = json.loads((args.study / "key.json").read_text())
    people = json.loads((args.study / "annotators.json").read_text())["annotators"]
    rows = [json.loads(x) for x in (args.study / "votes.jsonl").read_text().splitlines()]
    votes = [Vote(**{f: r[f] for f in Vote._fields}) for r in rows if r["qualified"]]
    require(bool(votes), "report: no vote of a qualified annotator")
    able = sorted(
        (name for name, p in people.items() if p["qualified"]), key=lambda n: -people[n]["items"]
    )
    pair = tuple(args.pair or able[:2])
    require(len(set(pair)) == len(pair), f"--pair: expected two annotators, got {pair[0]!r} twice")
    for name in pair:
        require(name in able, f"--pair: expected qualified annotators {able}, got {name!r}")
    order = [*pair, *(n for n in able if n not in pair)]
    systems = list(key["systems"])
    decided = agreement.adjudicate(votes, order)
    found = {
        "schema": "mm_jax.human_eval/1",
        "date": now(),
        "study": {k: key[k] for k in ("set", "date", "run", "split", "seed", "systems")},
        "annotators": people,
        "pair": list(pair),
        "items": len(key["items"]),
        "open": len(key["items"]) * len(CRITERIA) - sum(c is not None for c in decided.values()),
        "shares": agreement.best_of_shares(decided, systems),
        "win_rates": agreement.win_rates(decided, systems),
        "agreement": agreement.agreement(votes, pair if len(pair) == 2 else None),
    }
    write_whole(args.study / "report.json", json.dumps(found, indent=1))
    blocks = report_blocks(found, systems)
    print(write_pages(args.study / "report", "Human evaluation", blocks))


def shown(value: dict) -> str:
    if value["mean"] is None:
        return "–"
    return f"{value['mean']:.1f} ({spread(value['interval'])})"


def report_blocks(found: dict, systems: list[str]) -> list:
    shares = [
        [c, str(own[TIE]["n"]), *(shown(own[s]) for s in (*systems, TIE))]
        for c, own in found["shares"].items()
    ]
    wins = [
        [c, p["a"], p["b"], str(p["n"]), shown(p)]
        for c, pairs in found["win_rates"].items()
        for p in pairs
    ]
    agreed = [
        [
            c,
            *(
                f"{number(own[m][value])} (n {own[m]['n']})"
                for m, value in (("cohen", "kappa"), ("krippendorff", "alpha"), ("fleiss", "kappa"))
            ),
        ]
        for c, own in found["agreement"].items()
    ]
    people = [
        [
            name,
            str(p["items"]),
            number(p["qualification_kappa"]),
            str(p["training_attempts"]),
            ("yes, elsewhere" if p["qualified_elsewhere"] else "yes")
            if p["qualified"]
            else "no: not counted",
            number(p["median_seconds"], 0),
            p["file"],
            p["sha256"][:16],
        ]
        for name, p in found["annotators"].items()
    ]
    study = found["study"]
    sources = [[name, s["file"], s.get("sha256", "–")[:16]] for name, s in study["systems"].items()]
    return [
        Heading("Human evaluation", 1),
        Note(
            f"{found['items']} items of {study['run']}, split {study['split']}, blind, in random "
            f"order (seed {study['seed']}, set {study['set']}). Decided by "
            f"{' and '.join(found['pair'])}; where they disagree, by a third and a fourth "
            f"annotator; open: {found['open']} of {found['items'] * len(CRITERIA)}. Percent, "
            "Wilson 95 % intervals."
        ),
        Heading(f"Best of {len(systems)}"),
        Table(["criterion", "n", *systems, TIE], shares),
        Heading("Win rates"),
        Note("How often A was best where A or B was."),
        Table(["criterion", "A", "B", "n", "A's win rate"], wins),
        Heading("Agreement"),
        Note("Before adjudication. Undefined where all votes are alike."),
        Table(
            ["criterion", "Cohen's kappa of the pair", "Krippendorff's alpha", "Fleiss' kappa"],
            agreed,
        ),
        Heading("Annotators and sources"),
        Table(
            [
                "annotator",
                "items",
                "qualification kappa",
                "training attempts",
                "counted",
                "median s",
                "file",
                "SHA-256",
            ],
            people,
        ),
        Table(["system", "file", "SHA-256"], sources),
    ]


if __name__ == "__main__":
    sys.exit(main())
