"""Asks the chat model behind an OpenAI-compatible endpoint, and learns what parameters it takes."""

from __future__ import annotations

import dataclasses
import datetime
import email.utils
import logging
import os
import re
from collections.abc import Callable
from typing import TypeVar

from mm_jax.config.errors import ConfigError
from mm_jax.config.files import well_formed
from mm_jax.config.reward import Limits
from mm_jax.rewards.calls import CallError, Calls, Ledger, RefusedError

T = TypeVar("T")
STUB = "stub-rules"  # rewards/stub.py, which `demo` starts
log = logging.getLogger(__name__)


def api_key(model: str, base_url: str, key_variable: str) -> str:
    """Reads the key of an endpoint. Raises ConfigError where OpenAI's has none."""
    key = os.environ.get(key_variable, "")
    if not key and not base_url and model == STUB:
        raise ConfigError(
            "reward.judge: the stub judge of the demo runs inside `demo` alone; name a judge with "
            "--config.reward.judge.model=MODEL and --config.reward.judge.base_url=URL (empty: "
            "OpenAI's), or leave the judge out with --config.reward.trust=0"
        )
    if not key and not base_url:
        raise ConfigError(f"model {model}: the environment variable {key_variable} holds no key")
    return key or "none"  # local servers accept any key, but the client wants one


class Chat:
    """Asks a chat model at `base_url` ("": OpenAI's); the key is in an environment variable ("":
    there is none).

    endpoint: the URL in use; answered_as: the model names given with its answers; complaints:
    reason of a failed attempt -> the service's last message; takes_parts: it has answered a message
    with pictures or sound.
    """

    def __init__(
        self,
        model: str,
        base_url: str,
        key_variable: str,
        limits: Limits = Limits(),
        ledger: Ledger | None = None,
    ):
        import openai  # here, because runs without a chat model do not need it

        key = api_key(model, base_url, key_variable)
        self.model = model
        self._openai = openai
        # max_retries=0: `Calls` retries, and counts and pays for every attempt.
        self._client = openai.AsyncOpenAI(
            api_key=key, base_url=base_url or None, max_retries=0, timeout=limits.timeout
        )
        self.endpoint = str(self._client.base_url)
        self.calls = Calls(limits, ledger=ledger)
        self.answered_as: set[str] = set()
        self.complaints: dict[str, str] = {}
        self.forms = Forms()
        self.takes_parts = False
        self._refused_parts = 0

    async def close(self) -> None:
        await self._client.close()

    async def ask(
        self,
        messages: Callable[[], list[dict]],
        parse: Callable[[str], T],
        tokens: int,
        schema: dict | None = None,
        temperature: float = 0.0,
        max_tokens: int | None = None,
    ) -> T:
        """Returns `parse` of the answer's text, retrying as `Calls.run` does. `messages()` is
        called for every attempt; `tokens` estimates the prompt's; `parse` raises CallError.

        An answer that cannot be parsed is asked for once more: it is paid for, and seldom changes.
        """
        unread = 0

        async def attempt() -> T:
            nonlocal unread
            form = self.forms(schema, temperature, max_tokens)
            asked = messages()
            answer = await self._create(asked, form)
            self.takes_parts |= any(isinstance(m["content"], list) for m in asked)
            text, finish = self._text(answer, tokens)
            try:
                return parse(text)
            except CallError as error:
                unread += 1
                reason, again = error.reason, unread < 2
                if finish == "length":
                    reason, again = "cut at the limit", False
                elif REFUSAL.match(text) and "{" not in text:
                    reason, again = "refused", False
                self.complaints[reason] = f"{error}; it said: {text.strip()[:200]}"
                raise CallError(reason, str(error), transient=again, answered=True) from error

        return await self.calls.run(attempt, tokens=tokens)

    async def _create(self, messages: list[dict], form: Form):
        """Calls the endpoint. Parameters that it refuses are changed or left out from then on.

        Raises CallError, or RefusedError where no call can succeed.
        """
        errors = self._openai
        while True:
            parameters = form.parameters()
            try:
                return await self._client.chat.completions.create(
                    model=self.model, messages=messages, **parameters
                )
            except errors.APITimeoutError as error:
                raise CallError("timeout") from error
            except errors.APIConnectionError as error:
                raise CallError("connection") from error
            except errors.APIStatusError as error:
                said = re.sub(r"\b(sk|key)-\S+", "...", str(error.message))  # no part of a key
                said = said[:300]
                if error.status_code in (400, 422) and self.forms.learn(form, parameters, said):
                    log.warning("%s: %s; asking without it from now on", self.model, said)
                    continue
                if error.status_code in (400, 404, 415, 422, 501) and not self.takes_parts:
                    self._check_parts(messages, error.status_code, said)
                raise self._failure(error, said) from error
            except (errors.APIError, ValueError, RecursionError) as error:  # not readable JSON
                raise CallError("malformed answer", str(error)[:200]) from error

    def _check_parts(self, messages: list[dict], status: int, said: str) -> None:
        """Raises RefusedError if a model that has taken no pictures or sound yet refuses them
        again; a single request may be bad in itself."""
        contents = [m["content"] for m in messages if isinstance(m["content"], list)]
        kinds = sorted({part["type"] for parts in contents for part in parts} - {"text"})
        if not kinds or not PARTS.search(said) or NOT_PARTS.search(said):
            return
        self._refused_parts += 1
        if self._refused_parts >= REFUSALS:
            raise RefusedError(
                f"{self.model} at {self.endpoint} does not take {' or '.join(kinds)}: "
                f"HTTP {status}: {said}"
            )

    def _failure(self, error, said: str) -> CallError | RefusedError:
        status, reason = error.status_code, f"HTTP {error.status_code}"
        self.complaints[reason] = said
        # A service that has answered before may forbid or not find a single request.
        final = (401, 402) if self.answered_as else (401, 402, 403, 404)
        if status in final or error.code == "insufficient_quota":
            return RefusedError(f"{self.model} at {self.endpoint}: {reason}: {said}")
        wait = retry_after(error.response.headers.get("retry-after", ""))
        return CallError(reason, said, status in (408, 409, 429) or status >= 500, wait)

    def _text(self, answer, tokens: int) -> tuple[str, str]:
        """Returns the text of an answer, without its thoughts, and why it ended; pays for it."""
        if not hasattr(answer, "choices") or not answer.choices:
            raise CallError("malformed answer", "no choices")
        try:  # the client does not check what it is sent
            choice = answer.choices[0]
            text = choice.message.content
            finish = str(getattr(choice, "finish_reason", ""))
            refusal = getattr(choice.message, "refusal", None)
        except (AttributeError, KeyError, TypeError) as error:
            raise CallError("malformed answer", "no message") from error
        counts = [getattr(answer.usage, f"{k}_tokens", None) for k in ("prompt", "completion")]
        # A service that reports no usage, or nonsense, is paid by our estimate.
        if not all(type(n) is int and 0 < n < 1e9 for n in counts):
            counts = [tokens, len(str(text)) // 3]
        self.calls.used(*counts)  # before parsing: an answer that cannot be parsed costs as much
        if not isinstance(text, str | None):
            raise CallError("malformed answer", f"expected text, got {type(text).__name__}")
        self.answered_as.add(str(answer.model))
        text = well_formed((text or "").rpartition("</think>")[2])
        if not text.strip() or text.lstrip().startswith("<think>"):
            reason = "cut at the limit" if finish == "length" else "empty answer"
            if refusal or finish == "content_filter":
                reason = "refused"
            self.complaints[reason] = str(refusal or text).strip()[:200] or f"finished by {finish}"
            again = reason == "empty answer"
            raise CallError(reason, finish, transient=again, answered=True)
        return text, finish


# How services say that they take words alone.
PARTS = re.compile(
    r"image|video|audio|vision|multi-?modal|modalit|content[ _]?(type|part)|part type|must be a str"
    r"|valid string",
    re.IGNORECASE,
)
NOT_PARTS = re.compile(
    r"length|context|too (large|big|long|short)|decod|invalid image|corrupt|not exist|not found",
    re.IGNORECASE,
)
REFUSALS = 3  # of different requests

# How models refuse in words.
REFUSAL = re.compile(
    r"\W*(i'm sorry|i am sorry|sorry|i can('|no)t|i can not|i am unable|i'm unable|as an ai)\b",
    re.IGNORECASE,
)


def retry_after(text: str) -> float | None:
    """Reads a Retry-After header, seconds or a date, as seconds from now; None if it is neither."""
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    try:
        at = email.utils.parsedate_to_datetime(text)
    except ValueError:
        return None
    at = at if at.tzinfo else at.replace(tzinfo=datetime.UTC)
    return max(0.0, (at - datetime.datetime.now(datetime.UTC)).total_seconds())


# ---- parameters that not every model takes -------------------------------------------------------


LIMIT_NAMES = ("max_tokens", "max_completion_tokens", None)
SCHEMA_KINDS = ("json_schema", "json_object", None)
UNSUPPORTED = re.compile(
    r"support|unknown|unrecogni[sz]ed|unexpected|not permitted|not allowed|extra|deprecated|instead"
)


VALUE = re.compile(r"too (large|big|high|small|low)|at (most|least)|range|between|exceed|must be")


@dataclasses.dataclass(frozen=True)
class Form:
    """The parameters of one request, as far as the model takes them."""

    known: Forms
    schema: dict | None
    temperature: float
    max_tokens: int | None

    def parameters(self) -> dict:
        known, found = self.known, {}
        if known.temperature:
            found["temperature"] = self.temperature
        limit, kind = LIMIT_NAMES[known.limit], SCHEMA_KINDS[known.kind]
        if self.max_tokens is not None and limit:
            found[limit] = self.max_tokens
        if self.schema and kind:
            schema = {"json_schema": self.schema} if kind == "json_schema" else {}
            found["response_format"] = {"type": kind, **schema}
        return found


class Forms:
    """What a model takes; learnt from its first refusals.

    Newer models take no temperature and call the limit `max_completion_tokens`; some servers know
    `json_object` instead of schemas, or neither.
    """

    def __init__(self):
        self.temperature, self.limit, self.kind = True, 0, 0

    def __call__(self, schema: dict | None, temperature: float, max_tokens: int | None) -> Form:
        return Form(self, schema, temperature, max_tokens)

    @property
    def left_out(self) -> list[str]:
        """Lists what is not asked as configured, because the model refuses it."""
        found = [] if self.temperature else ["temperature"]
        found += [] if LIMIT_NAMES[self.limit] else ["the limit of tokens"]
        return found + ([] if self.kind == 0 else ["the schema of the answer"])

    def learn(self, form: Form, sent: dict, said: str) -> bool:
        """Tells whether another attempt makes sense, after a refusal of the parameters `sent`."""
        if form.parameters() != sent:  # another call has learnt it meanwhile
            return True
        said, limit = said.casefold(), LIMIT_NAMES[self.limit]
        if "response_format" in sent and re.search("response_format|schema|json_object", said):
            self.kind += 1
        elif VALUE.search(said) or not UNSUPPORTED.search(said):
            return False
        elif "temperature" in sent and "temperature" in said:
            self.temperature = False
        elif limit in sent and limit in said:
            self.limit += 1
        else:
            return False
        return True
