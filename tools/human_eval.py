"""Runs a blind human comparison of systems' replies, from an offline page to a report.

    python tools/human_eval.py export --checkpoint RUN [--others FILE ...] --out STUDY
    python tools/human_eval.py import --study STUDY annotations_ann.jsonl annotations_ben.jsonl
    python tools/human_eval.py report --study STUDY --pair ann ben

export writes annotation.html (one file that works offline; send it to the annotators), the same
items for Label Studio and as CSV, and key.json, which says whose reply is whose: keep it to
yourself. import reads the downloads, checks them, and unblinds them; importing an annotator's file
again replaces their votes. Votes of annotators who did not qualify on the training items are not
counted. The filled CSV (named after its annotator) and Label Studio's JSON export can be imported
too; they hold no training items, so their annotators count only if --qualified names them. report
writes report.html, report.md and report.json.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import random
import secrets
import shutil
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from mm_jax.config.errors import ConfigError, require
from mm_jax.config.files import write_whole
from mm_jax.config.load import read_config
from mm_jax.data.datasets.common import DataError, SampleSource
from mm_jax.data.media import media_files
from mm_jax.evaluation import agreement
from mm_jax.evaluation.agreement import AND, CRITERIA, QUALIFICATION, TIE, Vote
from mm_jax.evaluation.predictions import (
    evenly_spread,
    file_hash,
    read_responses,
    row_names,
)
from mm_jax.evaluation.report.page import Page, Section, write_pages
from mm_jax.evaluation.report.tables import Table, number, share
from mm_jax.run.build import data_labels
from mm_jax.run.folder import timestamp
from tools.annotation.formats import (
    PAGE_TIE,
    read_annotations,
    write_csv,
    write_label_studio,
    write_page,
)
from tools.annotation.training import training_items

PLAYED = (".mp4", ".webm", ".m4v", ".mov", ".ogv")  # by browsers


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("export", help="write the annotation page").add_argument
    add("--checkpoint", required=True, type=pathlib.Path, help="run folder with predictions.jsonl")
    add("--others", type=pathlib.Path, nargs="*", default=[], help="predictions of other systems")
    add("--gold", action="store_true", help="include the gold reply as a system")
    add("--split", choices=("train", "val", "test"), default="test", help="what was predicted")
    add("--limit", type=int, default=50, help="items, evenly spread (default 50)")
    add("--turns", type=int, default=8, help="earlier utterances shown (default 8)")
    add(
        "--clips",
        type=pathlib.Path,
        help="folder of clips named after the samples (ID.mp4, .webm, ...), shown to annotators",
    )
    add("--seed", type=int, help="seed of the replies' order (default: a secret one, in key.json)")
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
    add(
        "--pair",
        nargs=2,
        metavar="NAME",
        help="the two annotators of every item (default: the two with the most items); a third "
        "and a fourth adjudicate",
    )
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
    space = data_labels(config.data.folder)
    files = [args.checkpoint / "predictions.jsonl", *args.others]
    own = args.checkpoint.resolve().name
    names = [own, *row_names(args.others, (own, "gold reply"))]
    systems, sources = {}, {}
    for file, name in zip(files, names, strict=True):
        rows = read_responses(file, by_id, space, f"split {args.split}")
        systems[name] = {r.id: r.response for r in rows}
        sources[name] = {
            "file": file.name,
            "sha256": file_hash(file),
            "modality": rows[0].modality_asked,
            "history_labels": rows[0].history_labels,
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
    if args.gold:  # one turn per dialogue: a later turn's context shows the earlier gold replies
        shared = list({by_id[i].dialogue_id: i for i in shared}.values())
    chosen = [by_id[name] for name in evenly_spread(shared, args.limit)]
    clips = {} if args.clips is None else media_files(args.clips, suffixes=PLAYED)
    # The page must not give away the order of the replies, so seed and mark are random.
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
        by_reply: dict[str, list[str]] = {}  # equal replies are one choice
        for system in order:
            by_reply.setdefault(systems[system][sample.id].strip(), []).append(system)
        item = {"id": name, "context": context, "replies": list(by_reply)}
        key[name] = {"sample": sample.id, "systems": [AND.join(n) for n in by_reply.values()]}
        if len(by_reply) > 1:  # else there is nothing to choose
            items.append(item | clip_of(args, name, sample.id, clips))
    same, some = len(key) - len(items), sum(AND in s for k in key.values() for s in k["systems"])
    require(
        bool(items),
        f"export: in all {same} items the replies of {list(systems)} are the same; nothing to "
        "compare",
    )
    mark = secrets.token_hex(6)
    args.out.mkdir(parents=True)
    for item in items:
        if "clip" in item:
            (args.out / "clips").mkdir(exist_ok=True)
            shutil.copyfile(clips[key[item["id"]]["sample"]], args.out / item["clip"])
    write_page(args.out / "annotation.html", mark, items)
    write_label_studio(args.out, items)
    write_csv(args.out / "items.csv", items)
    secret = {
        "set": mark,
        "date": timestamp(),
        "run": args.checkpoint.resolve().name,
        "split": args.split,
        "seed": seed,
        "systems": sources,
        "items": key,
    }
    write_whole(args.out / "key.json", json.dumps(secret, indent=1))
    if some:
        print(
            f"warning: {some} items have identical replies of several systems: these are merged "
            f"and tie with each other; {same} items have nothing to choose, are not shown, and "
            "count as ties",
            file=sys.stderr,
        )
    print(
        f"{len(items)} items of {len(systems)} systems in {args.out / 'annotation.html'}"
        + (" (send the folder clips along)" if clips else "")
        + "; key.json "
        "says whose reply is whose: do not send it along"
    )


def clip_of(
    args: argparse.Namespace, item: str, sample: str, clips: dict[str, pathlib.Path]
) -> dict[str, str]:
    """Returns where the page finds an item's clip: under a name that says nothing of the sample."""
    if args.clips is None:
        return {}
    require(
        sample in clips,
        f"--clips: {args.clips} has no video of sample {sample} that browsers play, such as "
        f"{sample}.mp4 ({', '.join(PLAYED)})",
    )
    return {"clip": f"clips/{item}{clips[sample].suffix.lower()}"}


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
    if before.is_file():  # keep the votes of other annotators, imported earlier
        kept = json.loads(before.read_text())["annotators"]
        old = [json.loads(x) for x in (args.study / "votes.jsonl").read_text().splitlines()]
        votes = [v for v in old if v["annotator"] not in summary] + votes
        summary = {**kept, **summary}
    found = {"set": key["set"], "date": timestamp(), "annotators": summary}
    write_whole(args.study / "votes.jsonl", "".join(json.dumps(v) + "\n" for v in votes))
    write_whole(before, json.dumps(found, indent=1))
    for name, own in summary.items():
        print(
            f"{name}: {own['items']} items, qualification kappa "
            f"{number(own['qualification_kappa'])}{'' if own['qualified'] else ': NOT QUALIFIED'}"
        )
    print(f"{len(votes)} votes in {args.study / 'votes.jsonl'}")


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
    alike = [name for name, item in key["items"].items() if len(item["systems"]) == 1]
    decided |= {(name, c): TIE for name in alike for c in CRITERIA}
    found = {
        "schema": "mm_jax.human_eval/1",
        "date": timestamp(),
        "study": {k: key[k] for k in ("set", "date", "run", "split", "seed", "systems")},
        "annotators": people,
        "pair": list(pair),
        "items": len(key["items"]),
        "identical": len(alike),
        "open": len(key["items"]) * len(CRITERIA) - sum(c is not None for c in decided.values()),
        "shares": agreement.best_of_shares(decided, systems),
        "win_rates": agreement.win_rates(decided, systems),
        "agreement": agreement.agreement(votes, pair if len(pair) == 2 else None),
    }
    write_whole(args.study / "report.json", json.dumps(found, indent=1))
    print(write_pages(args.study / "report", report_page(found, systems)))


def report_page(found: dict, systems: list[str]) -> Page:
    shares = [
        [c, str(own[TIE]["n"]), *(share(own[s]) for s in (*systems, TIE))]
        for c, own in found["shares"].items()
    ]
    wins = [
        [c, p["a"], p["b"], str(p["n"]), share(p)]
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
    what = (
        f"{found['items']} items of {study['run']}, split {study['split']}, blind, in random order "
        f"(seed {study['seed']}, set {study['set']}). Decided by {' and '.join(found['pair'])}; "
        "where they disagree, by a third and a fourth annotator; open: "
        f"{found['open']} of {found['items'] * len(CRITERIA)}. Percent, Wilson 95 % intervals."
        + (
            f" In {found['identical']} items all replies were the same: they were not shown, and "
            "count as ties."
            if found["identical"]
            else ""
        )
    )
    measures = ["Cohen's kappa of the pair", "Krippendorff's alpha", "Fleiss' kappa"]
    header = ["annotator", "items", "qualification kappa", "training attempts", "counted"]
    return Page(
        f"Human evaluation of {study['run']}, {study['split']} split, {found['date'][:10]}",
        [what],
        [
            Section(f"Best of {len(systems)}", Table(["criterion", "n", *systems, TIE], shares)),
            Section(
                "Win rates",
                "How often A was best where A or B was.",
                Table(["criterion", "A", "B", "n", "A's win rate"], wins),
            ),
            Section(
                "Agreement",
                "Before adjudication. Undefined where all votes are alike.",
                Table(["criterion", *measures], agreed),
            ),
            Section(
                "Annotators and sources",
                Table([*header, "median s", "file", "SHA-256"], people),
                Table(["system", "file", "SHA-256"], sources),
            ),
        ],
    )


if __name__ == "__main__":
    sys.exit(main())
