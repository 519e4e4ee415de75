"""Starts `serve` in a process of its own, and talks to it."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parents[2]


class Served:
    """A running server. url: its address, without a path."""

    def __init__(self, process: subprocess.Popen, url: str, token: str = ""):
        self.process, self.url, self.token = process, url, token

    def ask(
        self,
        path: str,
        body=None,
        method: str | None = None,
        headers: dict[str, str] | None = None,
        timeout: float = 60,
    ) -> tuple[int, dict | str]:
        """Returns (status, JSON or text). body: an object, or bytes that are sent as they are."""
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        sent = {"Content-Type": "application/json"} if data is not None else {}
        if self.token:
            sent["Authorization"] = f"Bearer {self.token}"
        request = urllib.request.Request(
            self.url + path, data, {**sent, **(headers or {})}, method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                status, kind, text = answer.status, answer.headers["Content-Type"], answer.read()
        except urllib.error.HTTPError as error:
            status, kind, text = error.code, error.headers["Content-Type"], error.read()
        return status, json.loads(text) if "json" in kind else text.decode()

    def metric(self, name: str, labels: str = "") -> float:
        """Reads a number of /metrics; 0 where it was never counted."""
        _, text = self.ask("/metrics")
        found = [line.split()[-1] for line in text.splitlines() if line.startswith(name + labels)]
        return sum(map(float, found))

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)


@contextlib.contextmanager
def serve(
    run: pathlib.Path, *arguments: str, token: str = "", folder: pathlib.Path | None = None
) -> Iterator[Served]:
    """Serves a run at a free port of this machine, on the devices of the tests; `folder` is where
    it works."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MM_JAX_TOKEN": token}
    command = [sys.executable, "-m", "mm_jax", "serve", f"--checkpoint={run}", "--port=0"]
    with subprocess.Popen(
        [*command, *arguments], env=environment, cwd=folder, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            line = process.stdout.readline()
            assert " at http://" in line, line
            yield Served(process, line.split()[-1], token)
        finally:
            process.kill()
