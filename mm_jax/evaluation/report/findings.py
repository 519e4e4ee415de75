"""The sections on what `study`, `judge` and `safety` found; the commands print them too."""

from __future__ import annotations

from mm_jax.evaluation.report import figures
from mm_jax.evaluation.report.page import Note, Section
from mm_jax.evaluation.report.tables import Rows, Table, counted, number, share, with_interval
from mm_jax.evaluation.scores import MODALITY_NAMES, TASK_NAMES
from mm_jax.rewards.judge import DIMENSIONS


def study(found: dict) -> Section:
    """The matrix of modalities and history labels, and the swap tests (command `study`)."""
    tasks, rows = found["tasks"], []
    for cell in found["matrix"]:
        heading = f"{cell['history_labels']} history labels"
        rows.append((heading, [MODALITY_NAMES[cell["modality"]], *(share(cell[t]) for t in tasks)]))
    headings = list(dict.fromkeys(heading for heading, _ in rows))
    matrix: Rows = []
    for heading in headings:
        matrix += [heading, *(cells for own, cells in rows if own == heading)]
    parts = [
        f"Accuracy with 95 % interval, split {found['split']}, n {found['n']}.",
        Table(["the model sees", *(TASK_NAMES[t] for t in tasks)], matrix),
    ]
    swaps: Rows = []
    for name, tests in found["swaps"].items():
        swaps.append(f"{name} swapped between samples")
        swaps += [
            [f"{TASK_NAMES[task]}: {what}", str(t["n"]), f"{t['gain']:+.3f}", f"{t['p']:.4f}"]
            for task, kinds in tests.items()
            for what, t in kinds.items()
        ]
    if swaps:
        parts += [
            "Is a modality used? Every sample with its own input against the same sample with "
            "another one's (permutation test; a small p says that its own input serves better). "
            "Gain: own minus swapped, log-probability of the gold label in nats or share of right "
            "labels.",
            Table(["score", "n", "gain", "p"], swaps),
        ]
    return Section("Modalities and history", *parts)


def judgements(found: dict) -> Section:
    """Judges' ratings and pairwise verdicts (command `judge`)."""
    names = [*DIMENSIONS, "overall"]
    taught = ", ".join(f"{model} ({kin})" for model, kin in found["reward_judges"].items())
    what = (
        f"Seven dimensions from 1 to 10, {found['n']} replies per system, {found['repeats']} "
        "ratings each, blind to the system and in random order; mean with bootstrap 95 % interval "
        f"over replies. Prompt {found['prompt']}, pair prompt {found['pair_prompt']}. "
    )
    if taught:
        what += f"The reward was judged by {taught}."
    else:
        what += "No judge's ratings were part of a reward."
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
        what,
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
            "Pairs: asked twice with the order swapped; a verdict counts where both agree, else "
            "the judge is torn and it is a tie. Win rate: wins and half of the ties, Wilson 95 % "
            "interval. Length-controlled: at equal length, by logistic regression.",
            Table([*header, "A's win rate", "length-controlled"], rows),
        ]
    header = ["judge", "family", "endpoint", "answered as", "calls", "lost", "failed attempts"]
    rows = [
        [
            judge,
            j["family"],
            j["endpoint"],
            ", ".join(j["answered_as"]),
            str(j["calls"]),
            counted(j["lost"]),
            counted(j["failed"]),
            f"{j['tokens_in']} + {j['tokens_out']}",
            number(j["spend"], 4),
        ]
        for judge, j in found["judges"].items()
    ]
    parts.append(Table([*header, "tokens", "cost"], rows))
    decided = [
        [system, judge, counted(reasons)]
        for system, own in found["notes"].items()
        for judge, reasons in own.items()
        if reasons
    ]
    if decided:
        parts.append("Ratings that failed (left out), or that a rule decided (1 in everything):")
        parts.append(Table(["system", "judge", "reason and number"], decided))
    return Section("Language models as judges", *parts)


def safety(found: dict) -> Section:
    """What the authored set of prompts showed (command `safety`)."""
    fields = ("n", "flagged", "referral", "harmful", "empty")
    rows = [[kind, *(str(own[f]) for f in fields)] for kind, own in found["kinds"].items()]
    what = (
        f"{found['n']} authored prompts ({found['set']}). A transparent screen of plain wordings "
        f"finds {share(found['screen']['recall'])} % of the prompts that need attention and raises "
        f"a false alarm for {share(found['screen']['false_alarms'])} % of the others. Screen and "
        "prompts have the same authors; it is no clinical instrument, and no clinical claim "
        "follows from it."
    )
    header = ["kind of prompt", "n", "screen flags", "reply refers to help", "reply harmful"]
    return Section("Safety", what, Table([*header, "empty"], rows))
