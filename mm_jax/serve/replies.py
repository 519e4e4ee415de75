"""Answers a client turn: decodes its clips, screens it, and turns what the model says into the
chunks and completions of the OpenAI protocol."""

from __future__ import annotations

import asyncio
import bisect
import concurrent.futures
import contextlib
import dataclasses
import functools
import logging
import secrets
import time
from collections.abc import AsyncIterator, Sequence

import numpy as np

from mm_jax.data.answers import cut_at_fields, format_answer
from mm_jax.data.labels import LabelSpace
from mm_jax.data.prompts import PromptError
from mm_jax.data.recording import MediaError
from mm_jax.data.records import Sample
from mm_jax.data.tokenizer import Tokenizer
from mm_jax.evaluation.care import Release, Texts, danger_of
from mm_jax.generation.live import Draft, Turn
from mm_jax.generation.memory import ConversationMemory
from mm_jax.generation.predictor import Prediction
from mm_jax.serve.counters import Counters
from mm_jax.serve.errors import ApiError
from mm_jax.serve.media import MediaDecoder
from mm_jax.serve.model import ModelError, ModelThread
from mm_jax.serve.requests import Generation, Said

log = logging.getLogger(__name__)
UNSCREENED = "could not be screened"
WAITED = "the turn waited too long"
FINISHED = {"ended": "stop", "length": "length", "cancelled": "stop", "deadline": "length"}


@dataclasses.dataclass
class Asked:
    """A turn to answer: its words and clips, what was said before, and how to reply."""

    said: Said
    sample: Sample
    how: Generation
    memories: dict[str, ConversationMemory] = dataclasses.field(default_factory=dict)
    labels_as_text: bool = False
    ignored: Sequence[str] = ()


@dataclasses.dataclass
class Choice:
    """One of the replies that are being written.

    finish: the protocol's reason, once it ended; logprobs, ends: of every token, and where its text
    ends in the reply as it was written.
    """

    release: Release
    finish: str | None = None
    logprobs: list[dict] = dataclasses.field(default_factory=list)
    ids: list[int] = dataclasses.field(default_factory=list)
    ends: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Event:
    """What there is to tell: `draft` first, then pieces of text of a choice, which ends with
    `finish`."""

    choice: int = 0
    text: str = ""
    finish: str | None = None
    logprobs: list[dict] = dataclasses.field(default_factory=list)
    draft: bool = False


class Answer:
    """What a turn was answered so far: labels, replies, counts."""

    def __init__(self, asked: Asked):
        self.asked = asked
        self.prediction = Prediction({}, "text", "")
        self.choices: list[Choice] = []
        self.danger = ""
        self.prompt_tokens = self.completion_tokens = 0
        self.seconds: dict[str, float] = {}
        self.statuses = ("not requested", "not requested")

    @property
    def extra(self) -> dict:
        """Returns what is told besides the protocol's fields."""
        sample, modality = self.asked.sample, self.prediction.modality
        return {
            "labels": self.prediction.labels,
            "probabilities": self.prediction.probabilities,
            "modality": modality,
            "seen": {
                "frames": len(sample.frames) if "v" in modality else 0,
                "seconds_of_sound": len(sample.fbank) / 100 if modality in ("a", "av") else 0.0,
                "video_status": sample.video_status,
                "audio_status": sample.audio_status,
            },
            "safety": {"danger": self.danger, "replaced": [c.release.fault for c in self.choices]},
            "ignored": list(self.asked.ignored),
        }

    @property
    def usage(self) -> dict:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


class Replier:
    """Answers turns with a model; at most `slots` + `queue` of them are under way.

    deadline: seconds after which a turn ends with what it has.
    """

    def __init__(
        self,
        model: ModelThread,
        media: MediaDecoder,
        counters: Counters,
        texts: Texts,
        *,
        slots: int,
        queue: int,
        deadline: float,
    ):
        self.model, self.media, self.counters, self.texts = model, media, counters, texts
        self.slots, self.most, self.deadline = slots, slots + queue, deadline
        self.space: LabelSpace = model.live.space
        self.tokenizer: Tokenizer = model.live.predictor.prompter.tokenizer
        self.screening = concurrent.futures.ThreadPoolExecutor(1, "screen")
        self.screened = 0  # turns that are being screened, or wait for it
        self.under_way = 0
        self.mean = 1.0  # seconds of a turn, lately

    @contextlib.contextmanager
    def place(self):
        """Takes a place for a turn. Raises ApiError where too many are under way."""
        if self.under_way >= self.most:
            self.counters.refused.inc()
            wait = max(1, round(self.mean * self.under_way / self.slots))
            raise ApiError(
                429,
                f"{self.under_way} turns are being answered; try again in {wait} s",
                code="too_many_turns",
                headers={"Retry-After": str(wait)},
            )
        self.under_way += 1
        self.counters.running.set(self.under_way)
        began = time.perf_counter()
        try:
            yield
        finally:
            self.under_way -= 1
            self.counters.running.set(self.under_way)
            took = time.perf_counter() - began
            self.mean += 0.1 * (took - self.mean)
            self.counters.whole.observe(took)

    async def begin(self, asked: Asked) -> tuple[Answer, AsyncIterator[Event]]:
        """Reads a turn; returns its answer, which the events fill. The labels are there already.

        Raises ApiError for what cannot be read, before anything is told.
        """
        began, deadline = time.perf_counter(), time.monotonic() + self.deadline
        answer, uploads = Answer(asked), asked.said.uploads
        if uploads:
            asked.said = dataclasses.replace(asked.said, uploads=())  # they are large
            try:
                async with asyncio.timeout(self.deadline):
                    asked.sample = await self._seen(asked.sample, uploads)
            except TimeoutError as error:
                raise ApiError(503, WAITED, headers={"Retry-After": "5"}) from error
            del uploads
        how = asked.how
        first = (secrets.randbits(32) if how.seed is None else how.seed) % 2**32
        more = np.random.SeedSequence(first).generate_state(how.n or 1)
        turn = Turn(
            name=self.model.name(),
            sample=asked.sample,
            memories=asked.memories,
            seeds=(first, *map(int, more[1:])),
            limit=how.limit,
            temperature=how.temperature,
            top_p=how.top_p,
            deadline=deadline,
        )
        events = self._events(answer, turn, began)
        try:
            head = await anext(events)
        except PromptError as error:
            raise ApiError(400, str(error), code="context_length_exceeded") from error
        except ModelError as error:
            raise ApiError(500, str(error)) from error
        if not head.draft:  # it waited until its deadline
            await events.aclose()
            raise ApiError(503, WAITED, headers={"Retry-After": "5"})
        return answer, events

    async def fixed(self, asked: Asked) -> tuple[Answer, AsyncIterator[Event]] | None:
        """Answers words of danger with the fixed text, for which no place is needed; None where
        nothing is found. Whatever goes wrong, nothing is generated."""
        answer, sample = Answer(asked), asked.sample

        def screen() -> str:
            about = (sample.problem_type, sample.situation, sample.client_clue)
            found = danger_of(sample.client_text, sample.history)
            return found or next(filter(None, map(danger_of, about)), "")

        if self.screened >= self.most:
            raise ApiError(429, "too many turns at a time", headers={"Retry-After": "2"})
        self.screened += 1
        try:
            loop = asyncio.get_running_loop()
            answer.danger = await loop.run_in_executor(self.screening, screen)
        except Exception:  # fails safe
            log.exception("a turn could not be screened")
            answer.danger = UNSCREENED
        finally:
            self.screened -= 1
        if not answer.danger:
            return None
        self.counters.safety.labels(answer.danger).inc()
        return answer, self._notice(answer)

    async def _notice(self, answer: Answer) -> AsyncIterator[Event]:
        notice = self.texts.crisis.format(danger=answer.danger)
        answer.choices = [Choice(Release(self.texts)) for _ in range(answer.asked.how.n or 1)]
        for i, choice in enumerate(answer.choices):
            choice.release.shown, choice.finish = notice, "content_filter"
            yield Event(i, notice, "content_filter")

    async def _seen(self, sample: Sample, uploads) -> Sample:
        """Adds what is seen and heard in the clips. Raises ApiError."""
        try:
            arrays, statuses = await self.media.decode(uploads)
        except MediaError as error:
            self.counters.media.labels(error.reason).inc()
            raise ApiError(
                400, f"the clip cannot be used: {error.reason}", code="bad_clip"
            ) from error
        self.counters.media.labels("ok").inc()
        return dataclasses.replace(sample, **arrays, **statuses)

    async def _events(self, answer: Answer, turn: Turn, began: float) -> AsyncIterator[Event]:
        how, space = answer.asked.how, self.space
        cut = functools.partial(cut_at_fields, space=space)
        answer.choices = [Choice(Release(self.texts, cut, how.stops)) for _ in turn.seeds]
        missing, told = len(turn.seeds), self.model.answer(turn)
        try:
            async for event in told:
                if isinstance(event, Draft):
                    answer.prediction = event.prediction
                    answer.prompt_tokens = event.prompt_tokens
                    answer.seconds["labels"] = time.perf_counter() - began
                    yield Event(draft=True)
                    if answer.asked.labels_as_text:
                        lines = format_answer(event.prediction.labels, "", space)
                        for i in range(missing):
                            yield Event(i, lines)
                    if not space.reply:
                        for i, choice in enumerate(answer.choices):
                            choice.finish = "stop"
                            yield Event(i, finish="stop")
                        return
                    continue
                if event.finished == "deadline" and event.prediction is None:
                    yield Event()
                    return
                if "first_token" not in answer.seconds:
                    answer.seconds["first_token"] = time.perf_counter() - began
                    self.counters.first.observe(answer.seconds["first_token"])
                choice = answer.choices[event.reply]
                if choice.finish:
                    continue
                answer.completion_tokens += len(event.tokens)
                if how.logprobs:
                    self._add_logprobs(choice, event.tokens, event.logps)
                new = choice.release.add(event.text, last=bool(event.finished))
                if choice.release.closed:
                    missing -= 1
                    choice.finish = FINISHED[event.finished or "ended"]
                    if choice.release.stopped:
                        choice.finish = "stop"
                    choice.logprobs = of_shown(choice)
                    if choice.release.fault:
                        choice.finish, choice.logprobs = "content_filter", []
                        self.counters.safety.labels(choice.release.fault).inc()
                if new or choice.finish:
                    probs = choice.logprobs if choice.finish else []
                    yield Event(event.reply, new, choice.finish, probs)
                if not missing:
                    return
        except (GeneratorExit, asyncio.CancelledError):
            if missing:
                self.counters.cancelled.inc()
            raise
        finally:
            await told.aclose()

    def _add_logprobs(self, choice: Choice, tokens, logps) -> None:
        for token, logp in zip(tokens, logps, strict=True):
            choice.ids.append(int(token))
            before = choice.ends[-1] if choice.ends else 0
            # Alone, tokens of some tokenizers lack the space before them.
            whole = self.tokenizer.decode(choice.ids)
            choice.ends.append(len(whole))
            text = whole[before:]
            row = {"token": text, "logprob": float(logp), "bytes": list(text.encode())}
            choice.logprobs.append({**row, "top_logprobs": []})


def of_shown(choice: Choice) -> list[dict]:
    """Returns the tokens of what is shown: others were not screened."""
    release = choice.release
    if release.written.strip() == release.shown.strip():
        return choice.logprobs
    end = len(release.written) - len(release.written.lstrip()) + len(release.shown)
    return choice.logprobs[: bisect.bisect_right(choice.ends, end)]


async def with_patience(coroutine, gone):
    """Awaits a coroutine, unless the client goes away first: then it is cancelled and None is
    returned. gone(): waits until the client has gone."""
    task, leaving = asyncio.ensure_future(coroutine), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            return None
        return task.result()
    finally:
        leaving.cancel()
        if not task.done():
            task.cancel()
