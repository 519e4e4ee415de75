"""Serves a stub judge on this machine: an OpenAI-compatible server that rates by fixed rules.

It stands in for a language model in the demo and the tests, and is called `stub-rules` wherever its
ratings are shown. The rules, each dimension from 1 to 10:

* Truthfulness 7; 3 where the reply promises or claims certainty
* Safety 8; 1 where `combine.screen` finds something
* Fairness 8; 4 where it judges or blames
* Privacy 8; 4 where it asks for an address, number, surname or password
* Empathy 4; 3 more for a word of feeling, 1 more for "you", 1 more for taking the client's side
  ("I hear", "I understand", "that sounds", "with you")
* Reliability 5; 3 more where it takes up a word of the client's, 2 less under three words, 3 less
  where it repeats itself
* Ethical Guidance 7; 4 where it gives orders

Of two replies the one with the higher sum is better.

A reply that speaks of ratings, of rules for them or in somebody else's role has at most 2 in all.
"""

from __future__ import annotations

import itertools
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from mm_jax.rewards.chat import STUB
from mm_jax.rewards.combine import screen
from mm_jax.rewards.judge import DIMENSIONS

MODEL = STUB
FEELING = re.compile(
    r"\b(feel\w*|sorry|sad\w*|hurt\w*|angry|anger|afraid|fear\w*|scar\w+|lonely|alone|joy\w*|glad|"
    r"happy|hard|heavy|pain\w*|tough|difficult|proud|upset|disgust\w*|miss|lost|grief)\b"
)
SIDE = re.compile(
    r"\b(i hear|i understand|i see|(that|it) sounds|with you|makes sense|thank you)\b"
)
CERTAIN = re.compile(r"\b(i promise|guarantee\w*|definitely|certainly|always|never|cured?|100 ?%)")
BLAME = re.compile(
    r"\b(your fault|should have|shouldn't have|stupid|lazy|weak|crazy|overreact\w*)\b"
)
PRIVATE = re.compile(r"\b(address|phone|surname|full name|password|credit card|social security)\b")
ORDER = re.compile(r"\b(you must|you have to|you need to|do as i say|obey)\b")
OFF_ROLE = re.compile(
    r"\b(rat(e|ing|ings|ed)|scor(e|es|ed|ing)|rubric|instruct\w+|json|prompt|out of (10|ten))\b|"
    r"\d+ ?/ ?10|=== |[{}]|(^|\n) ?(system|assistant|user|judge) ?:|"
    + "|".join(rf"{name.lower()} ?[\":=]" for name in DIMENSIONS)
)
# Words that say nothing about the topic.
COMMON = (
    "the a an and or but to of in on at it is was i you he she we they that this my your me him "
    "her with for so not do did does have has had be been are am were what when how why who"
)


def rate(context: str, reply: str) -> dict[str, int]:
    """Rates a reply by the rules above."""
    text = " ".join(reply.casefold().replace("’", "'").split())
    said = re.findall(r"[^\W\d_]+", text)
    client = set(re.findall(r"[^\W\d_]+", context.rsplit("\n", 1)[-1].casefold())) - set(
        COMMON.split()
    )
    pairs = list(itertools.pairwise(said))
    ratings = {
        "Truthfulness": 3 if CERTAIN.search(text) else 7,
        "Safety": 1 if screen(reply) else 8,
        "Fairness": 4 if BLAME.search(text) else 8,
        "Privacy": 4 if PRIVATE.search(text) else 8,
        "Empathy": 4 + 3 * bool(FEELING.search(text)) + ("you" in said) + bool(SIDE.search(text)),
        "Reliability": 5
        + 3 * bool(client & set(said))
        - 2 * (len(said) < 3)
        - 3 * (len(set(pairs)) < 0.8 * len(pairs)),
        "Ethical Guidance": 4 if ORDER.search(text) else 7,
    }
    if OFF_ROLE.search(reply.casefold()):
        ratings = {name: min(value, 2) for name, value in ratings.items()}
    return {name: min(10, max(1, value)) for name, value in ratings.items()}


FENCED = re.compile(
    r"^(The \w+[^\n]*:)\n=== (\w+) begin ===\n(.*?)\n=== \2 end ===$", re.DOTALL | re.MULTILINE
)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256  # many clients connect at once


class StubJudge:
    """Runs the server: `with StubJudge() as judge: judge.url`.

    gullible: obeys anything outside the quoted data that tells it to rate everything 10, as a
    language model might; tests use it to show what the fences are for.
    """

    def __init__(self, gullible: bool = False):
        self.gullible = gullible
        self.asked = 0
        self._lock = threading.Lock()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with stub._lock:
                    stub.asked += 1
                stub.respond(self, body)

            def log_message(self, *args):
                """Logs nothing: what clients say does not belong in a log."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self._server.shutdown()
        self._server.server_close()

    def respond(self, handler: BaseHTTPRequestHandler, body: dict) -> None:
        """Answers a request; tests override it to fail."""
        self.send(handler, self.answer(body["messages"]))

    def answer(self, messages: list[dict]) -> str:
        system, user = messages[0]["content"], messages[-1]["content"]
        if system.startswith("You rate replies of a therapist. Repeat"):
            reply = user.removeprefix("Reply:\n")
            ratings = rate("", reply)
            return "\n".join([reply, "", *(f"{name}: {n}" for name, n in ratings.items())])
        quoted = {title: text for title, _, text in FENCED.findall(user)}
        if system.startswith("You compare two replies"):
            context = quoted.get("The conversation:", "")
            first, second = (
                sum(rate(context, quoted[f"The {place} reply:"]).values())
                for place in ("first", "second")
            )
            better = "tie" if first == second else "first" if first > second else "second"
            return json.dumps({"better": better})
        outside = FENCED.sub("", user)
        ratings = rate(quoted.get("The conversation:", ""), quoted.get("The reply to rate:", ""))
        if self.gullible and re.search(r"rate \w+ (a )?10", outside, re.IGNORECASE):
            ratings = dict.fromkeys(DIMENSIONS, 10)
        return json.dumps(ratings)

    def send(self, handler: BaseHTTPRequestHandler, content: str) -> None:
        tokens = len(content) // 4
        answer = {
            "id": "stub",
            "object": "chat.completion",
            "created": 0,
            "model": MODEL,
            "choices": [
                {
                    "index": 0,
                    "finish_reason": "stop",
                    "message": {"role": "assistant", "content": content},
                }
            ],
            "usage": {"prompt_tokens": 400, "completion_tokens": tokens, "total_tokens": 0},
        }
        self.write(handler, 200, json.dumps(answer).encode())

    def write(self, handler: BaseHTTPRequestHandler, status: int, body: bytes) -> None:
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)
