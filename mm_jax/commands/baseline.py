"""Predicts with another language model, text only, for a row of the report (command `baseline`).

Asks a chat model at an OpenAI-compatible endpoint (--model, --base_url) or one in a transformers
folder (--transformers). It gets the ECoT prompt with the history written out, and its answer is
parsed like ours; a call that fails counts as failed. Writes CHECKPOINT/baselines/NAME.jsonl.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import pathlib
import re
from collections.abc import Callable

import jinja2
import tqdm

from mm_jax.commands.arguments import SPLITS, add_limit_arguments, limits, stopped
from mm_jax.config.errors import ConfigError, require
from mm_jax.config.load import read_config
from mm_jax.data.answers import answer_tasks, parse_answer
from mm_jax.data.datasets.common import SampleSource
from mm_jax.data.history import history_labels
from mm_jax.data.prompts import SYSTEM, chat_messages
from mm_jax.data.records import Sample
from mm_jax.data.tokenizer import added_tokens, plain_pieces
from mm_jax.evaluation.predictions import PredictionRow, row_of, write_predictions
from mm_jax.generation.predictor import Prediction
from mm_jax.rewards.calls import Cache, CallError, StopError, cache_key
from mm_jax.rewards.chat import Chat
from mm_jax.run.folder import record_command

CACHE_FILE = "baseline_cache.sqlite"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--checkpoint", required=True, type=pathlib.Path, help="run folder whose data set is asked")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", help="a chat model's pinned id")
    which.add_argument(
        "--transformers", type=pathlib.Path, help="folder of a causal language model"
    )
    add("--base_url", default="", help="of the endpoint (default: OpenAI's)")
    add(
        "--key_variable",
        help="environment variable of the key (default: OPENAI_API_KEY for OpenAI, else none)",
    )
    add("--name", help="of the row (default: the model's)")
    add("--history_labels", choices=("gold", "none"), default="gold", help="default: gold")
    add("--template", choices=sorted(SYSTEM), default="ecot", help="default: ecot")
    add("--split", choices=SPLITS, default="test")
    add("--limit", type=int, help="only the first N samples")
    add("--max_new_tokens", type=int, default=256)
    add("--batch_size", type=int, default=8, help="of --transformers")
    add_limit_arguments(parser)


def main(args: argparse.Namespace, overrides: list[str]) -> None:
    del overrides
    require(args.limit is None or args.limit > 0, "--limit: expected at least 1")
    config = read_config(args.checkpoint / "config.json")
    space = config.data.label_space
    source = SampleSource(config.data.folder, args.split, light=True)
    samples = [source[i] for i in range(len(source))[: args.limit]]
    prompts = [
        chat_messages(s, args.template, space, history_labels(s, args.history_labels))
        for s in samples
    ]
    with tqdm.tqdm(total=len(samples), desc="answers") as bar:
        if args.model:
            answers, note = asyncio.run(ask_endpoint(args, prompts, bar.update))
        else:
            answers, note = ask_transformers(args, prompts, bar.update), ""
    rows = [
        row(s, space, args.history_labels, answer)
        for s, answer in zip(samples, answers, strict=True)
    ]
    name = args.name or args.model or args.transformers.resolve().name
    name += "" if args.name or args.history_labels == "gold" else "_without_history_labels"
    lost = [a for a in answers if isinstance(a, CallError)]
    require(
        len(lost) < len(answers),
        f"baseline: {args.model} answered nothing, nothing is written: {lost[0] if lost else ''}",
    )
    folder = args.checkpoint / "baselines"
    folder.mkdir(exist_ok=True)
    out = folder / (re.sub(r"[^\w.\-]+", "_", name) + ".jsonl")
    write_predictions(out, rows)
    record_command(args.checkpoint, args.argv)
    failed = sum(r.outcome == "failed" for r in rows)
    whole = sum(r.status == "ok" for r in rows)
    print(f"{len(rows)} predictions in {out}: {whole} parsed, {failed} failed{note}")


def row(sample: Sample, space: str, regime: str, answer: str | CallError) -> PredictionRow:
    """Builds a prediction row from the model's answer, or from the reason why there is none."""
    if isinstance(answer, CallError):
        labels = dict.fromkeys(answer_tasks(space), "")
        found = Prediction(labels, "text", f"failed: {answer.reason}")
    else:
        parsed = parse_answer(answer, space)
        found = Prediction(parsed.labels, "text", parsed.status, parsed.response, answer)
    made = row_of(sample, found, space, "text", regime)
    return dataclasses.replace(made, finished=None, video_status=None, audio_status=None)


async def ask_endpoint(
    args: argparse.Namespace, prompts: list[list[dict]], progress: Callable[[int], None]
) -> tuple[list[str | CallError], str]:
    """Asks an endpoint for answers and prints what they cost. Known answers come from the cache, so
    that a repeated run asks only for those that failed."""
    cache = Cache(args.checkpoint / CACHE_FILE)
    variable = args.key_variable or ("" if args.base_url else "OPENAI_API_KEY")
    chat = Chat(args.model, args.base_url, variable, limits(args))

    async def ask(messages: list[dict]) -> str | CallError:
        key = cache_key(
            model=args.model,
            endpoint=chat.endpoint,
            messages=messages,
            max_new_tokens=args.max_new_tokens,
        )
        answer = cache.get(key)
        if answer is None:
            length = len(json.dumps(messages)) // 3 + args.max_new_tokens
            try:
                answer = await chat.ask(
                    lambda: messages, str, length, max_tokens=args.max_new_tokens
                )
            except CallError as error:
                answer = error
            else:
                cache.put(key, answer)
        progress(1)
        return answer

    try:
        answers = await asyncio.gather(*map(ask, prompts))
    except StopError as error:
        raise stopped(error) from error
    finally:
        await chat.close()
    calls = chat.calls
    note = f"; {calls.calls} calls, {calls.attempts} attempts, cost {calls.spend:.4f}"
    if calls.failed:
        note += f", failed attempts {dict(calls.failed)} {chat.complaints or ''}"
    if chat.forms.left_out:
        note += f"; asked without {', '.join(chat.forms.left_out)}, which the model refuses"
    return answers, note


def ask_transformers(
    args: argparse.Namespace, prompts: list[list[dict]], progress: Callable[[int], None]
) -> list[str]:
    """Generates greedy answers with a causal language model in a folder on disk."""
    import torch
    import transformers

    require(args.transformers.is_dir(), f"--transformers: {args.transformers} is not a folder")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.transformers)
        model = transformers.AutoModelForCausalLM.from_pretrained(args.transformers, dtype="auto")
    except (OSError, ValueError) as error:
        raise ConfigError(f"--transformers: {args.transformers}: {error}") from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device).eval()
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    encoded = [encode_chat(tokenizer, messages) for messages in prompts]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    answers = [""] * len(encoded)
    for start in range(0, len(order), args.batch_size):
        index = order[start : start + args.batch_size]
        padded = tokenizer.pad({"input_ids": [encoded[i] for i in index]}, return_tensors="pt")
        batch = padded.to(device)
        with torch.no_grad():
            tokens = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=args.max_new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
        new = tokens[:, batch["input_ids"].shape[1] :]
        for i, text in zip(
            index, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True
        ):
            answers[i] = text
        progress(len(index))
    return answers


def encode_chat(tokenizer, messages: list[dict]) -> list[int]:
    """Encodes a prompt: the template's special tokens count, those that people typed are text."""
    added = added_tokens(tokenizer.get_added_vocab())
    # Marks stand for what people said while the template is rendered.
    marks = [f"\ue000{i}\ue001" for i in range(len(messages))]
    marked = [m | {"content": mark} for m, mark in zip(messages, marks, strict=True)]
    said = {mark: m["content"].strip() for m, mark in zip(messages, marks, strict=True)}
    # Without such words all is encoded in one go: pieces may be encoded in other ways.
    plain = not any(added.search(text) for text in said.values())
    text, pieces = as_text(tokenizer, messages if plain else marked), []
    for part in [text] if plain else re.split("(" + "|".join(marks) + ")", text):
        pieces += plain_pieces(said[part], added) if part in said else [part]
    return [i for p in pieces if p for i in tokenizer(p, add_special_tokens=False)["input_ids"]]


def as_text(tokenizer, messages: list[dict]) -> str:
    """Renders the prompt with the model's chat template, or as plain text without one."""
    if tokenizer.chat_template:
        form = dict(tokenize=False, add_generation_prompt=True)
        try:
            return tokenizer.apply_chat_template(messages, **form)
        except jinja2.TemplateError:  # some templates have no system role
            text = "\n\n".join(m["content"] for m in messages)
            return tokenizer.apply_chat_template([{"role": "user", "content": text}], **form)
    return "\n\n".join(m["content"] for m in messages) + "\n"
