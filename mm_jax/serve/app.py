"""The HTTP application: the OpenAI protocol, kept conversations, and the page."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import json
import logging
import pathlib
import sqlite3
import time
import uuid
from collections.abc import AsyncIterator, Callable

import fastapi
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse

from mm_jax.config.files import well_formed
from mm_jax.data.answers import format_answer
from mm_jax.data.recording import MediaError
from mm_jax.data.records import CLIENT, Sample
from mm_jax.data.speech import Transcriber
from mm_jax.evaluation.care import Texts
from mm_jax.evaluation.safety import PROMPTS, SECOND, screen_scores
from mm_jax.generation.talk import Conversation
from mm_jax.serve.conversations import Conversations, Kept
from mm_jax.serve.counters import Counters
from mm_jax.serve.errors import ApiError
from mm_jax.serve.media import ClipLimits, MediaDecoder
from mm_jax.serve.prompts import read_prompt
from mm_jax.serve.replies import WAITED, Answer, Asked, Event, Replier, with_patience
from mm_jax.serve.requests import (
    MOST_CHARACTERS,
    MOST_WORDS,
    ChatRequest,
    Generation,
    NewConversation,
    TranscriptionRequest,
    TurnRequest,
    check_length,
    conversation_of,
    history_from,
    parse,
    said_of,
    texts_of,
)

log = logging.getLogger(__name__)
PAGE = pathlib.Path(__file__).with_name("page.html")
ALIAS = "mm_jax"  # the model's name, whatever the run is called


@dataclasses.dataclass
class Service:
    """What the routes work with. name: the model's; synthetic: whether it knows made-up data
    alone."""

    name: str
    replier: Replier
    media: MediaDecoder
    conversations: Conversations
    counters: Counters
    texts: Texts
    limits: ClipLimits
    most: int
    synthetic: bool
    transcriber: Transcriber | None = None
    stopping: bool = False
    started: int = dataclasses.field(default_factory=lambda: int(time.time()))

    @functools.cached_property
    def about(self) -> dict:
        """Returns what the page tells."""
        space = self.replier.space
        scores = {"authored": screen_scores(PROMPTS), "second": screen_scores(SECOND)}
        return {
            "model": self.name,
            "synthetic": self.synthetic,
            "notice": self.texts.notice,
            "tasks": [
                {"name": t.name, "caption": t.caption, "about": t.about, "labels": list(t.labels)}
                for t in space.tasks
            ],
            "replies": space.reply,
            "transcription": self.transcriber is not None,
            "limits": {"seconds": self.limits.seconds, "bytes": self.most},
            "screen": {**scores, "prompts": {"authored": len(PROMPTS), "second": len(SECOND)}},
            "idle_seconds": self.conversations.idle,
        }


def create_app(service: Service, close: Callable[[], None] = lambda: None) -> fastapi.FastAPI:
    """Builds the application (without `guard.Guard`); close() is called when it ends."""

    writing = concurrent.futures.ThreadPoolExecutor(1, "transcriber")

    @contextlib.asynccontextmanager
    async def lifespan(app):
        async def sweep():
            while True:
                await asyncio.sleep(min(60.0, max(0.1, service.conversations.idle / 4)))
                try:
                    service.conversations.expire()
                except sqlite3.Error as error:  # the next time may do
                    log.error("expired conversations could not be deleted: %s", error)

        task = asyncio.create_task(sweep())
        yield
        task.cancel()
        close()
        writing.shutdown(wait=False, cancel_futures=True)

    app = fastapi.FastAPI(
        title="mm_jax", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan
    )

    @app.exception_handler(ApiError)
    async def refused(request: fastapi.Request, error: ApiError):
        return JSONResponse(error.body(), error.status, headers=error.headers)

    @app.exception_handler(fastapi.exceptions.StarletteHTTPException)
    async def unknown(request: fastapi.Request, error):
        return JSONResponse(
            ApiError(error.status_code, str(error.detail)).body(), error.status_code
        )

    @app.exception_handler(Exception)
    async def failed(request: fastapi.Request, error: Exception):
        log.error("a request failed: %s", type(error).__name__, exc_info=error)
        return JSONResponse(ApiError(500, "the server failed; its log says how").body(), 500)

    @app.get("/")
    async def page():
        return HTMLResponse(PAGE.read_text("utf-8"))

    @app.get("/healthz")
    async def health():
        if service.stopping:
            return JSONResponse({"status": "stopping"}, 503)
        if not service.replier.model.is_alive:
            return JSONResponse({"status": "the model has ended"}, 503)
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics():
        service.counters.conversations.set(len(service.conversations))
        return Response(service.counters.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/about")
    async def about():
        return service.about

    @app.get("/v1/models")
    async def models():
        return {"object": "list", "data": [model_card(service)]}

    @app.get("/v1/models/{name}")
    async def model(name: str):
        check_name(service, name)
        return model_card(service)

    @app.post("/v1/chat/completions")
    async def chat(request: fastapi.Request):
        body: ChatRequest = parse(ChatRequest, await request.body())
        check_name(service, body.model)
        asked = await asyncio.to_thread(read_chat, service, body)
        return await respond(service, request, asked)

    @app.post("/v1/transcriptions")
    async def transcribe(request: fastapi.Request):
        body: TranscriptionRequest = parse(TranscriptionRequest, await request.body())
        if service.transcriber is None:
            raise ApiError(501, "the server was started without --transcribe")
        said = await asyncio.to_thread(said_of, body.content, "content")

        async def written():
            async with asyncio.timeout(service.replier.deadline):
                arrays, _ = await service.media.decode(said.uploads, sound=True)
                loop = asyncio.get_running_loop()
                return await loop.run_in_executor(writing, service.transcriber, arrays["sound"])

        with service.replier.place():
            try:
                found = await with_patience(written(), functools.partial(gone, request))
            except MediaError as error:
                raise ApiError(400, f"the clip cannot be used: {error.reason}") from error
            except TimeoutError as error:
                raise ApiError(503, WAITED, headers={"Retry-After": "5"}) from error
        if found is None:
            raise ApiError(499, "the client went away")
        return {"text": found.text, "language": found.language}

    @app.post("/v1/conversations")
    async def create(request: fastapi.Request):
        body: NewConversation = parse(NewConversation, await request.body())
        space = service.replier.space
        check_length([body.problem, body.situation])
        history = history_from(body.history, space)
        about = well_formed(body.problem), well_formed(body.situation)
        talk = Conversation(space, history, *about)
        return summary(service.conversations.create(talk))

    @app.get("/v1/conversations/{name}")
    async def get(name: str):
        return summary(service.conversations.get(name), whole=True)

    @app.get("/v1/conversations/{name}/export")
    async def export(name: str):
        rows = service.conversations.get(name).conversation.entries()
        headers = {"Content-Disposition": 'attachment; filename="conversation.json"'}
        return JSONResponse(rows, headers=headers)

    @app.delete("/v1/conversations/{name}")
    async def delete(name: str):
        kept = service.conversations.take(name)
        service.conversations.delete(kept.id)
        return {"id": kept.id, "object": "conversation.deleted", "deleted": True}

    @app.post("/v1/conversations/{name}/undo")
    async def undo(name: str):
        kept = service.conversations.take(name)
        talk = dataclasses.replace(kept.conversation)
        if not talk.undo():
            raise ApiError(409, "there is no turn to take back")
        service.conversations.save(kept, talk)
        return summary(kept, whole=True)

    @app.post("/v1/conversations/{name}/fork")
    async def fork(name: str):
        talk = service.conversations.get(name).conversation
        other = dataclasses.replace(talk, memories=dict(talk.memories))
        return summary(service.conversations.create(other), whole=True)

    @app.post("/v1/conversations/{name}/turns")
    async def turn(name: str, request: fastapi.Request):
        body: TurnRequest = parse(TurnRequest, await request.body())
        if (body.n or 1) > 1:
            raise ApiError(400, "n: a conversation goes on with one reply", "n")
        kept = service.conversations.take(name)
        kept.busy = True
        try:
            asked = await asyncio.to_thread(read_turn, service, kept.conversation, body)
        except BaseException:
            kept.busy = False
            raise
        return await respond(service, request, asked, kept)

    return app


def model_card(service: Service) -> dict:
    card = {"id": service.name, "object": "model", "created": service.started}
    return {**card, "owned_by": "mm_jax"}


def check_name(service: Service, name: str) -> None:
    if name not in (service.name, ALIAS):
        raise ApiError(404, f"the model here is called {service.name}", "model", "model_not_found")


def summary(kept: Kept, whole: bool = False) -> dict:
    talk = kept.conversation
    found = {
        "id": kept.id,
        "object": "conversation",
        "created_at": int(kept.created),
        "utterances": len(talk.history),
        "problem": talk.problem,
        "situation": talk.situation,
    }
    return {**found, "history": talk.entries()} if whole else found


def read_chat(service: Service, body: ChatRequest) -> Asked:
    """Reads a request of the OpenAI protocol. Raises ApiError."""
    space = service.replier.space
    check_length([texts_of(m.content) for m in body.messages] + [body.problem, body.situation])
    own, last = read_prompt(body.messages, space), len(body.messages) - 1
    how = Generation(**{name: getattr(body, name) for name in Generation.model_fields})
    name = f"messages.{last}.content"
    if own is not None:
        said = said_of(body.messages[last].content, name, MOST_CHARACTERS)
        check_length([own.client_text], MOST_WORDS)
        return Asked(said, own, how, labels_as_text=body.labels_as_text is not False)
    history, ignored = conversation_of(body.messages)
    said = said_of(body.messages[last].content, name)
    unanswered = itertools.takewhile(lambda u: u.speaker == CLIENT, reversed(history))
    if sum(len(u.text) for u in unanswered) + len(said.text) > MOST_WORDS:
        raise ApiError(413, f"more than {MOST_WORDS} characters that nobody answered", "messages")
    sample = Sample(
        id="chat",
        dialogue_id="chat",
        client_text=said.text,
        problem_type=well_formed(body.problem),
        situation=well_formed(body.situation),
        history=history,
    )
    return Asked(said, sample, how, {}, bool(body.labels_as_text), ignored)


def read_turn(service: Service, talk: Conversation, body: TurnRequest) -> Asked:
    """Reads a turn of a kept conversation. Raises ApiError."""
    said = said_of(body.content, "content")
    check_length([said.text])
    sample = Sample(
        id="turn",
        dialogue_id="turn",
        client_text=said.text,
        problem_type=talk.problem,
        situation=talk.situation,
        history=talk.history,
    )
    return Asked(said, sample, body, talk.memories, bool(body.labels_as_text))


async def respond(
    service: Service, request: fastapi.Request, asked: Asked, kept: Kept | None = None
) -> Response:
    """Answers a turn, streamed or whole; a client that goes away ends it."""
    stack = contextlib.ExitStack()
    if kept is not None:
        stack.callback(setattr, kept, "busy", False)

    def done(answer: Answer) -> None:
        """Keeps a turn that was answered to its end."""
        if kept is not None:
            reply = answer.choices[0].release.shown.strip()
            talk = dataclasses.replace(kept.conversation)
            talk.keep(asked.said.text, reply, answer.prediction.labels)
            service.conversations.save(kept, talk)

    leaving = functools.partial(gone, request)
    try:
        asked.how.stops  # noqa: B018  refuses them before anything starts
        begun = await service.replier.fixed(asked)
        if begun is None:
            stack.enter_context(service.replier.place())
            begun = await with_patience(service.replier.begin(asked), leaving)
        if begun is None:
            raise ApiError(499, "the client went away")
        answer, events = begun
        shell = Shell(service.name, asked)
        if asked.how.stream:
            return TurnStream(streamed(shell, answer, events, done), events, stack)
        whole = await with_patience(collected(events), leaving)
        if whole is None:
            await events.aclose()
            raise ApiError(499, "the client went away")
        done(answer)
        found = shell.completion(answer, service.replier.space)
        stack.close()
        return JSONResponse(found)
    except BaseException:
        stack.close()
        raise


async def gone(request: fastapi.Request) -> None:
    """Waits until the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class TurnStream(StreamingResponse):
    """Sends a turn's events; however it ends, and even if it never begins, its place is free
    again."""

    def __init__(self, lines: AsyncIterator[str], events: AsyncIterator[Event], stack):
        super().__init__(lines, media_type="text/event-stream")
        self.events, self.stack = events, stack

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.stack.close()
            await self.events.aclose()


async def collected(events: AsyncIterator[Event]) -> list[Event]:
    return [event async for event in events]


@dataclasses.dataclass
class Shell:
    """Writes the protocol's objects around an answer."""

    model: str
    asked: Asked
    id: str = dataclasses.field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def head(self, kind: str) -> dict:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def chunk(self, event: Event, first: bool) -> dict:
        delta: dict = {"role": "assistant"} if first else {}
        if event.text or first:
            delta["content"] = event.text
        choice = {"index": event.choice, "delta": delta, "finish_reason": event.finish}
        choice["logprobs"] = {"content": event.logprobs} if event.logprobs else None
        return {**self.head("chat.completion.chunk"), "choices": [choice]}

    def completion(self, answer: Answer, space) -> dict:
        choices = []
        for i, choice in enumerate(answer.choices):
            text = choice.release.shown.strip()
            if self.asked.labels_as_text and answer.prediction.labels:
                text = format_answer(answer.prediction.labels, text, space)
            probs = {"content": choice.logprobs} if choice.logprobs else None
            message = {"role": "assistant", "content": text, "refusal": None}
            choices.append(
                {
                    "index": i,
                    "message": message,
                    "finish_reason": choice.finish,
                    "logprobs": probs,
                }
            )
        return {
            **self.head("chat.completion"),
            "choices": choices,
            "usage": answer.usage,
            **answer.extra,
        }


async def streamed(
    shell: Shell, answer: Answer, events: AsyncIterator[Event], done: Callable[[Answer], None]
) -> AsyncIterator[str]:
    """Yields server-sent events; the first and the last one have the labels."""
    options = shell.asked.how.stream_options
    with_usage = options is not None and options.include_usage

    def line(chunk: dict) -> str:
        if with_usage:
            chunk.setdefault("usage", None)
        return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"

    yield line({**shell.chunk(Event(), first=True), **answer.extra})
    for i in range(1, shell.asked.how.n or 1):
        yield line(shell.chunk(Event(i), first=True))
    try:
        async for event in events:
            chunk = shell.chunk(event, first=False)
            if event.finish and all(choice.finish for choice in answer.choices):
                done(answer)  # before a client that has read it all can ask again
                chunk |= answer.extra
            yield line(chunk)
    except ApiError as error:  # it is too late for a status
        yield line(error.body())
        return
    except Exception as error:
        log.exception("a streamed reply failed")
        yield line(ApiError(500, f"the reply failed: {type(error).__name__}").body())
        return
    if with_usage:
        yield line({**shell.head("chat.completion.chunk"), "choices": [], "usage": answer.usage})
    yield "data: [DONE]\n\n"
