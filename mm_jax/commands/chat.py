"""Talks with a run's model in the terminal (`chat`).

python -m mm_jax chat --checkpoint RUN
echo "I lost my job." | python -m mm_jax chat --checkpoint RUN
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib
import io
import json
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

from mm_jax.commands.arguments import add_run_arguments, add_safety, open_run, read_history
from mm_jax.config.errors import UserError, prefixed, require
from mm_jax.config.files import write_whole
from mm_jax.data.answers import cut_at_fields
from mm_jax.data.conversation import own_sample
from mm_jax.data.media import MediaSpec
from mm_jax.evaluation.care import Release, Texts, danger_of
from mm_jax.generation.live import Draft, Failure, Live, Turn
from mm_jax.generation.predictor import Prediction
from mm_jax.generation.talk import Conversation
from mm_jax.run.build import dataset_name

HELP = """\
/video FILE   show a clip with the next turn (its sound is heard too)
/mic          record the next turn's sound, until Enter
/audio FILE   let a sound be heard with the next turn, instead of the clip's
/send         send them without words
/history      what was said so far
/labels       show all labels with their probabilities, or only the likeliest
/undo         take the last turn and its reply back
/save FILE    write the conversation as JSON (--history reads it)
/quit         end"""


# Programs that record until they are interrupted, as 16-bit WAV at 16 kHz.
RECORDERS = (
    ("arecord", "-q", "-f", "S16_LE", "-r", "16000", "-c", "1"),
    ("parecord", "--file-format=wav", "--format=s16le", "--rate=16000", "--channels=1"),
    ("rec", "-q", "-b", "16", "-r", "16000", "-c", "1"),
)


def record(path: pathlib.Path) -> None:
    """Records a WAV file until Enter. Raises ConfigError."""
    found = next((command for command in RECORDERS if shutil.which(command[0])), None)
    require(found is not None, "/mic: no recorder is installed (arecord, parecord or sox's rec)")
    path.unlink(missing_ok=True)
    process = subprocess.Popen([*found, str(path)], stdin=subprocess.DEVNULL)
    try:
        print("[recording; Enter ends it]", flush=True)
        sys.stdin.readline()
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    require(path.is_file() and path.stat().st_size > 44, f"/mic: {found[0]} recorded nothing")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser)
    parser.add_argument(
        "--history", type=pathlib.Path, help="earlier utterances, as `predict --history` reads them"
    )
    add_safety(parser)
    parser.add_argument("--problem", default="", help="the client's problem in a few words")
    parser.add_argument("--situation", default="", help="the client's situation in a few words")


def main(args: argparse.Namespace, overrides: list[str]) -> None:
    for override in overrides:
        require(
            override.startswith("predict."),
            f"--config.{override.split('=')[0]}: chat can override --config.predict.* only",
        )
    texts = Texts.load(args.safety)
    run, spec, params = open_run(args.checkpoint, args.stage, args.step, overrides)
    space = run.prompter.label_space
    require(space.reply, f"--checkpoint: the model of {args.checkpoint} writes no replies")
    history = read_history(args.history, space) if args.history else ()
    conversation = Conversation(space, history, args.problem, args.situation)
    talk = Talk(Live(run, params, slots=1), conversation, spec, texts)
    print(texts.notice, file=sys.stderr)
    if dataset_name(run.config) == "synthetic":
        print(
            "It was trained on synthetic clips and sentences alone: what it says means nothing.",
            file=sys.stderr,
        )
    if sys.stdin.isatty():
        print("Type what the client says; /help lists the commands.", file=sys.stderr)
    with talk.recordings:
        for line in lines():
            try:
                if not talk.take(line.strip()):
                    break
            except UserError as error:  # of this line: the conversation goes on
                print(f"error: {error}", file=sys.stderr)
            except KeyboardInterrupt:
                talk.live.clear()
                print("\n[stopped]")


def lines() -> Iterator[str]:
    """Yields what is typed, with editing where the terminal allows it, or piped."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # bytes that are no text must not end the chat
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")  # `input` then edits and remembers lines
    while True:
        try:
            yield input("client> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return


class Talk:
    """Does what each line asks for."""

    def __init__(self, live: Live, conversation: Conversation, spec: MediaSpec, texts: Texts):
        self.live, self.conversation, self.spec, self.texts = live, conversation, spec, texts
        self.about = {"problem": conversation.problem, "situation": conversation.situation}
        self.media: dict[str, pathlib.Path] = {}
        self.recordings = tempfile.TemporaryDirectory()  # deleted at the end
        self.all_labels = False

    def take(self, line: str) -> bool:
        """Takes a line; returns False for the end."""
        command, _, rest = line.partition(" ")
        rest = rest.strip()
        if not line:
            return True
        if not line.startswith("/"):
            self.say(line)
        elif command == "/quit":
            return False
        elif command in ("/video", "/audio"):
            path = pathlib.Path(rest)
            require(bool(rest) and path.is_file(), f"{command}: expected a file, got {rest!r}")
            self.media[command[1:]] = path
            print(f"[{path.name} goes with the next turn]")
        elif command == "/mic":
            path = pathlib.Path(self.recordings.name, "turn.wav")
            record(path)
            self.media["audio"] = path
            print("[the recording goes with the next turn]")
        elif command == "/send":
            require(bool(self.media), "/send: no /video, /audio or /mic was given")
            self.say("")
        elif command == "/history":
            for utterance in self.conversation.history:
                labels = ", ".join(utterance.labels.values())
                print(f"{utterance.speaker}{f' ({labels})' if labels else ''}: {utterance.text}")
        elif command == "/labels":
            self.all_labels = not self.all_labels
            print(f"[{'all labels' if self.all_labels else 'only the likeliest labels'}]")
        elif command == "/undo":
            print("[taken back]" if self.conversation.undo() else "[there is no turn]")
        elif command == "/save":
            require(bool(rest), "/save: expected a file")
            self.save(pathlib.Path(rest))
        else:
            print(HELP)
        return True

    def say(self, words: str) -> None:
        """Sends a turn, and prints its labels, the reply and the time."""
        told = (danger_of(text) for text in self.about.values())
        danger = danger_of(words, self.conversation.history) or next(filter(None, told), "")
        if danger:  # nothing is generated
            notice = self.texts.crisis.format(danger=danger)
            print(f"[{notice}]")
            self.conversation.keep(words, notice)
            return
        began = time.perf_counter()
        with prefixed("/", ""):
            turn = own_sample(self.spec, text=words, **self.media, **self.about)
        talk, first = self.conversation, 0.0
        sample = dataclasses.replace(turn, history=talk.history)
        release = Release(self.texts, functools.partial(cut_at_fields, space=talk.space))
        self.live.submit(Turn("chat", sample, talk.memories))
        while not self.live.is_idle:
            for told in self.live.step():
                if isinstance(told, Failure):
                    raise told.error
                if isinstance(told, Draft):
                    labels = told.prediction.labels
                    self.show_labels(told.prediction)
                    continue
                text = release.add(told.text, last=bool(told.finished))
                first = first or (time.perf_counter() - began if text else 0.0)
                print(text, end="", flush=True)
                if release.closed:
                    self.live.cancel("chat")
        print(f"\n[{first:.1f} s to the first sentence, {time.perf_counter() - began:.1f} s]")
        talk.keep(words, release.shown.strip(), labels)
        self.media = {}

    def show_labels(self, prediction: Prediction) -> None:
        shown = []
        for task, shares in (prediction.probabilities or {}).items():
            best = sorted(shares.items(), key=lambda share: -share[1])
            chosen = best if self.all_labels else best[:1]
            values = ", ".join(f"{label} {share:.2f}" for label, share in chosen)
            shown.append(f"{task.replace('_', ' ')}: {values}")
        if shown:
            print("[" + ("\n " if self.all_labels else "; ").join(shown) + "]")

    def save(self, path: pathlib.Path) -> None:
        require(path.parent.is_dir(), f"/save: no folder {path.parent}")
        rows = self.conversation.entries()
        write_whole(path, json.dumps(rows, ensure_ascii=False, indent=1))
        print(f"[{len(rows)} utterances in {path}]")
