"""Serves a run's model over HTTP (`serve`): a page to talk to, and the OpenAI protocol.

python -m mm_jax serve --checkpoint RUN          then open http://127.0.0.1:8000
MM_JAX_TOKEN=... python -m mm_jax serve --checkpoint RUN --host 0.0.0.0
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import signal
import sys
from collections.abc import Iterator

import uvicorn

from mm_jax.commands.arguments import add_run_arguments, add_safety, add_transcribing, open_run
from mm_jax.config.errors import ConfigError, require
from mm_jax.data.speech import Transcriber
from mm_jax.evaluation.care import Texts
from mm_jax.generation.live import Live
from mm_jax.run.build import dataset_name
from mm_jax.serve.app import Service, create_app
from mm_jax.serve.conversations import Conversations
from mm_jax.serve.counters import Counters
from mm_jax.serve.guard import Guard, is_loopback
from mm_jax.serve.media import ClipLimits, MediaDecoder
from mm_jax.serve.model import ModelThread
from mm_jax.serve.replies import Replier
from mm_jax.serve.warm import warm

TOKEN_VARIABLE = "MM_JAX_TOKEN"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser)
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    add("--port", type=int, default=8000, help="default 8000; 0: any that is free")
    add(
        "--token",
        help="what a request must bear, needed for other addresses than this machine's; other "
        f"users of the machine can read a command line, and not ${TOKEN_VARIABLE}, the default",
    )
    add("--name", help="of the model (default: the run folder's)")
    add("--slots", type=int, default=8, help="replies that are written together (default 8)")
    add("--queue", type=int, default=64, help="turns that may wait (default 64); more get 429")
    add("--deadline", type=float, default=120.0, help="seconds of a turn (default 120)")
    add("--max_mb", type=float, default=32.0, help="largest request (default 32)")
    add("--max_seconds", type=float, default=120.0, help="longest clip (default 120)")
    add("--idle_minutes", type=float, default=60.0, help="until a conversation expires (60)")
    add(
        "--store",
        type=pathlib.Path,
        metavar="FILE",
        help="keep conversations in this SQLite file, over restarts; it is not encrypted",
    )
    add_safety(parser)
    add_transcribing(parser, "write down what is said, for the page to show and correct")


def main(args: argparse.Namespace, overrides: list[str]) -> None:
    for override in overrides:
        require(
            override.startswith("predict."),
            f"--config.{override.split('=')[0]}: serve can override --config.predict.* only",
        )
    token, local = args.token or os.environ.get(TOKEN_VARIABLE, ""), is_loopback(args.host)
    require(
        local or bool(token),
        f"--host {args.host} can be reached from outside: set {TOKEN_VARIABLE}",
    )
    require(token.isascii() and token.isprintable(), "--token: expected printable ASCII characters")
    require(0 <= args.port < 65536, f"--port: expected 0 to 65535, got {args.port}")
    for name in ("slots", "deadline", "max_mb", "max_seconds", "idle_minutes"):
        value = vars(args)[name]
        require(value > 0, f"--{name}: expected more than 0, got {value}")
    require(args.queue >= 0, f"--queue: expected at least 0, got {args.queue}")
    require(bool(args.transcribe) or not args.language, "--language belongs to --transcribe")
    texts = Texts.load(args.safety)
    transcriber = Transcriber(args.transcribe, args.language or "") if args.transcribe else None
    run, spec, params = open_run(args.checkpoint, args.stage, args.step, overrides)
    space, counters = run.prompter.label_space, Counters()
    idle = 60 * args.idle_minutes
    conversations = Conversations(space, idle, args.store)
    live = Live(run, params, args.slots)
    limits = ClipLimits(seconds=args.max_seconds)
    media = MediaDecoder(spec, limits)
    print("compiling; with a warm cache this takes seconds", file=sys.stderr, flush=True)
    warm(live, spec)
    model = ModelThread(live, counters)
    replier = Replier(
        model,
        media,
        counters,
        texts,
        slots=args.slots,
        queue=args.queue,
        deadline=args.deadline,
    )
    service = Service(
        name=args.name or args.checkpoint.resolve().name,
        replier=replier,
        media=media,
        conversations=conversations,
        counters=counters,
        texts=texts,
        limits=limits,
        most=round(args.max_mb * 1e6),
        synthetic=dataset_name(run.config) == "synthetic",
        transcriber=transcriber,
    )

    def close() -> None:
        model.stop()
        media.stop()
        conversations.close()

    app = Guard(create_app(service, close), counters, token, local and not token, service.most)
    config = uvicorn.Config(
        app,
        host=args.host,
        port=args.port,
        log_level="warning",
        access_log=False,  # addresses hold ids of conversations
        server_header=False,
        timeout_graceful_shutdown=round(args.deadline) + 5,
    )
    try:
        Server(config, service).run()
    except SystemExit as error:  # uvicorn's way to say that the address is taken
        raise ConfigError(f"--port {args.port}: cannot listen on {args.host}") from error


class Server(uvicorn.Server):
    """Says where it listens; on SIGTERM or Ctrl-C it finishes what runs, and ends with success."""

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self.service = service

    async def startup(self, sockets=None) -> None:
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            print(f"{self.service.name} at http://{shown}:{port}", flush=True)

    def handle_exit(self, sig, frame) -> None:
        self.service.stopping = True
        super().handle_exit(sig, frame)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Like uvicorn's, without raising the signal again at the end."""
        before = {s: signal.signal(s, self.handle_exit) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
