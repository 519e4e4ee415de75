"""Lets language models rate and compare replies; writes judgements.json (command `judge`).

Rates the run's main system, the models in `baselines/` or --others, the gold replies and a constant
reply. Every --judge is MODEL (at OpenAI, key in OPENAI_API_KEY), MODEL@URL (an OpenAI-compatible
endpoint without a key) or MODEL@URL@VARIABLE (its key in that variable).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import pathlib
import re

import numpy as np
import tqdm

from mm_jax.commands.arguments import SPLITS, add_limit_arguments, limits, stopped
from mm_jax.config.errors import ConfigError, require
from mm_jax.config.files import write_whole
from mm_jax.config.load import read_config
from mm_jax.config.reward import Judge
from mm_jax.data.datasets.common import SampleSource
from mm_jax.data.labels import LabelSpace
from mm_jax.evaluation.evaluate import reinforced
from mm_jax.evaluation.judges import (
    PAIR_VERSION,
    compare_all,
    family,
    family_warnings,
    median_of,
    rate_all,
    rating_summary,
)
from mm_jax.evaluation.predictions import (
    evenly_spread,
    file_hash,
    other_files,
    read_responses,
    row_names,
)
from mm_jax.evaluation.report import findings
from mm_jax.evaluation.report.page import Page, as_text
from mm_jax.evaluation.systems import CONSTANT_REPLY
from mm_jax.rewards.calls import Cache, Ledger, StopError, cache_key
from mm_jax.rewards.judge import PROMPT_VERSION, TrustJudge
from mm_jax.run.build import data_labels
from mm_jax.run.folder import record_command, timestamp

SCHEMA = "mm_jax.judgements/1"
CACHE_FILE = "judge_cache.sqlite"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--checkpoint", required=True, type=pathlib.Path, help="run folder with predictions.jsonl")
    add(
        "--judge",
        required=True,
        action="append",
        metavar="MODEL[@URL[@VARIABLE]]",
        help="a pinned model id, its endpoint and the environment variable of its key; give it "
        "several times for several judges",
    )
    add("--others", type=pathlib.Path, nargs="*", help="default: CHECKPOINT/baselines/*.jsonl")
    add("--split", choices=SPLITS, default="test", help="what was predicted")
    add("--limit", type=int, default=100, help="samples, evenly spread (default 100)")
    add("--repeats", type=int, default=2, help="ratings of a reply (default 2)")
    add("--temperature", type=float, default=0.0, help="of the ratings (default 0)")
    add("--pairs", action=argparse.BooleanOptionalAction, default=True, help="compare pairs too")
    add_limit_arguments(parser)


def parse_judge(text: str, temperature: float = 0.0) -> Judge:
    """Parses MODEL[@URL[@VARIABLE]]; a model's name may itself hold an @."""
    found = re.fullmatch(r"(.+?)(?:@(https?://[^@]+)(?:@(\w+))?)?", text)
    require(found is not None, f"--judge: expected MODEL[@URL[@VARIABLE]], got {text!r}")
    model, url, variable = found[1], found[2] or "", found[3] or ""
    return Judge(
        model=model,
        base_url=url,
        # The default key is OpenAI's: no other endpoint gets it.
        key_variable=variable if url else "OPENAI_API_KEY",
        unit="response",
        temperature=temperature,
    )


def main(args: argparse.Namespace, overrides: list[str]) -> None:
    del overrides
    require(args.limit > 0, f"--limit: expected at least 1, got {args.limit}")
    require(args.repeats > 0, f"--repeats: expected at least 1, got {args.repeats}")
    config = read_config(args.checkpoint / "config.json")
    by_id = {s.id: s for s in SampleSource(config.data.folder, args.split, light=True)}
    space = data_labels(config.data.folder)
    where = f"split {args.split} of {config.data.folder}"
    systems = read_systems(args, by_id, space, where)
    shared = [i for i in by_id if all(i in replies for replies in systems.values())]
    require(bool(shared), f"judge: {list(systems)} have no sample in common")
    samples = [by_id[name] for name in evenly_spread(shared, args.limit)]
    texts = {name: [replies[s.id] for s in samples] for name, replies in systems.items()}
    cache, ledger = Cache(args.checkpoint / CACHE_FILE), Ledger()
    judges = {}
    for text in args.judge:
        settings = parse_judge(text, args.temperature)
        require(settings.model not in judges, f"--judge: {settings.model} is given twice")
        judges[settings.model] = TrustJudge(settings, limits(args), cache, ledger=ledger)
    ratings, notes, pairs = asyncio.run(ask(judges, samples, texts, args.repeats, args.pairs))
    for name, judge in judges.items():
        require(
            any(np.isfinite(own[name]).any() for own in ratings.values()),
            f"--judge: {name} rated nothing: {dict(judge.chat.calls.lost)} "
            f"{judge.chat.complaints or ''}".rstrip(),
        )
        own = [pair for pair in pairs if pair["judge"] == name]
        require(
            not own or any(pair["n"] for pair in own),
            f"--judge: {name} compared nothing: {dict(judge.chat.calls.lost)} "
            f"{judge.chat.complaints or ''} (--no-pairs leaves comparisons out; its ratings are "
            "kept and cost nothing again)",
        )
    reward = config.reward
    taught = [j.model for j in (reward.judge, reward.second_judge) if j.model]
    if "trust" not in reward.weights or not reinforced(config):
        taught = []
    found = {
        "schema": SCHEMA,
        "date": timestamp(),
        "split": args.split,
        "n": len(samples),
        "repeats": args.repeats,
        "temperature": args.temperature,
        "predictions_sha256": file_hash(args.checkpoint / "predictions.jsonl"),
        "prompt": PROMPT_VERSION,
        "pair_prompt": PAIR_VERSION,
        "reward_judges": {model: family(model) for model in taught},
        "warnings": family_warnings(list(judges), taught),
        "judges": {name: judge_entry(name, judge) for name, judge in judges.items()},
        "notes": notes,
        "systems": {
            system: {
                "by_judge": {name: rating_summary(own) for name, own in by_judge.items()},
                "median": rating_summary(median_of(list(by_judge.values()))),
            }
            for system, by_judge in ratings.items()
        },
        "pairs": pairs,
    }
    out = args.checkpoint / "judgements.json"
    write_whole(out, json.dumps(found, indent=1, allow_nan=False))
    record_command(args.checkpoint, args.argv)
    print(as_text(Page("", [], [findings.judgements(found)])))
    for name, judge in found["judges"].items():
        if judge["left_out"]:
            print(f"{name} refuses, and was asked without: {', '.join(judge['left_out'])}")
        if judge["lost"]:
            print(f"{name}: calls without an answer: {judge['lost']} {judge['complaints']}")
    print(f"judgements in {out}; `evaluate` puts them into the report")


def read_systems(args, by_id: dict, space: LabelSpace, where: str) -> dict[str, dict[str, str]]:
    """Reads the replies: system -> sample id -> reply, the run's own first."""
    others = other_files(args.checkpoint, args.others)
    names = row_names(others, ("this model", "gold reply", "constant reply"))
    files = {"this model": args.checkpoint / "predictions.jsonl"}
    files |= zip(names, others, strict=True)
    found: dict[str, dict[str, str]] = {}
    for name, path in files.items():
        try:
            found[name] = {r.id: r.response for r in read_responses(path, by_id, space, where)}
            lacking = sorted(set(found["this model"]) - set(found[name]))
            require(
                not lacking,
                f"{path}: {len(lacking)} of this model's {len(found['this model'])} samples are "
                f"missing, such as {lacking[:3]}",
            )
        except ConfigError as error:
            if args.others is not None or name == "this model":
                raise
            found.pop(name, None)
            print(f"left out: {error}")
    found["gold reply"] = {s.id: s.response for s in by_id.values()}
    found["constant reply"] = dict.fromkeys(by_id, CONSTANT_REPLY)
    return found


async def ask(judges, samples, texts, repeats: int, with_pairs: bool):
    """Asks all judges; returns (ratings, notes on them, pairs)."""
    total = len(judges) * len(samples) * (len(texts) * repeats + with_pairs * (len(texts) - 1))
    try:
        with tqdm.tqdm(total=total, desc="judging") as bar:
            ratings, notes = await rate_all(judges, samples, texts, repeats, progress=bar.update)
            pairs = []
            if with_pairs:
                pairs = await compare_all(judges, samples, texts, progress=bar.update)
    except StopError as error:
        raise stopped(error) from error
    finally:
        for judge in judges.values():
            await judge.close()
    return ratings, notes, pairs


def judge_entry(name: str, judge: TrustJudge) -> dict:
    chat = judge.chat
    # The cache also keeps which model gave the answers it holds.
    key = cache_key(answered_as=name, endpoint=chat.endpoint)
    answered = sorted({*(judge.cache.get(key) or []), *chat.answered_as})
    judge.cache.put(key, answered)
    calls = chat.calls
    return {
        "family": family(name),
        "endpoint": chat.endpoint,
        "answered_as": answered,
        "calls": calls.calls,
        "lost": dict(calls.lost),
        "failed": dict(calls.failed),
        "complaints": chat.complaints,
        "left_out": chat.forms.left_out,
        "tokens_in": calls.tokens_in,
        "tokens_out": calls.tokens_out,
        "spend": calls.spend,
    }
