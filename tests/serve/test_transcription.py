"""Tests the writing down of what is said, for the page."""

import base64
import contextlib
import types

import fastapi.testclient
import numpy as np
import pytest

from mm_jax.data.recording import MediaError
from mm_jax.data.speech import Transcript
from mm_jax.serve.app import Service, create_app
from mm_jax.serve.counters import Counters

CLIP = base64.b64encode(b"a clip").decode()


class Media:
    """Stands in for the worker processes."""

    async def decode(self, uploads, sound=False):
        assert sound
        if uploads[0].data != b"a clip":
            raise MediaError("no audio stream")
        return {"sound": np.ones(16_000, np.float32)}, {}


def client(transcriber, alive=True):
    heard = types.SimpleNamespace(idle=60, expire=lambda: None)
    replier = types.SimpleNamespace(
        place=contextlib.nullcontext, deadline=5.0, model=types.SimpleNamespace(is_alive=alive)
    )
    service = Service(
        "tiny", replier, Media(), heard, Counters(), None, None, 100, False, transcriber
    )
    return fastapi.testclient.TestClient(create_app(service))


def part(data):
    return {"content": [{"type": "input_audio", "input_audio": {"data": data, "format": "webm"}}]}


def test_words_are_written_down():
    def transcriber(sound):
        assert sound.shape == (16_000,)
        return Transcript("I cannot sleep.", "en", ())

    with client(transcriber) as http:
        found = http.post("/v1/transcriptions", json=part(CLIP))
        assert found.json() == {"text": "I cannot sleep.", "language": "en"}
        bad = http.post("/v1/transcriptions", json=part(base64.b64encode(b"other").decode()))
        assert bad.status_code == 400
        assert "no audio stream" in bad.json()["error"]["message"]
        assert http.post("/v1/transcriptions", json={"content": []}).status_code == 400


def test_without_whisper_it_says_so():
    with client(None) as http:
        found = http.post("/v1/transcriptions", json=part(CLIP))
        assert found.status_code == 501
        assert "--transcribe" in found.json()["error"]["message"]


@pytest.mark.parametrize(("alive", "status"), [(True, 200), (False, 503)])
def test_health_tells_whether_the_model_lives(alive, status):
    with client(None, alive) as http:
        assert http.get("/healthz").status_code == status
