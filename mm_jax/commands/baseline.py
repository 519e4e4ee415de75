"""Predicts with another model, for a row of the report (command `baseline`).

Asks a chat model at an OpenAI-compatible endpoint (--model, --base_url), which may see and hear the
client (--media), or a language model in a transformers folder (--transformers), which only reads.
It gets the ECoT prompt with the history written out, and its answer is parsed like ours; a call
that fails counts as failed. Writes CHECKPOINT/baselines/NAME.jsonl.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import dataclasses
import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jinja2
import tqdm

from mm_jax.commands.arguments import SPLITS, add_limit_arguments, limits, stopped
from mm_jax.config.errors import ConfigError, require
from mm_jax.config.load import read_config
from mm_jax.data.answers import parse_answer
from mm_jax.data.content import frame_parts, sound_part, video_parts
from mm_jax.data.datasets.common import SampleSource
from mm_jax.data.datasets.request import clips_of
from mm_jax.data.history import history_labels
from mm_jax.data.labels import LabelSpace
from mm_jax.data.prompts import SYSTEM, chat_messages
from mm_jax.data.recording import Clip
from mm_jax.data.records import Sample
from mm_jax.data.tokenizer import AUDIO, VIDEO, added_tokens, plain_pieces
from mm_jax.evaluation.predictions import PredictionRow, row_of, write_predictions
from mm_jax.generation.predictor import Prediction
from mm_jax.rewards.calls import Cache, CallError, StopError, cache_key
from mm_jax.rewards.chat import Chat
from mm_jax.run.build import data_labels
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
    add(
        "--media",
        choices=tuple(MEDIA),
        help="what the endpoint gets of the client's clip: the frames that our model sees, the "
        "whole video, the sound, or frames and sound (default: nothing)",
    )
    add("--raw", type=pathlib.Path, help="as given to prepare; for video and sound")
    add("--clips", type=pathlib.Path, help="--media of prepare; for video and sound")
    add("--max_mb", type=float, default=20.0, help="largest request that is sent (default 20)")
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
    space = data_labels(config.data.folder)
    source = SampleSource(config.data.folder, args.split, light=True)
    samples = [source[i] for i in range(len(source))[: args.limit]]
    shown = [history_labels(s, args.history_labels) for s in samples]
    require(
        args.media not in (None, "frames") or not (args.raw or args.clips),
        "--raw and --clips belong to --media=video, audio or both",
    )
    media = Media.open(args, pathlib.Path(config.data.folder), samples) if args.media else None

    def prompt(i: int) -> Prompt:
        parts, modality, lacking = media.parts(i) if media else ({}, "text", [])
        messages = chat_messages(samples[i], args.template, space, shown[i], parts)
        return Prompt(messages, modality, lacking)

    with tqdm.tqdm(total=len(samples), desc="answers") as bar:
        if args.model:
            answers, note = asyncio.run(ask_endpoint(args, prompt, len(samples), bar.update))
        else:
            prompts = [prompt(i).messages for i in range(len(samples))]
            texts, note = ask_transformers(args, prompts, bar.update), ""
            answers = [(text, "text") for text in texts]
    asked = MEDIA[args.media] if args.media else "text"
    rows = [
        row(s, space, args.history_labels, asked, *answer)
        for s, answer in zip(samples, answers, strict=True)
    ]
    name = args.name or args.model or args.transformers.resolve().name
    name += f"_{args.media}" if args.media and not args.name else ""
    name += "" if args.name or args.history_labels == "gold" else "_without_history_labels"
    lost = [answer for answer, _ in answers if isinstance(answer, CallError)]
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


def row(
    sample: Sample,
    space: LabelSpace,
    regime: str,
    asked: str,
    answer: str | CallError,
    modality: str,
) -> PredictionRow:
    """Builds a prediction row from the model's answer, or from the reason why there is none."""
    if isinstance(answer, CallError):
        labels = dict.fromkeys(space.names, "")
        found = Prediction(labels, modality, f"failed: {answer.reason}")
    else:
        parsed = parse_answer(answer, space)
        found = Prediction(parsed.labels, modality, parsed.status, parsed.response, answer)
    made = row_of(sample, found, space, asked, regime)
    return dataclasses.replace(made, finished=None, video_status=None, audio_status=None)


# What an endpoint gets of a clip -> the modality of that name in `predict`.
MEDIA = {"frames": "v", "video": "av", "audio": "a", "both": "av"}
# Rough costs in tokens, until the service says what it counted.
FRAME_TOKENS, SECOND_TOKENS = 300, 300
MEDIA_TIMEOUT = 300.0  # seconds


class Prompt(NamedTuple):
    """A request; modality: what of the clip is in it; lacking: "video: REASON" or "audio: REASON"
    of what should be."""

    messages: list[dict]
    modality: str
    lacking: list[str]


@dataclasses.dataclass(frozen=True)
class Media:
    """What a model sees and hears of every sample."""

    kind: str
    samples: Sequence[Sample]
    source: SampleSource
    max_mb: float
    clips: Mapping[str, tuple[Clip, ...]]

    @classmethod
    def open(cls, args: argparse.Namespace, folder: pathlib.Path, samples: Sequence[Sample]):
        """Finds the clips. Raises ConfigError where there are none."""
        require(bool(args.model), "--media belongs to --model: folders of transformers only read")
        frames, clips = args.media in ("frames", "both"), {}
        require(
            not frames or any(len(s.frames) for s in samples),
            f"--media={args.media}: {folder} has no frames; build it with its clips",
        )
        if args.media != "frames":
            clips = clips_of(folder, args.split, args.raw, args.clips)
            require(
                any(clips.get(s.id) for s in samples),
                f"--media={args.media}: no clips are found; --raw and --clips say where they are",
            )
        source = SampleSource(folder, args.split, light=not frames)
        return cls(args.media, samples, source, args.max_mb, clips)

    def parts(self, i: int) -> tuple[dict[str, list[dict]], str, list[str]]:
        """Returns placeholder -> content parts of sample `i`, the modality they amount to, and what
        is lacking."""
        found: dict[str, list[dict]] = {}
        clips, lacking = self.clips.get(self.samples[i].id, ()), []
        heard = False
        if self.kind in ("audio", "both"):
            found[AUDIO], reasons = sound_part(clips)
            lacking += [f"audio: {reason}" for reason in reasons]
            heard = bool(found[AUDIO])
        if self.kind == "video":
            found[VIDEO], reasons, heard = video_parts(clips, round(self.max_mb * 1e6))
            lacking += [f"video: {reason}" for reason in reasons]
        elif self.kind != "audio":
            found[VIDEO] = frame_parts(self.source[i].frames)
            lacking += [] if found[VIDEO] else ["video: no frames"]
        found = {place: parts for place, parts in found.items() if parts}
        modality = "a" * heard + "v" * (VIDEO in found)
        return found, modality or "text", lacking


def tokens_of(messages: list[dict]) -> int:
    """Estimates the tokens of a prompt before it is sent."""
    count = 0
    for content in (m["content"] for m in messages):
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            match part["type"]:
                case "text":
                    count += len(json.dumps(part["text"])) // 3
                case "image_url":
                    count += FRAME_TOKENS
                case "input_audio":  # 16 kHz of 16 bits in base64
                    count += len(part["input_audio"]["data"]) * 3 // 4 // 32_000 * SECOND_TOKENS
                case "video_url":  # half a megabit a second
                    count += len(part["video_url"]["url"]) * 3 // 4 // 65_536 * SECOND_TOKENS
    return count


async def ask_endpoint(
    args: argparse.Namespace,
    prompt: Callable[[int], Prompt],
    count: int,
    progress: Callable[[int], None],
) -> tuple[list[tuple[str | CallError, str]], str]:
    """Asks an endpoint `count` prompts; returns (answer, modality) of each and what they cost.

    Known answers come from the cache, so that a repeated run asks only for those that failed.
    """
    cache = Cache(args.checkpoint / CACHE_FILE)
    variable = args.key_variable or ("" if args.base_url else "OPENAI_API_KEY")
    bounds = limits(args)
    if args.media:  # a video takes its time
        bounds = bounds.model_copy(update={"timeout": MEDIA_TIMEOUT})
    chat = Chat(args.model, args.base_url, variable, bounds)
    missing: collections.Counter[str] = collections.Counter()
    # So many prompts with their media are in memory.
    gate = asyncio.Semaphore(max(1, args.concurrency))

    async def ask(i: int) -> tuple[str | CallError, str]:
        async with gate:
            messages, modality, lacking = await asyncio.to_thread(prompt, i)
            missing.update(lacking)
            key = cache_key(
                model=args.model,
                endpoint=chat.endpoint,
                messages=messages,
                max_new_tokens=args.max_new_tokens,
            )
            answer = cache.get(key)
            if answer is None:
                answer = await fresh(messages, key)
            else:
                chat.takes_parts |= modality != "text"
        progress(1)
        return answer, modality

    async def fresh(messages: list[dict], key: str) -> str | CallError:
        size = len(json.dumps(messages)) / 1e6
        if size > args.max_mb:
            return CallError("too large", f"{size:.1f} MB, --max_mb is {args.max_mb:g}")
        length, failed = tokens_of(messages) + args.max_new_tokens, None
        try:
            answer = await chat.ask(lambda: messages, str, length, max_tokens=args.max_new_tokens)
        except CallError as error:
            failed = error.reason, str(error).removeprefix(f"{error.reason}: ")
        if failed:  # a new error: the one that was caught holds on to the request
            return CallError(*failed)
        cache.put(key, answer)
        return answer

    try:
        answers = await asyncio.gather(*map(ask, range(count)))
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
    if missing:
        note += f"; lacking in the files: {dict(sorted(missing.items()))}"
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
