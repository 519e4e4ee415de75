"""Provides a sample to rate, and a judge that fails."""

import random
import threading

from mm_jax.data.records import CLIENT, THERAPIST, Sample, Utterance
from mm_jax.rewards.stub import StubJudge

SAMPLE = Sample(
    id="d_3",
    dialogue_id="d",
    client_text="My brother left and I feel so alone.",
    labels={"client_emotion": "sadness"},
    response="That sounds lonely. What do you miss most about your brother?",
    history=(
        Utterance(THERAPIST, "How was your week?"),
        Utterance(CLIENT, "Not good."),
    ),
)


class FaultyJudge(StubJudge):
    """Fails at random in one of six ways, and counts how often in each."""

    KINDS = ("HTTP 429", "HTTP 500", "timeout", "malformed answer", "unparseable", "connection")

    def __init__(self, share, seed=0):
        super().__init__()
        self.share, self.random = share, random.Random(seed)
        self.injected = dict.fromkeys(self.KINDS, 0)
        self.lock = threading.Lock()

    def respond(self, handler, body):
        with self.lock:
            kind = self.random.choice(self.KINDS) if self.random.random() < self.share else None
            if kind:
                self.injected[kind] += 1
        if kind == "timeout":
            handler.rfile.read(1)  # until the caller hangs up
        if kind == "connection":
            handler.close_connection = True
            handler.connection.close()
        elif kind and kind.startswith("HTTP"):
            self.write(handler, int(kind[5:]), b'{"error": {"message": "no"}}')
        elif kind == "malformed answer":
            self.write(handler, 200, b"<html>gateway</html>")
        elif kind == "unparseable":
            self.send(handler, self.answer(body["messages"])[:-20])  # partial JSON
        elif kind is None:
            self.send(handler, self.answer(body["messages"]))
