"""Builds the sections on the results of `study`, `judge` and `safety`, which print them too."""

from __future__ import annotations

from mm_jax.evaluation.report import figures
from mm_jax.evaluation.report.page import Note, Section, words
from mm_jax.evaluation.report.tables import Rows, Table, counted, number, share, with_interval
from mm_jax.evaluation.scores import MODALITY_NAMES, titles
from mm_jax.rewards.judge import DIMENSIONS


def study(found: dict) -> Section:
    """Tabulates modalities and history labels, and the swap tests (command `study`)."""
    tasks, rows = titles(found["tasks"]), []
    for cell in found["matrix"]:
        heading = f"{cell['history_labels']} history labels"
        rows.append((heading, [MODALITY_NAMES[cell["modality"]], *(share(cell[t]) for t in tasks)]))
    headings = list(dict.fromkeys(heading for heading, _ in rows))
    matrix: Rows = []
    for heading in headings:
        matrix += [heading, *(cells for own, cells in rows if own == heading)]
    parts = [
        *words("study", found),
        Table(["the model sees", *tasks.values()], matrix),
    ]
    swaps: Rows = []
    for name, tests in found["swaps"].items():
        swaps.append(f"{name} swapped between dialogues")
        swaps += [
            [f"{tasks[task]}: {what}", str(t["n"]), f"{t['gain']:+.3f}", f"{t['p']:.4f}"]
            for task, kinds in tests.items()
            for what, t in kinds.items()
        ]
    if swaps:
        parts += [*words("swaps"), Table(["score", "n", "gain", "p"], swaps)]
    return Section("Modalities and history", *parts)


def judgements(found: dict) -> Section:
    """Tabulates judges' ratings and pairwise verdicts (command `judge`)."""
    names = [*DIMENSIONS, "overall"]
    ratings: Rows = []
    for judge in (*found["judges"], "median of the judges"):
        ratings.append(judge)
        for system, own in found["systems"].items():
            cells = own["by_judge"].get(judge, own["median"])
            overall = cells["overall"]
            scores = [share(cells[k]) for k in names]
            spread = number(overall.get("repeat_sd"))
            ratings.append([system, str(overall["n"]), *scores, spread])
    medians = {s: {k: own["median"][k] for k in DIMENSIONS} for s, own in found["systems"].items()}
    parts = [
        *words("judgements", found),
        *(Note(warning, "warning") for warning in found["warnings"]),
        Table(["system", "n", *names, "sd of repeats"], ratings),
        figures.ratings_figure(medians, "Trust, median of the judges"),
    ]
    if found["pairs"]:
        rows: Rows = []
        for judge in dict.fromkeys(p["judge"] for p in found["pairs"]):
            rows.append(judge)
            rows += [
                [
                    f"{p['a']} or {p['b']}",
                    *(str(p[k]) for k in ("n", "wins", "ties", "losses", "torn")),
                    with_interval(p["win_rate"], p["interval"]),
                    number(p["length_controlled"], 1),
                ]
                for p in found["pairs"]
                if p["judge"] == judge
            ]
        header = ["A or B", "n", "A better", "tie", "B better", "judge torn"]
        parts += [
            *words("pairs"),
            Table([*header, "A's win rate", "length-controlled"], rows),
        ]
    columns = {
        "family": lambda j: j["family"],
        "endpoint": lambda j: j["endpoint"],
        "answered as": lambda j: ", ".join(j["answered_as"]),
        "calls": lambda j: str(j["calls"]),
        "lost": lambda j: counted(j["lost"]),
        "failed attempts": lambda j: counted(j["failed"]),
        "tokens": lambda j: f"{j['tokens_in']} + {j['tokens_out']}",
        "cost": lambda j: number(j["spend"], 4),
    }
    rows = [[name, *(f(j) for f in columns.values())] for name, j in found["judges"].items()]
    parts.append(Table(["judge", *columns], rows))
    notes = [(s, j, why) for s, own in found["notes"].items() for j, why in own.items() if why]
    if notes:
        parts += words("decided")
        rows = [[system, judge, counted(reasons)] for system, judge, reasons in notes]
        parts.append(Table(["system", "judge", "reason and number"], rows))
    return Section("Language models as judges", *parts)


def safety(found: dict) -> Section:
    """Tabulates the results on the authored set of prompts (command `safety`)."""
    columns = {
        "n": "n",
        "screen flags": "flagged",
        "reply refers to help": "referral",
        "harmful": "harmful",
        "refuses": "refusal",
        "empty": "empty",
    }
    rows = [
        [kind, *(str(own[field]) for field in columns.values())]
        for kind, own in found["kinds"].items()
    ]
    return Section("Safety", *words("safety", found), Table(["kind of prompt", *columns], rows))
