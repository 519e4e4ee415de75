"""Decodes clips that strangers sent, in worker processes that a bad clip may end."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence

import numpy as np

import mm_jax
from mm_jax.data.media import MediaSpec
from mm_jax.data.recording import MediaError
from mm_jax.serve.media_worker import TOO_MUCH_MEMORY

log = logging.getLogger(__name__)
PATIENCE = 20.0  # seconds for the clips of a turn
MOST_BYTES = 1 << 29  # of an answer's arrays


@dataclasses.dataclass(frozen=True)
class ClipLimits:
    """What a clip may have: seconds, pixels of a picture."""

    seconds: float = 120.0
    pixels: int = 4096 * 4096


@dataclasses.dataclass(frozen=True)
class Upload:
    """A clip as it was sent. kind: "video", "audio" or "image"."""

    kind: str
    data: bytes = dataclasses.field(repr=False)


class Worker:
    """A process that runs media_worker.py."""

    def __init__(self):
        ours, theirs = socket.socketpair()
        # Nothing of our environment, which may hold keys; its arithmetic needs one thread.
        environment = {
            "PATH": os.environ.get("PATH", ""),
            "PYTHONPATH": str(pathlib.Path(mm_jax.__file__).parents[1]),
            "MALLOC_ARENA_MAX": "2",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mm_jax.serve.media_worker"],
                stdin=theirs,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment,
                cwd="/",
                start_new_session=True,  # Ctrl-C is for the server
            )
        ours.settimeout(PATIENCE)
        self.socket, self.stream = ours, ours.makefile("rb")

    def ask(self, asked: dict, uploads: Sequence[Upload]) -> tuple[dict, dict[str, np.ndarray]]:
        """Returns the worker's answer and arrays. Raises OSError if it does not answer."""
        files = []
        try:
            for upload in uploads:  # in memory alone, and readable from its start by any reader
                files.append(os.memfd_create("clip", os.MFD_CLOEXEC))
                with open(files[-1], "wb", closefd=False) as file:
                    file.write(upload.data)
            socket.send_fds(self.socket, [json.dumps(asked).encode()], files)
        finally:
            for file in files:
                os.close(file)
        line = self.stream.readline(1 << 16)
        if not line.endswith(b"\n"):
            raise ConnectionError("the media worker has gone")
        told, arrays = json.loads(line), {}
        for name, (dtype, shape) in told.pop("arrays").items():
            dtype, shape = np.dtype(dtype), tuple(map(int, shape))
            size = int(np.prod(shape)) * dtype.itemsize
            if dtype.hasobject or not 0 <= size <= MOST_BYTES:
                raise ConnectionError("the media worker told nonsense")
            data = self.stream.read(size)
            if len(data) < size:
                raise ConnectionError("the media worker has gone")
            arrays[name] = np.frombuffer(data, dtype).reshape(shape)
        return told, arrays

    def stop(self) -> int:
        """Ends the process; returns its exit status."""
        self.stream.close()
        self.socket.close()
        # A worker that has ended by itself says why.
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(0.05)
        self.process.kill()
        self.process.wait()
        return 0


class MediaDecoder:
    """Decodes the clips of turns in `count` worker processes; the event loop's own object.

    restarts: how many workers had to be replaced.
    """

    def __init__(self, spec: MediaSpec, limits: ClipLimits, count: int = 2):
        self.spec, self.limits, self.count = spec, limits, count
        self.restarts = 0
        self.threads = concurrent.futures.ThreadPoolExecutor(count, "media")
        self.free: asyncio.Queue[Worker] = asyncio.Queue()
        for _ in range(count):
            self.free.put_nowait(Worker())

    async def decode(
        self, uploads: Sequence[Upload], sound: bool = False
    ) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        """Returns what `media_worker.work` does: the arrays of a `Sample` and their statuses, or
        with `sound` only the sound, float32[samples] at 16 kHz. Raises MediaError."""
        asked = {
            "kinds": [upload.kind for upload in uploads],
            "sound": sound,
            "spec": dataclasses.asdict(self.spec),
            **dataclasses.asdict(self.limits),
        }
        for _ in range(self.count + 1):
            worker = await self.free.get()
            loop = asyncio.get_running_loop()
            reading = loop.run_in_executor(self.threads, worker.ask, asked, uploads)
            try:
                # A caller that goes away does not free the worker: it still reads.
                told, arrays = await asyncio.shield(reading)
            except asyncio.CancelledError:
                reading.add_done_callback(lambda done, w=worker: self._give_back(w, done))
                raise
            except (OSError, ValueError, KeyError, TypeError) as error:
                status = self._replace(worker)
                if isinstance(error, TimeoutError):
                    raise MediaError("takes too long to decode") from error
                # Somebody else ended it: the clip may be good.
                if status == -signal.SIGKILL:
                    continue
                raise MediaError("corrupt") from error
            if told.get("error") == TOO_MUCH_MEMORY:  # what is left may not do for the next clip
                self._replace(worker)
            else:
                self.free.put_nowait(worker)
            if "error" in told:
                raise MediaError(told["error"])
            return arrays, told
        raise MediaError("corrupt")

    def _give_back(self, worker: Worker, reading: asyncio.Future) -> None:
        if reading.cancelled() or reading.exception() is not None:
            self._replace(worker)
        else:
            self.free.put_nowait(worker)

    def _replace(self, worker: Worker) -> int:
        status = worker.stop()
        self.restarts += 1
        log.warning("a media worker ended (%s) and was replaced", status)
        self.free.put_nowait(Worker())
        return status

    def stop(self) -> None:
        self.threads.shutdown(wait=False, cancel_futures=True)
        while not self.free.empty():
            self.free.get_nowait().stop()
