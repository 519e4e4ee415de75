"""Talks with a run's model in the terminal (`chat`).

python -m mm_jax chat --checkpoint RUN
echo "I lost my job." | python -m mm_jax chat --checkpoint RUN
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import pathlib
import sys
import time
from collections.abc import Iterator

from mm_jax.commands.arguments import add_run_arguments, open_run, read_history
from mm_jax.config.errors import UserError, prefixed, require
from mm_jax.config.files import write_whole
from mm_jax.data.answers import cut_at_fields
from mm_jax.data.conversation import own_sample
from mm_jax.data.media import MediaSpec
from mm_jax.evaluation.care import NOTICE, released
from mm_jax.evaluation.safety import CRISIS_NOTICE
from mm_jax.evaluation.screen import screen_client
from mm_jax.generation.predictor import Prediction
from mm_jax.generation.talk import Conversation
from mm_jax.run.build import dataset_name

HELP = """\
/video FILE   show a clip with the next turn (its sound is heard too)
/audio FILE   let a sound be heard with the next turn, instead of the clip's
/send         send them without words
/history      what was said so far
/labels       show all labels with their probabilities, or only the likeliest
/undo         take the last turn and its reply back
/save FILE    write the conversation as JSON (--history reads it)
/quit         end"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser)
    parser.add_argument(
        "--history", type=pathlib.Path, help="earlier utterances, as `predict --history` reads them"
    )
    parser.add_argument("--problem", default="", help="the client's problem in a few words")
    parser.add_argument("--situation", default="", help="the client's situation in a few words")


def main(args: argparse.Namespace, overrides: list[str]) -> None:
    for override in overrides:
        require(
            override.startswith("predict."),
            f"--config.{override.split('=')[0]}: chat can override --config.predict.* only",
        )
    run, spec, params = open_run(args.checkpoint, args.stage, args.step, overrides)
    space = run.prompter.label_space
    require(space.reply, f"--checkpoint: the model of {args.checkpoint} writes no replies")
    history = read_history(args.history, space) if args.history else ()
    talk = Talk(Conversation(run, params, history), spec, args.problem, args.situation)
    print(NOTICE, file=sys.stderr)
    if dataset_name(run.config) == "synthetic":
        print(
            "It was trained on synthetic clips and sentences alone: what it says means nothing.",
            file=sys.stderr,
        )
    if sys.stdin.isatty():
        print("Type what the client says; /help lists the commands.", file=sys.stderr)
    for line in lines():
        try:
            if not talk.take(line.strip()):
                break
        except UserError as error:  # of this line: the conversation goes on
            print(f"error: {error}", file=sys.stderr)


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

    def __init__(self, conversation: Conversation, spec: MediaSpec, problem: str, situation: str):
        self.conversation, self.spec = conversation, spec
        self.about = {"problem": problem, "situation": situation}
        self.media: dict[str, pathlib.Path] = {}
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
        elif command == "/send":
            require(bool(self.media), "/send: no /video or /audio was given")
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
        media, self.media = self.media, {}
        danger = screen_client(words)
        if danger:  # nothing is generated
            notice = CRISIS_NOTICE.format(danger=danger)
            print(f"[{notice}]")
            self.conversation.keep(words, notice)
            return
        began = time.perf_counter()
        with prefixed("/", ""):
            turn = own_sample(self.spec, text=words, **media, **self.about)
        found: list[Prediction] = []

        def pieces() -> Iterator[str]:
            written, told = "", 0
            for got in self.conversation.say(turn):
                if isinstance(got, Prediction):
                    found.append(got)
                    if len(found) == 1:
                        self.show_labels(got)
                    continue
                written += got
                whole = cut_at_fields(written, self.conversation.space)
                yield whole[told:]
                told = max(told, len(whole))

        reply, first = "", 0.0
        for text, _ in released(pieces()):
            first = first or time.perf_counter() - began
            print(text.lstrip() if not reply else text, end="", flush=True)
            reply += text
        print(f"\n[{first:.1f} s to the first sentence, {time.perf_counter() - began:.1f} s]")
        self.conversation.keep(words, reply.strip(), found[-1].labels)

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
        space = self.conversation.space
        rows = []
        for utterance in self.conversation.history:
            keys = {task.name: task.key for task in space.by_speaker[utterance.speaker]}
            own = {keys[name]: label for name, label in utterance.labels.items()}
            rows.append({"speaker": utterance.speaker, "text": utterance.text, **own})
        write_whole(path, json.dumps(rows, ensure_ascii=False, indent=1))
        print(f"[{len(rows)} utterances in {path}]")
