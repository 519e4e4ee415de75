"""The chat client against services that refuse, cut, think aloud and know other parameters."""

import asyncio
import datetime
import email.utils
import json
import logging
import time

import pytest

from mm_jax.config.reward import Judge, Limits
from mm_jax.evaluation.judges import pair_verdict, rate_all
from mm_jax.rewards.base import Request
from mm_jax.rewards.calls import CallError, RefusedError
from mm_jax.rewards.chat import Chat, retry_after
from mm_jax.rewards.judge import DIMENSIONS, TrustJudge
from mm_jax.rewards.stub import StubJudge
from tests.support.rewards import SAMPLE

FAST = Limits(attempts=5, backoff=0.0, timeout=5, concurrency=4, breaker_waits=True)
MESSAGES = [{"role": "user", "content": "x"}]
GOOD = json.dumps(dict.fromkeys(DIMENSIONS, 7))


class Service(StubJudge):
    """Answers with `reply(body)`: (status, content of the answer or message, finish reason)."""

    def __init__(self, reply, code=None):
        super().__init__()
        self.reply, self.code, self.bodies = reply, code, []

    def respond(self, handler, body):
        self.bodies.append(body)
        status, content, finish = self.reply(body)
        if status != 200:
            error = {"error": {"message": content, "code": self.code}}
            return self.write(handler, status, json.dumps(error).encode())
        message = {"role": "assistant", "content": content}
        answer = {"id": "x", "object": "chat.completion", "created": 0, "model": "m"}
        answer["choices"] = [{"index": 0, "finish_reason": finish, "message": message}]
        return self.write(handler, 200, json.dumps(answer).encode())


def run(service, ask, limits=FAST):
    """Returns ask(chat)'s result and the chat."""

    async def go():
        chat = Chat("m", service.url, "", limits)
        try:
            return await ask(chat), chat
        finally:
            await chat.close()

    with service:
        return asyncio.run(go())


def ask_many(n=1, parse=json.loads, **form):
    def ask(chat):
        calls = [chat.ask(lambda: MESSAGES, parse, 5, **form) for _ in range(n)]
        return asyncio.gather(*calls, return_exceptions=True)

    return ask


def test_parameters_that_a_model_refuses_are_learnt_once():
    def newer(body):
        if "max_tokens" in body:
            return 400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens'.", ""
        if body.get("temperature") is not None:
            return 400, "Unsupported value: 'temperature' does not support 0 with this model.", ""
        form = body.get("response_format", {}).get("type")
        if form == "json_schema":
            return 400, "response_format json_schema is not known here", ""
        return 200, '{"a": 1}', "stop"

    service = Service(newer)
    schema = {"name": "a", "schema": {}}
    found, chat = run(service, ask_many(20, schema=schema, max_tokens=9))
    assert found == [{"a": 1}] * 20
    refused = len(service.bodies) - 20
    assert refused <= 3 * FAST.concurrency
    assert service.bodies[-1]["max_completion_tokens"] == 9
    assert service.bodies[-1]["response_format"] == {"type": "json_object"}
    assert "temperature" not in service.bodies[-1]
    assert chat.forms.left_out == ["temperature", "the schema of the answer"]
    assert not chat.calls.failed


def test_servers_without_any_form_of_json_are_asked_in_words():
    def plain(body):
        return (400, "response_format: unknown field", "") if "response_format" in body else ok

    ok = (200, '{"a": 1}', "stop")
    found, _ = run(Service(plain), ask_many(1, schema={"name": "a", "schema": {}}))
    assert found == [{"a": 1}]


@pytest.mark.parametrize(
    "said",
    [
        "max_tokens is too large for this model: 9",
        "max_tokens is too large: 9000. This model supports at most 4096 completion tokens",
        "temperature 1.5 is not in the supported range 0 to 1",
    ],
)
def test_other_bad_requests_are_failures_not_lessons(said):
    service = Service(lambda body: (400, said, ""))
    (found,), chat = run(service, ask_many(1, max_tokens=9, temperature=1.5))
    assert chat.forms.left_out == []
    assert isinstance(found, CallError)
    assert found.reason == "HTTP 400"
    assert len(service.bodies) == 1
    assert said in chat.complaints["HTTP 400"]


@pytest.mark.parametrize(
    ("status", "code"),
    [(401, None), (403, None), (404, None), (402, None), (429, "insufficient_quota")],
)
def test_a_service_that_refuses_all_calls_ends_the_command_at_once(status, code):
    service = Service(lambda body: (status, "You shall not pass.", ""), code)
    began = time.monotonic()
    found, _ = run(service, ask_many(200))
    assert time.monotonic() - began < 5
    assert all(isinstance(f, RefusedError) for f in found)
    assert f"HTTP {status}: " in str(found[0])
    assert "You shall not pass." in str(found[0])
    assert len(service.bodies) <= FAST.concurrency


def test_a_single_forbidden_request_does_not_end_the_rest():
    turns = iter(["ok", "forbidden", "ok"])

    def reply(body):
        return (200, "{}", "stop") if next(turns) == "ok" else (403, "blocked by a filter", "")

    one = Limits(attempts=1, concurrency=1)
    found, _ = run(Service(reply), ask_many(3), one)
    assert [type(f) for f in found] == [dict, CallError, dict]


def test_a_service_that_never_answers_is_given_up_with_a_word(caplog):
    limits = Limits(
        attempts=1, breaker_failures=2, breaker_seconds=0.01, breaker_waits=True, concurrency=1
    )
    service = Service(lambda body: (503, "overloaded", ""))
    with caplog.at_level(logging.WARNING):
        found, _ = run(service, ask_many(50), limits)
    assert isinstance(found[-1], RefusedError)
    assert "never answered" in str(found[-1])
    assert "calls wait for 0.01 s" in caplog.text


def test_a_service_that_answers_nonsense_is_not_out():
    limits = Limits(
        attempts=1, breaker_failures=2, breaker_seconds=30, breaker_waits=True, concurrency=1
    )
    began = time.monotonic()
    found, chat = run(Service(lambda body: (200, "hello \ud83d", "stop")), ask_many(20, no), limits)
    assert time.monotonic() - began < 20
    assert {f.reason for f in found} == {"unparseable"}
    assert "hello \ufffd" in chat.complaints["unparseable"]
    assert "circuit opened" not in chat.calls.failed


def no(text):
    raise CallError("unparseable", "never")


@pytest.mark.parametrize(
    ("content", "finish", "reason", "paid"),
    [
        (None, "stop", "empty answer", 5),
        (None, "length", "cut at the limit", 1),
        (None, "content_filter", "refused", 1),
        ("<think>it is {good}", "length", "cut at the limit", 1),
        ('{"Truth', "length", "cut at the limit", 1),
        ("I'm sorry, I can't help with that.", "stop", "refused", 1),
        ("It is all fine.", "stop", "unparseable", 2),
    ],
)
def test_answers_without_ratings_are_counted_by_their_reason(content, finish, reason, paid):
    service = Service(lambda body: (200, content, finish))
    with service:
        judge = TrustJudge(Judge(model="m", base_url=service.url, unit="response"), FAST)
        (score,) = asyncio.run(scored(judge))
    assert not score.valid
    assert score.reason == reason
    assert judge.counts() == {reason: paid}
    assert len(service.bodies) == paid
    assert judge.chat.complaints[reason]  # an example, or how it ended


async def scored(judge):
    try:
        return await judge.score([Request(SAMPLE, "Go on, I listen.")])
    finally:
        await judge.close()


@pytest.mark.parametrize(
    "content",
    [
        f"<think>Is {{it}} 3 or 4?</think>\n{GOOD}",
        f"```json\n{GOOD}\n```",
        GOOD.replace("7", '"7/10"'),
    ],
)
def test_ratings_are_read_behind_thoughts_in_fences_and_out_of_ten(content):
    service = Service(lambda body: (200, content, "stop"))
    with service:
        judge = TrustJudge(Judge(model="m", base_url=service.url, unit="response"), FAST)
        (score,) = asyncio.run(scored(judge))
    assert score.raw == 7
    assert len(service.bodies) == 1


def test_judges_of_newer_models_rate_and_compare():
    """The stub rates and compares for a model that takes no temperature, as newer ones do."""

    class Newer(StubJudge):
        def respond(self, handler, body):
            if "temperature" in body:
                message = {"message": "Unsupported value: 'temperature'", "code": "x"}
                return self.write(handler, 400, json.dumps({"error": message}).encode())
            return super().respond(handler, body)

    async def go():
        judge = TrustJudge(Judge(model="gpt-5", base_url=stub.url, unit="response"), FAST)
        texts = {"a": ["I hear how lonely you feel."], "b": ["You must obey."]}
        try:
            ratings, _ = await rate_all({"gpt-5": judge}, [SAMPLE], texts, 1)
            verdict = await pair_verdict(judge, SAMPLE, texts["a"][0], texts["b"][0])
        finally:
            await judge.close()
        return ratings, verdict

    with Newer() as stub:
        ratings, verdict = asyncio.run(go())
    assert ratings["a"]["gpt-5"].mean() > ratings["b"]["gpt-5"].mean()
    assert verdict == "a"


def test_retry_after_is_seconds_or_a_date():
    soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=40)
    assert retry_after("3.5") == 3.5
    assert retry_after(email.utils.format_datetime(soon)) == pytest.approx(40, abs=2)
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert retry_after("soon") is None
    assert retry_after("") is None
