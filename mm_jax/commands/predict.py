"""Predicts a split of the run's data set, or one client turn of the user's own files (`predict`).

python -m mm_jax predict --checkpoint RUN --split test --modality text av --history_labels gold
python -m mm_jax predict --checkpoint RUN --video FILE --text "..." [--history FILE]
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import sys
from collections.abc import Mapping

import tqdm

from mm_jax.commands.arguments import (
    SPLITS,
    add_run_arguments,
    add_safety,
    add_transcribing,
    open_run,
    read_history,
    split_samples,
)
from mm_jax.config.errors import ConfigError, prefixed, require
from mm_jax.config.schema import Config
from mm_jax.data.answers import cut_at_fields, format_answer
from mm_jax.data.conversation import check_readable, own_sample
from mm_jax.data.history import HISTORY_REGIMES
from mm_jax.data.media import MediaSpec
from mm_jax.data.prompts import MODALITIES, PromptError
from mm_jax.data.recording import Clip, MediaError
from mm_jax.data.records import Sample
from mm_jax.data.speech import Transcriber, Transcript, sound_of
from mm_jax.evaluation.care import Texts, danger_of
from mm_jax.evaluation.predictions import merge_shards, predict_rows, write_predictions
from mm_jax.generation.predictor import predictor_of
from mm_jax.run import build
from mm_jax.run.build import Run, dataset_name
from mm_jax.run.folder import record_command
from mm_jax.training.hosts import launcher


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser)
    split = parser.add_argument_group("a split of the data set")
    split.add_argument("--split", choices=SPLITS, help="default: test")
    split.add_argument(
        "--modality",
        nargs="+",
        choices=MODALITIES,
        help="besides text; several give several sets of rows (default: all that it can)",
    )
    split.add_argument(
        "--history_labels",
        nargs="+",
        choices=HISTORY_REGIMES,
        help="labels of past turns it sees (default: as in training)",
    )
    split.add_argument("--limit", type=int, help="only the first N samples")
    split.add_argument("--labels_only", action="store_true", help="do not decode responses")
    split.add_argument("--data", type=pathlib.Path, help="data set folder (default: the run's)")
    split.add_argument(
        "--shard",
        metavar="I/N",
        help="predict the I-th (from 0) of N shares of the dialogues; start N such processes, and "
        "the last to finish merges them (default: the share of a SLURM or Open MPI task)",
    )
    split.add_argument(
        "--out",
        type=pathlib.Path,
        help="default: CHECKPOINT/predictions.jsonl, with --limit=N predictions_first_N.jsonl",
    )
    own = parser.add_argument_group("one client turn of your own")
    own.add_argument("--video", type=pathlib.Path, help="video file; its sound is used too")
    own.add_argument("--audio", type=pathlib.Path, help="sound file (instead of the video's)")
    own.add_argument("--text", help="what the client says")
    add_transcribing(own, "write down what the client says in the sound, instead of --text")
    own.add_argument(
        "--history",
        type=pathlib.Path,
        help="earlier utterances: lines 'Client: ...' / 'Therapist: ...', or a JSON list of "
        '{"speaker", "text", "emotion", "strategy"}',
    )
    own.add_argument("--problem", help="the client's problem in a few words")
    own.add_argument("--situation", help="the client's situation in a sentence or two")
    add_safety(own)
    own.add_argument("--json", action="store_true", help="print the whole prediction as JSON")


OWN_MAX_TOKENS = 8192  # of a prompt, where data.max_length sets no limit
OF_SPLIT = ("split", "modality", "history_labels", "limit", "labels_only", "data", "shard", "out")
OWN = ("video", "audio", "text", "transcribe", "language")
OWN += ("history", "problem", "situation", "safety", "json")


def main(args: argparse.Namespace, overrides: list[str]) -> None:
    given = [name for name, value in vars(args).items() if value is not None and value is not False]
    own = [name for name in OWN if name in given]
    of_split = [name for name in OF_SPLIT if name in given]
    if own and of_split:
        raise ConfigError(
            f"--{of_split[0]} does not go with --{own[0]}: it belongs to the prediction of a split"
        )
    require(
        not own or bool(args.video or args.audio or args.text),
        "expected at least one of --video, --audio and --text",
    )
    require(not (args.transcribe and args.text), "--transcribe does not go with --text")
    require(bool(args.transcribe) or not args.language, "--language belongs to --transcribe")
    for override in overrides:
        require(
            override.startswith("predict."),
            f"--config.{override.split('=')[0]}: predict can override --config.predict.* only",
        )
    # First of all: on a GPU the model below takes most of the memory.
    words = transcribed(args) if args.transcribe else None
    run, spec, params = open_run(args.checkpoint, args.stage, args.step, overrides)
    if own:
        predict_one(args, run, spec, params, words)
    else:
        predict_split(args, run, params)
        record_command(args.checkpoint, args.argv)


def predict_split(args: argparse.Namespace, run: Run, params) -> None:
    config, split = run.config, args.split or "test"
    require(args.limit is None or args.limit > 0, f"--limit: expected at least 1, got {args.limit}")
    samples = split_samples(run, args.data, split, args.limit)
    shard, shards = parse_shard(args.shard or task_shard(os.environ))
    order = [s.id for s in samples]
    dialogues = {d: i for i, d in enumerate(dict.fromkeys(s.dialogue_id for s in samples))}
    samples = [s for s in samples if dialogues[s.dialogue_id] % shards == shard]
    regimes = args.history_labels or [config.data.history_labels]
    known = build.read_label_predictions(config.data.history_predictions)
    predictor, respond, rows = predictor_of(run, len(samples)), not args.labels_only, []
    for modality in dict.fromkeys(args.modality or [default_modality(config)]):
        for regime in dict.fromkeys(regimes):
            with tqdm.tqdm(total=len(samples), desc=f"{split} {modality} {regime}") as bar:
                rows += predict_rows(
                    predictor, params, samples, modality, regime, respond, known, bar.update
                )
    # A part of a split never replaces the whole.
    name = f"predictions_first_{args.limit}.jsonl" if args.limit else "predictions.jsonl"
    out = args.out or args.checkpoint / name
    if shards > 1:
        # All shares of one prediction carry the same hash of everything they depend on, so that
        # shares of different predictions are never merged.
        what = [str(args.data or config.data.folder), split, args.modality, regimes, args.limit]
        what += [args.stage, args.step, args.labels_only, config.predict.model_dump(), shards]
        mark = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:10]
        parts = [out.with_name(f"{out.name}.{mark}.{i}-of-{shards}") for i in range(shards)]
        write_predictions(parts[shard], rows)
        print(f"{len(rows)} predictions in {parts[shard]}")
        try:
            rows = merge_shards(parts, order)
        except FileNotFoundError:  # another share is still at work, or has merged them all
            return
    write_predictions(out, rows)
    refused = sum(r.outcome == "refused" for r in rows)
    print(f"{len(rows)} predictions in {out}" + (f", {refused} refused" if refused else ""))


def default_modality(config: Config) -> str:
    """Returns all that a model can read."""
    parts = config.model.parts
    return "a" * ("audio" in parts) + "v" * ("vision" in parts) or "text"


def parse_shard(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    index, count = (int(found[1]), int(found[2])) if found else (0, 0)
    require(index < count, f"--shard: expected I/N with 0 <= I < N, got {text!r}")
    return index, count


def task_shard(env: Mapping[str, str]) -> str:
    """Reads this process's share from its launcher's environment."""
    name = launcher(env)
    if name == "SLURM":
        return f"{env['SLURM_PROCID']}/{env['SLURM_NTASKS']}"
    if name == "Open MPI":
        return f"{env['OMPI_COMM_WORLD_RANK']}/{env['OMPI_COMM_WORLD_SIZE']}"
    return "0/1"


def transcribed(args: argparse.Namespace) -> Transcript:
    """Writes down what is said in the client's sound. Raises ConfigError."""
    kind, path = ("audio", args.audio) if args.audio else ("video", args.video)
    require(path is not None, "--transcribe: expected --video or --audio")
    try:
        sound = sound_of([Clip(path)])
    except MediaError as error:
        with prefixed("--", ""):
            check_readable(kind, path, error.reason)
        raise
    return Transcriber(args.transcribe, args.language or "")(sound)


def predict_one(
    args: argparse.Namespace, run: Run, spec: MediaSpec, params, words: Transcript | None
) -> None:
    space = run.prompter.label_space
    history = read_history(args.history, space) if args.history else ()
    with prefixed("--", ""):
        sample = own_sample(
            spec,
            text=words.text if words else args.text or "",
            video=args.video,
            audio=args.audio,
            history=history,
            problem=args.problem or "",
            situation=args.situation or "",
        )
    regime = "gold" if any(u.labels for u in sample.history) else "none"
    limit = run.prompter.max_length or OWN_MAX_TOKENS
    run = dataclasses.replace(run, prompter=dataclasses.replace(run.prompter, max_length=limit))
    (row,) = predict_rows(predictor_of(run, 1), params, [sample], "av", regime)
    if row.outcome == "refused":
        raise PromptError("refused", row.status)
    response = cut_at_fields(row.response, space)
    text = row.raw_text
    if response != row.response:
        text = format_answer(row.predicted, response, space)
    danger, notes = danger_of(sample.client_text, history), []
    crisis = Texts.load(args.safety).crisis
    if words and not words.text:
        notes.append("nothing is said in the sound")
    elif not sample.client_text and space.reply:
        notes.append("no words are given: --text says them, --transcribe writes them down")
    if sample.audio_status not in ("ok", "not requested"):
        notes.append(f"the sound is not used: {sample.audio_status}")
    if dataset_name(run.config) == "synthetic":
        notes.append(
            "this checkpoint was trained on synthetic clips and sentences alone: what it says of "
            "real people means nothing"
        )
    if args.json:
        found = row.dump() | {"seen": seen(sample, row.modality), "notes": notes}
        if words:
            found["transcript"] = dataclasses.asdict(words)
        if response != row.response:
            found |= {"predicted": row.predicted | {"response": response}, "raw_text": text}
        if danger:
            found["danger"] = {"kind": danger, "notice": crisis.format(danger=danger)}
        print(json.dumps(found, ensure_ascii=False, indent=1))
        return
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    if danger:
        print(f"[{crisis.format(danger=danger)}]")
    if words and words.text:
        print(f"[heard: {words.text}]")
    print(f"[the model saw: {', '.join(spoken(seen(sample, row.modality)))}]")
    print(text)
    for task, p in (row.probabilities or {}).items():
        best = sorted(p.items(), key=lambda kv: -kv[1])[:3]
        print(f"  {task}: " + ", ".join(f"{label} {value:.2f}" for label, value in best))


def seen(sample: Sample, modality: str) -> dict[str, float]:
    """Counts what of a sample reached the model."""
    return {
        "frames": len(sample.frames) if "v" in modality else 0,
        "seconds_of_sound": round(len(sample.fbank) / 100, 2) if modality in ("a", "av") else 0,
        "characters_of_text": len(sample.client_text),
        "earlier_utterances": len(sample.history),
    }


def spoken(found: dict[str, float]) -> list[str]:
    names = {"frames": "{} frames", "seconds_of_sound": "{:.1f} s of sound"}
    names |= {"characters_of_text": "text", "earlier_utterances": "{} earlier utterances"}
    return [names[key].format(value) for key, value in found.items() if value]
