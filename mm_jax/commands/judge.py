"""judge: language models rate and compare replies; writes judgements.json for the report.

Rated are the run's main system, the models in `baselines/`, --others, the gold replies and a
constant reply. Every --judge is MODEL or MODEL@BASE_URL of an OpenAI-compatible endpoint.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import pathlib

import numpy as np
import tqdm

from mm_jax.commands.evaluate import read_groups
from mm_jax.config import ConfigError, read_config, require
from mm_jax.data.datasets.common import SampleSource
from mm_jax.evaluation.baselines import CONSTANT_REPLY
from mm_jax.evaluation.blocks import write_whole
from mm_jax.evaluation.judges import (
    PAIR_VERSION,
    compare_all,
    family,
    family_warnings,
    rate_all,
    rating_summary,
)
from mm_jax.evaluation.report import best_system
from mm_jax.rewards.build import reward_weights
from mm_jax.rewards.cache import Cache
from mm_jax.rewards.calls import Limits, SpendCapError
from mm_jax.rewards.judge import DIMENSIONS, PROMPT_VERSION, JudgeConfig, TrustJudge
from mm_jax.session import record_command

SCHEMA = "mm_jax.judgements/1"
CACHE_FILE = "judge_cache.sqlite"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--checkpoint", required=True, type=pathlib.Path, help="run folder with predictions.jsonl")
    add(
        "--judge",
        required=True,
        action="append",
        metavar="MODEL[@BASE_URL]",
        help="a pinned model id; give it several times for several judges",
    )
    add("--others", type=pathlib.Path, nargs="*", help="default: CHECKPOINT/baselines/*.jsonl")
    add("--split", choices=("train", "val", "test"), default="test", help="what was predicted")
    add("--limit", type=int, default=100, help="samples, evenly spread (default 100)")
    add("--repeats", type=int, default=2, help="ratings of a reply (default 2)")
    add("--temperature", type=float, default=0.0, help="of the ratings (default 0)")
    add("--pairs", action=argparse.BooleanOptionalAction, default=True, help="compare pairs too")
    add_limit_arguments(parser)


def add_limit_arguments(parser: argparse.ArgumentParser) -> None:
    """How hard and at what cost an endpoint may be asked."""
    add = parser.add_argument
    add("--key_variable", default="OPENAI_API_KEY", help="environment variable of the key")
    add("--concurrency", type=int, default=16)
    add("--requests_per_minute", type=float, default=0.0, help="0: no limit")
    add("--price_in", type=float, default=0.0, help="of a million prompt tokens")
    add("--price_out", type=float, default=0.0, help="of a million answer tokens")
    add("--spend_cap", type=float, default=0.0, help="stop there; 0: no cap")


def limits(args: argparse.Namespace) -> Limits:
    names = ("concurrency", "requests_per_minute", "price_in", "price_out", "spend_cap")
    return Limits(**{name: vars(args)[name] for name in names})


def main(args: argparse.Namespace, overrides: list[str]) -> None:
    del overrides
    require(args.limit > 0, f"--limit: expected at least 1, got {args.limit}")
    require(args.repeats > 0, f"--repeats: expected at least 1, got {args.repeats}")
    config = read_config(args.checkpoint / "config.json")
    by_id = {s.id: s for s in SampleSource(config.data.folder, args.split, light=True)}
    systems = read_systems(args, by_id, f"split {args.split} of {config.data.folder}")
    shared = [i for i in by_id if all(i in replies for replies in systems.values())]
    count = min(args.limit, len(shared))
    samples = [by_id[shared[i * len(shared) // count]] for i in range(count)]
    texts = {name: [replies[s.id] for s in samples] for name, replies in systems.items()}
    cache = Cache(args.checkpoint / CACHE_FILE)
    judges = {}
    for text in args.judge:
        model, _, url = text.partition("@")
        require(model not in judges, f"--judge: {model} is given twice")
        settings = JudgeConfig(
            model=model,
            base_url=url,
            key_variable=args.key_variable,
            unit="response",
            temperature=args.temperature,
        )
        judges[model] = TrustJudge(settings, limits(args), cache)
    record_command(args.checkpoint, args.argv)
    ratings, pairs = asyncio.run(ask(judges, samples, texts, args.repeats, args.pairs))
    reward = config.reward
    taught = [j.model for j in (reward.judge, reward.second_judge) if j.model]
    if "trust" not in reward_weights(reward) or not any(
        config.stage[name].objective in ("grpo", "ppo") for name in config.stages
    ):
        taught = []
    found = {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "split": args.split,
        "n": count,
        "repeats": args.repeats,
        "temperature": args.temperature,
        "prompt": PROMPT_VERSION,
        "pair_prompt": PAIR_VERSION,
        "reward_judges": taught,
        "warnings": family_warnings(list(judges), taught),
        "judges": {name: judge_entry(name, judge) for name, judge in judges.items()},
        "systems": {
            system: {
                "by_judge": {name: rating_summary(own) for name, own in by_judge.items()},
                "median": rating_summary(np.median(np.stack(list(by_judge.values())), axis=0)),
            }
            for system, by_judge in ratings.items()
        },
        "pairs": pairs,
    }
    out = args.checkpoint / "judgements.json"
    write_whole(out, json.dumps(found, indent=1))
    print_summary(found)
    print(f"judgements in {out}; `evaluate` puts them into the report")


def read_systems(args, by_id: dict, where: str) -> dict[str, dict[str, str]]:
    """system -> sample id -> reply; the run's own first."""
    groups = read_groups(args.checkpoint / "predictions.jsonl", by_id, where, partial=True)
    entries = [{"modality": m, "history_labels": r} for m, r in groups]
    best = best_system({"systems": entries})
    rows = groups[best["modality"], best["history_labels"]]
    require("response" in rows[0]["gold"], "judge: these predictions have no replies")
    systems = {"this model": rows}
    others = args.others
    if others is None:
        others = sorted((args.checkpoint / "baselines").glob("*.jsonl"))
    for path in others:
        rows = next(iter(read_groups(path, by_id, where, partial=True).values()))
        systems[path.stem] = rows
    found = {
        name: {r["id"]: r["predicted"].get("response") or "" for r in rows}
        for name, rows in systems.items()
    }
    found["gold reply"] = {s.id: s.response for s in by_id.values()}
    found["constant reply"] = dict.fromkeys(by_id, CONSTANT_REPLY)
    return found


async def ask(judges, samples, texts, repeats: int, with_pairs: bool):
    """(ratings, pairs) of all judges."""
    total = len(judges) * len(samples) * (len(texts) * repeats + with_pairs * (len(texts) - 1))
    try:
        with tqdm.tqdm(total=total, desc="judging") as bar:
            ratings = await rate_all(judges, samples, texts, repeats, progress=bar.update)
            pairs = []
            if with_pairs:
                pairs = await compare_all(judges, samples, texts, progress=bar.update)
    except SpendCapError as error:
        raise ConfigError(
            f"--spend_cap: {error}; answers so far are kept and cost nothing again"
        ) from error
    finally:
        for judge in judges.values():
            await judge.close()
    return ratings, pairs


def judge_entry(name: str, judge: TrustJudge) -> dict:
    calls = judge.chat.calls
    return {
        "family": family(name),
        "answered_as": sorted(judge.chat.answered_as) or ["(all from the cache)"],
        "calls": calls.calls,
        "failed": dict(calls.failed),
        "tokens_in": calls.tokens_in,
        "tokens_out": calls.tokens_out,
        "spend": calls.spend,
    }


def print_summary(found: dict) -> None:
    for warning in found["warnings"]:
        print(f"warning: {warning}")
    width = max(map(len, found["systems"]))
    print(f"{'median of the judges':<{width}}  overall  " + "  ".join(DIMENSIONS))
    for name, own in found["systems"].items():
        cells = own["median"]
        shown = "  ".join(f"{cells[d]['mean']:>{len(d)}.2f}" for d in DIMENSIONS)
        print(f"{name:<{width}}  {cells['overall']['mean']:>7.2f}  {shown}")
    for p in found["pairs"]:
        print(
            f"{p['judge']}: {p['a']} against {p['b']}: win rate {p['win_rate']:.1f} % "
            f"({p['interval'][0]:.1f} to {p['interval'][1]:.1f}, n {p['n']})"
        )
