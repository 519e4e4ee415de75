"""Counts what a server does, for /metrics; never what is said."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mm_jax.generation.live import Draft, Piece

SECONDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120)


class Counters:
    def __init__(self):
        self.registry = registry = CollectorRegistry()

        def make(kind, name: str, text: str, *labels: str, **more):
            return kind(f"mm_jax_{name}", text, labels, registry=registry, **more)

        self.requests = make(
            Counter, "requests", "Requests answered, by path and status", "path", "status"
        )
        self.waiting = make(Gauge, "turns_waiting", "Turns that wait for the model")
        self.running = make(Gauge, "turns", "Turns accepted and not finished")
        self.replies = make(Gauge, "batch_replies", "Replies decoded together in the last step")
        self.steps = make(Counter, "steps", "Steps of the running batch")
        self.step_seconds = make(Counter, "step_seconds", "Seconds spent in steps")
        self.tokens = make(Counter, "tokens", "Tokens of replies")
        self.prompt_tokens = make(Counter, "prompt_tokens", "Tokens of prompts")
        self.finished = make(Counter, "replies", "Replies, by how they ended", "reason")
        self.refused = make(Counter, "refused", "Turns refused because too many wait")
        self.cancelled = make(Counter, "cancelled", "Turns whose client went away")
        self.failures = make(Counter, "failures", "Steps that failed")
        self.safety = make(
            Counter, "safety", "Turns answered or ended by a fixed text, by reason", "reason"
        )
        self.media = make(Counter, "clips", "Turns with clips, by outcome", "outcome")
        self.conversations = make(Gauge, "conversations", "Conversations held")
        buckets = dict(buckets=SECONDS)
        self.first = make(
            Histogram, "first_token_seconds", "From a turn to its first token", **buckets
        )
        self.whole = make(Histogram, "turn_seconds", "From a turn to its end", **buckets)

    def step(self, told: Sequence, fill: int, waiting: int, seconds: float) -> None:
        """Counts a step of the model, after which `fill` replies are being decoded."""
        self.waiting.set(waiting)
        self.steps.inc()
        self.step_seconds.inc(seconds)
        self.replies.set(fill)
        for event in told:
            if isinstance(event, Draft):
                self.prompt_tokens.inc(event.prompt_tokens)
            elif isinstance(event, Piece):
                self.tokens.inc(len(event.tokens))
                if event.finished:
                    self.finished.labels(event.finished).inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)
