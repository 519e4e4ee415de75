"""Measures a running server (`python -m mm_jax serve`): latency, long conversations, and load.

python tools/bench_serve.py --url http://127.0.0.1:8000 --clip FILE.webm --clients 32 --minutes 10
"""

from __future__ import annotations

import argparse
import base64
import collections
import json
import os
import pathlib
import random
import re
import statistics
import sys
import threading
import time

import httpx2

TEXTS = (
    "I lost my job last week.",
    "My sister does not call me any more, and I do not know what I did.",
    "I cannot sleep.",
    "There was a good day yesterday: we went to the lake, all of us, and nobody argued.",
)


class Client:
    def __init__(self, url: str, token: str):
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.http = httpx2.Client(base_url=url, headers=headers, timeout=180)

    def turn(self, content, **more) -> tuple[int, float, float, int]:
        """Returns (status, seconds to the first words, seconds, tokens)."""
        body = {
            "model": "mm_jax",
            "messages": [{"role": "user", "content": content}],
            "stream": True,
            "stream_options": {"include_usage": True},
            **more,
        }
        began, first, tokens = time.perf_counter(), 0.0, 0
        with self.http.stream("POST", "/v1/chat/completions", json=body) as answer:
            if answer.status_code != 200:
                answer.read()
                return answer.status_code, 0.0, time.perf_counter() - began, 0
            for line in answer.iter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    return 500, first, time.perf_counter() - began, tokens
                if not first and chunk["choices"] and chunk["choices"][0]["delta"].get("content"):
                    first = time.perf_counter() - began
                tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
        return 200, first, time.perf_counter() - began, tokens

    def metric(self, name: str) -> float:
        text = self.http.get("/metrics").text
        return sum(float(x) for x in re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.M))


def clip_part(path: pathlib.Path) -> dict:
    data = base64.b64encode(path.read_bytes()).decode()
    return {"type": "video_url", "video_url": {"url": f"data:video/webm;base64,{data}"}}


def latency(client: Client, clip: dict | None) -> None:
    for name, content in (("text", TEXTS[0]), ("clip", clip and [clip])):
        if content:
            client.turn(content)
            own = [client.turn(content)[1] for _ in range(20)]
            print(f"{name}: first words after {statistics.median(own):.3f} s (most {max(own):.3f})")


def long_conversation(client: Client, turns: int) -> None:
    path = f"/v1/conversations/{client.http.post('/v1/conversations', json={}).json()['id']}"
    times = []
    for i in range(turns):
        began = time.perf_counter()
        body = {"content": f"This is turn {i}, and I still think of it.", "max_tokens": 4}
        client.http.post(f"{path}/turns", json=body).raise_for_status()
        times.append(time.perf_counter() - began)
    client.http.delete(path)
    parts = {"5 to 15": times[5:15], f"the last 10 of {turns}": times[-10:]}
    print("turns: " + ", ".join(f"{k} {statistics.median(v):.3f} s" for k, v in parts.items()))


def load(url: str, token: str, count: int, minutes: float, clip: dict | None, pid: int) -> None:
    """Lets `count` clients talk, a fifth of them with clips."""
    statuses: collections.Counter[int] = collections.Counter()
    firsts, tokens, lock = [], [0], threading.Lock()
    began = time.monotonic()
    end = began + 60 * minutes

    def talk(number: int) -> None:
        rng, client = random.Random(number), Client(url, token)
        while time.monotonic() < end:
            with_clip = clip is not None and rng.random() < 0.2
            content = [clip] if with_clip else rng.choice(TEXTS)
            try:
                status, first, _, n = client.turn(content, temperature=1.0)
            except httpx2.HTTPError as error:
                status, first, n = type(error).__name__, 0.0, 0
            with lock:
                statuses[status] += 1
                tokens[0] += n
                firsts.append(first) if status == 200 else None
            if status == 429:
                time.sleep(1 + rng.random())

    threads = [threading.Thread(target=talk, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    memory = []
    while any(thread.is_alive() for thread in threads):
        if pid:
            memory.append(resident(pid))
        time.sleep(5)
    took = time.monotonic() - began
    firsts.sort()
    print(
        f"{count} clients, {took / 60:.1f} minutes: answers by status {dict(statuses)}, "
        f"{tokens[0] / took:.1f} tokens/s, first words after {statistics.median(firsts):.2f} s "
        f"(95 %: {firsts[int(0.95 * len(firsts))]:.2f})"
    )
    if memory:
        tenth = max(1, len(memory) // 10)
        parts = [statistics.median(memory[i : i + tenth]) for i in range(0, len(memory), tenth)]
        print("resident MB over time: " + ", ".join(f"{mb:.0f}" for mb in parts))


def resident(pid: int) -> float:
    text = pathlib.Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", text)[1]) / 1024


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:8000")
    add("--clip", type=pathlib.Path, help="a recording, for turns with a clip")
    add("--turns", type=int, default=200, help="of a long conversation (default 200)")
    add("--clients", type=int, default=32)
    add("--minutes", type=float, default=1.0, help="of load (default 1)")
    add("--pid", type=int, default=0, help="of the server, to watch its memory")
    args = parser.parse_args()
    token = os.environ.get("MM_JAX_TOKEN", "")
    clip = clip_part(args.clip) if args.clip else None
    client = Client(args.url, token)
    latency(client, clip)
    long_conversation(client, args.turns)
    for count, minutes in ((1, min(1.0, args.minutes)), (args.clients, args.minutes)):
        load(args.url, token, count, minutes, clip, args.pid)
    names = ("requests_total", "refused_total", "cancelled_total", "failures_total")
    print(", ".join(f"{name} {client.metric(f'mm_jax_{name}'):.0f}" for name in names))
    return 0


if __name__ == "__main__":
    sys.exit(main())
