"""A chat model at an OpenAI-compatible endpoint, asked within limits (`calls.py`)."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import TypeVar

from mm_jax.config.errors import ConfigError
from mm_jax.rewards.calls import CallError, Calls, Ledger, Limits

T = TypeVar("T")


def api_key(model: str, base_url: str, key_variable: str) -> str:
    """The key of an endpoint. Raises ConfigError where OpenAI's has none."""
    key = os.environ.get(key_variable, "")
    if not key and not base_url:
        raise ConfigError(f"model {model}: the environment variable {key_variable} holds no key")
    return key or "none"  # local servers want some


class Chat:
    """model and base_url of an endpoint ("": OpenAI's); the key is in the environment variable
    ("": there is none).

    endpoint: where it really is; answered_as: the model names that it gave with its answers;
    complaints: reason of a failed attempt -> the last message of the service.
    """

    def __init__(
        self,
        model: str,
        base_url: str,
        key_variable: str,
        limits: Limits = Limits(),
        ledger: Ledger | None = None,
    ):
        import openai

        key = api_key(model, base_url, key_variable)
        self.model = model
        self._openai = openai
        self._client = openai.AsyncOpenAI(
            api_key=key, base_url=base_url or None, max_retries=0, timeout=limits.timeout
        )
        self.endpoint = str(self._client.base_url)
        self.calls = Calls(limits, ledger=ledger)
        self.answered_as: set[str] = set()
        self.complaints: dict[str, str] = {}

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
        """`parse` of the answer's text, tried again as `Calls.run` does. `messages()` is called for
        every attempt; `tokens` is an estimate for the rate limit; `parse` raises CallError."""
        form = {"response_format": {"type": "json_schema", "json_schema": schema}} if schema else {}
        if max_tokens is not None:
            form["max_tokens"] = max_tokens
        return await self.calls.run(
            lambda: self._once(messages(), parse, tokens, temperature, form), tokens=tokens
        )

    async def _once(self, messages, parse, tokens, temperature, form):
        errors = self._openai
        try:
            answer = await self._client.chat.completions.create(
                model=self.model, messages=messages, temperature=temperature, **form
            )
        except errors.APITimeoutError as error:
            raise CallError("timeout") from error
        except errors.APIConnectionError as error:
            raise CallError("connection") from error
        except errors.APIStatusError as error:
            transient = error.status_code in (408, 409, 429) or error.status_code >= 500
            wait = error.response.headers.get("retry-after", "")
            seconds = float(wait) if re.fullmatch(r"\d+(\.\d+)?", wait) else None
            reason = f"HTTP {error.status_code}"
            said = re.sub(r"\b(sk|key)-\S+", "...", str(error.message))[:300]  # no part of a key
            self.complaints[reason] = said
            raise CallError(reason, said, transient, seconds) from error
        except (errors.APIError, ValueError, RecursionError) as error:  # no JSON that one can read
            raise CallError("malformed answer", str(error)[:200]) from error
        if not hasattr(answer, "choices") or not answer.choices:
            raise CallError("malformed answer", "no choices")
        try:  # the client does not check what it is sent
            text = answer.choices[0].message.content or ""
        except (AttributeError, KeyError, TypeError) as error:
            raise CallError("malformed answer", "no message") from error
        counts = [getattr(answer.usage, f"{k}_tokens", None) for k in ("prompt", "completion")]
        # It does not count, or nonsense: our estimate.
        if not all(type(n) is int and 0 < n < 1e9 for n in counts):
            counts = [tokens, len(str(text)) // 3]
        self.calls.used(*counts)
        if not isinstance(text, str):
            raise CallError("malformed answer", f"expected text, got {type(text).__name__}")
        self.answered_as.add(str(answer.model))
        return parse(text)
