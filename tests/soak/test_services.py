"""Makes ten thousand calls to a judge that fails in every way at random rates (two minutes)."""

import asyncio
import collections
import json
import math
import random
import threading

import pytest

from mm_jax.config.reward import Judge, Limits
from mm_jax.rewards.base import Request
from mm_jax.rewards.judge import TrustJudge
from mm_jax.rewards.stub import StubJudge
from tests.support.rewards import SAMPLE

pytestmark = pytest.mark.slow

CALLS, ROUND = 10_000, 500
FAULTS = ("HTTP 429", "HTTP 500", "HTTP 503", "HTTP 400", "connection", "malformed answer")
FAULTS += ("unparseable", "empty answer", "refused", "cut at the limit", "no choices", "late")


class Unruly(StubJudge):
    """Fails at a rate that changes from round to round, in one of FAULTS; counts what it did."""

    def __init__(self):
        super().__init__()
        self.rate, self.dice = 0.0, random.Random(0)
        self.did, self.lock = collections.Counter(), threading.Lock()

    def respond(self, handler, body):
        with self.lock:
            fault = self.dice.choice(FAULTS) if self.dice.random() < self.rate else "good"
            self.did[fault] += 1
        good = self.answer(body["messages"])
        if fault.startswith("HTTP"):
            return self.write(handler, int(fault[5:]), b'{"error": {"message": "not now"}}')
        if fault == "connection":
            handler.close_connection = True
            return handler.connection.close()
        if fault == "late":  # the caller hangs up
            return handler.rfile.read(1)
        if fault == "malformed answer":
            return self.write(handler, 200, b"<html>gateway</html>")
        message, finish = good, "stop"
        if fault == "unparseable":
            message = good[:-9]
        elif fault == "empty answer":
            message = None
        elif fault == "refused":
            message = "I'm sorry, I can't help with that."
        elif fault == "cut at the limit":
            message, finish = good[: len(good) // 2], "length"
        choices = [{"index": 0, "finish_reason": finish, "message": {"content": message}}]
        answer = {"id": "x", "model": "stub", "choices": [] if fault == "no choices" else choices}
        return self.write(handler, 200, json.dumps(answer).encode())


REASON = {"late": "timeout", "no choices": "malformed answer"}


def test_ten_thousand_calls_are_counted_right():
    limits = Limits(attempts=3, backoff=0.0, backoff_max=0.01, timeout=1.0, concurrency=32,
                    breaker_failures=10_000)  # fmt: skip

    async def ask():
        judge = TrustJudge(Judge(model="stub-rules", base_url=stub.url, unit="response"), limits)
        scores = []
        for start in range(0, CALLS, ROUND):
            stub.rate = stub.dice.choice([0.0, 0.05, 0.3, 0.7, 1.0])
            texts = [f"I hear you, that sounds hard, number {start + i}." for i in range(ROUND)]
            scores += await judge.score([Request(SAMPLE, text) for text in texts])
        await judge.close()
        return scores, judge.chat.calls

    with Unruly() as stub:
        scores, calls = asyncio.run(ask())
    failed = [s for s in scores if not s.valid]
    print(f"{CALLS} calls, {calls.attempts} attempts, {len(failed)} failed; {dict(stub.did)}")
    assert len(scores) == calls.calls == CALLS
    assert calls.attempts == sum(stub.did.values())
    injected = collections.Counter()
    for fault, n in stub.did.items():
        if fault != "good":
            injected[REASON.get(fault, fault)] += n
    assert dict(calls.failed) == dict(injected)
    assert sum(calls.lost.values()) == len(failed)
    assert all(s.value > 0 if s.valid else math.isnan(s.value) for s in scores)
    assert len(scores) - len(failed) == stub.did["good"]
