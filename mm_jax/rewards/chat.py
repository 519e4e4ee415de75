"""A chat model at an OpenAI-compatible endpoint, asked within limits (`calls.py`)."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import TypeVar

from mm_jax.config import ConfigError
from mm_jax.rewards.calls import CallError, Calls, Limits

T = TypeVar("T")


class Chat:
    """model and base_url of an endpoint ("": OpenAI's); the key is in the environment variable.

    answered_as: the model names that the endpoint gave with its answers.
    """

    def __init__(self, model: str, base_url: str, key_variable: str, limits: Limits = Limits()):
        import openai

        key = os.environ.get(key_variable, "")
        if not key:
            if not base_url:
                raise ConfigError(f"judge: the environment variable {key_variable} holds no key")
            key = "none"  # local servers want some
        self.model, self.base_url = model, base_url
        self._openai = openai
        self._client = openai.AsyncOpenAI(
            api_key=key, base_url=base_url or None, max_retries=0, timeout=limits.timeout
        )
        self.calls = Calls(limits)
        self.answered_as: set[str] = set()

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
            lambda: self._once(messages(), parse, temperature, form), tokens=tokens
        )

    async def _once(self, messages, parse, temperature, form):
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
            raise CallError(f"HTTP {error.status_code}", "", transient, seconds) from error
        except (errors.APIError, ValueError) as error:  # an answer that is no JSON at all
            raise CallError("malformed answer", str(error)[:200]) from error
        if not hasattr(answer, "choices") or not answer.choices:
            raise CallError("malformed answer", "no choices")
        if answer.usage is not None:
            self.calls.used(answer.usage.prompt_tokens, answer.usage.completion_tokens)
        self.answered_as.add(str(answer.model))
        return parse(answer.choices[0].message.content or "")
