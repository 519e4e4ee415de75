"""What clients may send: the OpenAI chat protocol with clips, and turns of kept conversations."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from mm_jax.config.errors import ConfigError
from mm_jax.config.files import well_formed
from mm_jax.data.conversation import history_of
from mm_jax.data.labels import LabelSpace
from mm_jax.data.records import CLIENT, THERAPIST, Utterance
from mm_jax.serve.errors import ApiError
from mm_jax.serve.media import Upload
from mm_jax.serve.media_worker import MOST_FILES

MOST_CHARACTERS = 200_000  # of all texts of a request
MOST_WORDS = 20_000  # characters of a turn
MOST_ABOUT = 2_000  # of a problem or a situation
MOST_MESSAGES = 4_000
MOST_VALUES = 100_000  # of a body's JSON: clips and words have few
T = TypeVar("T")
Few = Annotated[list[T], Field(max_length=2 * MOST_FILES, fail_fast=True)]
# Its kind may hold commas: recordings of browsers are "video/webm;codecs=vp8,opus".
_DATA_URL = re.compile(r"data:[^\n]{0,200}?;base64,", re.IGNORECASE)


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ImageUrl(Strict):
    url: str
    detail: Literal["auto", "low", "high"] | None = None


class Url(Strict):
    url: str


class Sound(Strict):
    data: str
    format: str = Field("wav", max_length=40)


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


class VideoPart(Strict):
    type: Literal["video_url"]
    video_url: Url


class AudioPart(Strict):
    type: Literal["input_audio"]
    input_audio: Sound


Part = Annotated[TextPart | ImagePart | VideoPart | AudioPart, Field(discriminator="type")]
Content = str | Few[Part]


class Message(Strict):
    """A message; other fields such as `refusal` come back from earlier answers, and mean
    nothing here."""

    model_config = ConfigDict(extra="ignore", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: Content | None = None


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


class TextFormat(Strict):
    type: Literal["text"]


class Generation(Strict):
    """How replies are made. What is left out is as in the run's config."""

    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    stop: str | Annotated[list[str], Field(max_length=4, fail_fast=True)] | None = None
    n: int | None = Field(None, ge=1, le=8)
    logprobs: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    labels_as_text: bool | None = None
    # Accepted where they ask for nothing that is not done.
    top_logprobs: Literal[0] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    response_format: TextFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1, fail_fast=True)] | None = None
    tools: Annotated[list, Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    logit_bias: Annotated[dict, Field(max_length=0)] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    user: str | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16, fail_fast=True)] | None = None
    store: Literal[False] | None = None

    @property
    def stops(self) -> list[str]:
        found = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if any(not 0 < len(s) <= 200 for s in found):
            raise ApiError(400, "stop: expected texts of 1 to 200 characters", "stop")
        return found

    @property
    def limit(self) -> int:
        return self.max_completion_tokens or self.max_tokens or 0


class ChatRequest(Generation):
    model: str = Field(max_length=400)
    messages: Annotated[
        list[Message], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)
    ]
    problem: str = Field("", max_length=MOST_ABOUT)
    situation: str = Field("", max_length=MOST_ABOUT)


class TurnRequest(Generation):
    content: Content


class Entry(Strict):
    """An earlier utterance, with its labels by the names that an exported one has."""

    model_config = ConfigDict(extra="allow", strict=True)

    speaker: str
    text: str


class NewConversation(Strict):
    history: Annotated[list[Entry], Field(max_length=MOST_MESSAGES, fail_fast=True)] = []
    problem: str = Field("", max_length=MOST_ABOUT)
    situation: str = Field("", max_length=MOST_ABOUT)


class TranscriptionRequest(Strict):
    content: list[VideoPart | AudioPart] = Field(min_length=1, max_length=4)


@dataclasses.dataclass(frozen=True)
class Said:
    """What a client turn consists of: its words, and its clips."""

    text: str
    uploads: tuple[Upload, ...] = ()


def parse(kind: type[BaseModel], body: bytes) -> Any:
    """Reads a request. Raises ApiError naming what is wrong, never repeating what was sent."""
    if sum(map(body.count, (b"{", b"[", b","))) > MOST_VALUES:
        raise ApiError(413, f"the body has more than {MOST_VALUES} values", code="too_large")
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ApiError(400, "the body is not UTF-8") from error
    try:
        values = json.loads(text, parse_constant=_no_constant)
    except RecursionError as error:
        raise ApiError(400, "the body is JSON that is nested too deep") from error
    except ValueError as error:
        raise ApiError(400, "the body is not JSON") from error
    if isinstance(values, dict):  # null asks for what is left out
        values = {name: value for name, value in values.items() if value is not None}
        unknown = next((name for name in values if name not in kind.model_fields), None)
        if unknown is not None:
            name = re.sub(r"\W", "?", unknown)[:40]
            raise ApiError(400, f"{name}: not a parameter here", name, "unsupported_parameter")
    try:
        found = kind.model_validate(values)
    except pydantic.ValidationError as error:
        found = error.errors(include_input=False, include_url=False, include_context=False)
        first = max(found, key=lambda e: len(e["loc"]))  # of a union the branch that fits best
        where = ".".join(str(part) for part in first["loc"] if not _is_tag(part))
        code = "unsupported_parameter" if first["type"] == "extra_forbidden" else None
        said = "is not a parameter" if code else first["msg"]
        raise ApiError(
            400, f"{where or 'body'}: {said}"[:300], where[:100] or None, code
        ) from error
    except (RecursionError, ValueError) as error:
        raise ApiError(400, "the body cannot be read") from error
    return found


def _no_constant(name: str):
    raise ValueError(name)


def _is_tag(part: object) -> bool:
    """Tells whether a place in an error names a branch of a union, not a field."""
    return isinstance(part, str) and not re.fullmatch(r"[a-z_]{1,40}", part)


def check_length(texts: Sequence[str], most: int = MOST_CHARACTERS) -> None:
    count = sum(map(len, texts))
    if count > most:
        raise ApiError(413, f"{count} characters of text, at most {most} are read")


def texts_of(content: Content | None) -> str:
    """Joins the words of a message."""
    if content is None or isinstance(content, str):
        return well_formed(content or "")
    return well_formed(" ".join(part.text for part in content if isinstance(part, TextPart)))


def said_of(content: Content, name: str, most: int = MOST_WORDS) -> Said:
    """Reads a client turn of at most so many characters; `name` is the parameter that holds it.
    Raises ApiError."""
    uploads = []
    if not isinstance(content, str):
        uploads = [
            upload_of(part, f"{name}.{i}")
            for i, part in enumerate(content)
            if not isinstance(part, TextPart)
        ]
    kinds = {upload.kind for upload in uploads}
    if {"image", "video"} <= kinds:
        raise ApiError(400, f"{name}: expected pictures or videos, not both", name)
    if len(uploads) > MOST_FILES:
        raise ApiError(400, f"{name}: {len(uploads)} clips, at most {MOST_FILES} are read", name)
    text = texts_of(content).strip()
    if len(text) > most:
        raise ApiError(413, f"{name}: {len(text)} characters, at most {most} are read", name)
    if not text and not uploads:
        raise ApiError(400, f"{name}: expected words or a clip", name)
    return Said(text, tuple(uploads))


def upload_of(part: ImagePart | VideoPart | AudioPart, name: str) -> Upload:
    """Decodes the bytes of a clip. Raises ApiError for whatever is no data URL: nothing else is
    ever opened."""
    if isinstance(part, AudioPart):
        kind, text, name = "audio", part.input_audio.data, f"{name}.input_audio.data"
        if (found := _DATA_URL.match(text)) is not None:
            text = text[found.end() :]
    else:
        kind = "image" if isinstance(part, ImagePart) else "video"
        url = part.image_url.url if isinstance(part, ImagePart) else part.video_url.url
        name = f"{name}.{part.type}.url"
        found = _DATA_URL.match(url)
        if found is None:
            raise ApiError(
                400,
                f"{name}: expected a data URL in base64; addresses and paths are not read",
                name,
            )
        text = url[found.end() :]
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(400, f"{name}: not base64", name) from error
    if not data:
        raise ApiError(400, f"{name}: the clip is empty", name)
    return Upload(kind, data)


def conversation_of(messages: Sequence[Message]) -> tuple[tuple[Utterance, ...], list[str]]:
    """Returns the utterances before the last message, and what of them a model is not shown.

    A user is the client, an assistant the therapist. Raises ApiError.
    """
    if messages[-1].role != "user" or messages[-1].content is None:
        raise ApiError(400, "messages: the last one must be the user's", "messages")
    history, ignored = [], []
    for message in messages[:-1]:
        if message.role in ("system", "developer"):
            ignored.append(f"{message.role} message")
            continue
        speaker = CLIENT if message.role == "user" else THERAPIST
        content = message.content
        if not isinstance(content, str | None) and any(
            not isinstance(p, TextPart) for p in content
        ):
            ignored.append("clips of earlier messages")
        text = texts_of(content).strip()
        turn = history[-1].turn + (history[-1].speaker != speaker) if history else 0
        history.append(Utterance(speaker, text, turn=turn))
    return tuple(history), sorted(set(ignored))


def history_from(entries: Sequence[Entry], space: LabelSpace) -> tuple[Utterance, ...]:
    """Reads earlier utterances with labels. Raises ApiError."""
    check_length([entry.text for entry in entries])
    try:
        return history_of([entry.model_dump() for entry in entries], space)
    except ConfigError as error:
        raise ApiError(400, f"history: {error}"[:300], "history") from error
