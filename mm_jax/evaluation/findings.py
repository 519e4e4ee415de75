"""The report's sections on what `study`, `judge` and `safety` found, where they were run."""

from __future__ import annotations

from collections.abc import Sequence

from mm_jax.evaluation import figures
from mm_jax.evaluation.blocks import Block, Heading, Note, Raw, Table, number, with_interval
from mm_jax.evaluation.figures import MODALITY_NAMES, TASK_NAMES
from mm_jax.rewards.judge import DIMENSIONS


def study_blocks(metrics: dict) -> list[Block]:
    """The matrix of modalities and history labels, and the swap tests (command `study`)."""
    study = metrics.get("study")
    if not study:
        return []
    tasks = study["tasks"]
    header = ["the model sees", "history labels", *(TASK_NAMES[t] for t in tasks)]
    rows = [
        [
            MODALITY_NAMES[cell["modality"]],
            cell["history_labels"],
            *(with_interval(cell[t]["mean"], cell[t]["interval"]) for t in tasks),
        ]
        for cell in study["matrix"]
    ]
    out: list[Block] = [
        Heading("Modalities and history"),
        Note(f"Accuracy with 95 % interval, split {study['split']}, n {study['n']}."),
        Table(header, rows),
    ]
    if study["swaps"]:
        header = ["swapped between samples", "n", "score", "own less swapped", "p"]
        swaps = [
            [name, str(t["n"]), f"{TASK_NAMES[task]}: {what}", f"{t['gain']:+.3f}", f"{t['p']:.4f}"]
            for name, tests in study["swaps"].items()
            for task, kinds in tests.items()
            for what, t in kinds.items()
        ]
        out += [
            Note(
                "Is a modality used? Every sample with its own input against the same with another "
                "sample's (permutation test; a small p says that its own one serves better). "
                "Gains: log-probability of the gold label in nats, and share of right labels."
            ),
            Table(header, swaps),
        ]
    return out


def judgement_blocks(metrics: dict) -> list[Block]:
    """Judges' ratings and pairwise verdicts (command `judge`)."""
    found = metrics.get("judgements")
    if not found:
        return []
    names = list(DIMENSIONS)
    out: list[Block] = [
        Heading("Language models as judges"),
        Note(
            f"Seven dimensions from 1 to 10, {found['n']} replies a system, {found['repeats']} "
            "ratings each, blind to the system and in random order; mean with bootstrap 95 % "
            f"interval over replies. Prompt {found['prompt']}, pair prompt {found['pair_prompt']}. "
            + reward_families(found["reward_judges"])
        ),
        *(Note(w, "warning") for w in found["warnings"]),
    ]
    rows: list[Sequence[str] | str] = []
    for judge in [*found["judges"], "median of the judges"]:
        rows.append(judge)
        for system, own in found["systems"].items():
            cells = own["by_judge"][judge] if judge in own["by_judge"] else own["median"]
            rows.append(
                [
                    system,
                    str(cells["overall"]["n"]),
                    *(
                        with_interval(cells[k]["mean"], cells[k]["interval"])
                        for k in (*names, "overall")
                    ),
                    number(cells["overall"].get("repeat_sd")),
                ]
            )
    out.append(Table(["system", "n", *names, "overall", "sd of repeats"], rows))
    values = {
        system: {k: own["median"][k] for k in names} for system, own in found["systems"].items()
    }
    out.append(Raw(figures.bars_figure(values, "Trust, median of the judges", "rating, 1 to 10")))
    if found["pairs"]:
        header = ["judge", "A", "B", "n", "A better", "tie", "B better", "judge torn"]
        header += ["A's win rate", "length-controlled"]
        pairs = [
            [
                p["judge"],
                p["a"],
                p["b"],
                *(str(p[k]) for k in ("n", "wins", "ties", "losses", "torn")),
                with_interval(p["win_rate"], p["interval"]),
                number(p["length_controlled"], 1),
            ]
            for p in found["pairs"]
        ]
        out += [
            Note(
                "Pairs: asked twice with the order swapped; a verdict counts where both agree, "
                "else the judge is torn and it is a tie. Win rate: wins and half of the ties, "
                "Wilson 95 % interval. Length-controlled: at equal length, by logistic regression."
            ),
            Table(header, pairs),
        ]
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
    header = ["judge", "family", "endpoint", "answered as", "calls", "lost", "failed attempts"]
    out.append(Table([*header, "tokens", "cost"], rows))
    decided = [
        [system, judge, counted(reasons)]
        for system, own in found["notes"].items()
        for judge, reasons in own.items()
        if reasons
    ]
    if decided:
        out += [
            Note("Ratings that failed (left out), or that a rule decided (1 in everything):"),
            Table(["system", "judge", "reason and number"], decided),
        ]
    return out


def reward_families(reward_judges: dict[str, str]) -> str:
    """Whose ratings were the reward, beside whom the judges must be read."""
    if not reward_judges:
        return "No judge's ratings were part of a reward."
    shown = ", ".join(f"{model} ({family})" for model, family in reward_judges.items())
    return f"The reward was judged by {shown}."


def counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {n}" for name, n in counts.items()) or "none"


def safety_blocks(metrics: dict) -> list[Block]:
    """What the authored set of prompts showed (command `safety`)."""
    found = metrics.get("safety")
    if not found:
        return []
    recall, alarms = (
        with_interval(found["screen"][k]["mean"], found["screen"][k]["interval"])
        for k in ("recall", "false_alarms")
    )
    rows = [
        [
            kind,
            str(k["n"]),
            str(k["flagged"]),
            *(str(k[x]) for x in ("referral", "harmful", "empty")),
        ]
        for kind, k in found["kinds"].items()
    ]
    return [
        Heading("Safety"),
        Note(
            f"{found['n']} authored prompts ({found['set']}). A transparent screen of plain "
            f"wordings finds {recall} % of the prompts that need attention and raises a false "
            f"alarm for {alarms} % of the others. Its authors are the prompts'; it is no clinical "
            "instrument, and no clinical claim follows from it."
        ),
        Table(
            [
                "kind of prompt",
                "n",
                "screen flags",
                "reply refers to help",
                "reply harmful",
                "empty",
            ],
            rows,
        ),
    ]
