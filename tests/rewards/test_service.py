"""Tests the similarity service over HTTP with a tiny random BGE-M3 folder: the real code path."""

import asyncio
import contextlib
import http.client
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest
import tokenizers
import torch
import transformers

from mm_jax.config.reward import Limits
from mm_jax.rewards.base import FunctionReward, Request
from mm_jax.rewards.pool import RewardPool
from mm_jax.rewards.similarity import WEIGHTS, BgeSimilarity
from tests.conftest import ROOT
from tests.support.rewards import SAMPLE

WORDS = [
    "<s>",
    "<pad>",
    "</s>",
    "<unk>",
    "<mask>",
    *sorted(set(re.findall(r"\w+|[.?]", SAMPLE.response))),
]


def write_tiny_bge(folder):
    """Writes a random XLM-RoBERTa with BGE-M3's two extra heads."""
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, "<unk>")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        cls_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        mask_token="<mask>",
        model_max_length=64,
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.XLMRobertaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=80,
        pad_token_id=1,
    )
    transformers.XLMRobertaModel(config).save_pretrained(folder)
    torch.save(torch.nn.Linear(16, 16).state_dict(), folder / "colbert_linear.pt")
    torch.save(torch.nn.Linear(16, 1).state_dict(), folder / "sparse_linear.pt")


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """Starts the service; yields its URL."""
    pytest.importorskip("FlagEmbedding")
    folder = tmp_path_factory.mktemp("bge")
    write_tiny_bge(folder)
    environment = {**os.environ, "MM_JAX_REWARD_TOKEN": "secret", "CUDA_VISIBLE_DEVICES": ""}
    port = 18000 + os.getpid() % 2000
    command = [sys.executable, "tools/serve_reward.py", f"--model={folder}", f"--port={port}"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    url = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            fetch(f"{url}/health")
            break
        except (urllib.error.URLError, ConnectionError):
            assert process.poll() is None, "the service died"
            time.sleep(0.2)
    yield url
    process.terminate()
    process.wait(timeout=20)


def fetch(url, body=None, token="secret"):
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {token}"}
    with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=30) as answer:
        return json.load(answer)


def score(url, texts, **settings):
    reward = BgeSimilarity(url, Limits(attempts=2, backoff=0.01), **settings)
    return asyncio.run(reward.score([Request(SAMPLE, t) for t in texts])), reward


def test_similarity_over_http_is_scaled_by_the_reference(service, monkeypatch):
    monkeypatch.setenv("MM_JAX_REWARD_TOKEN", "secret")
    (copy, other, empty), _ = score(service, [SAMPLE.response, "What do you miss?", ""])
    assert copy.value == pytest.approx(1.0, abs=1e-4)
    assert 0 <= other.value < 1
    assert set(other.detail) == set(WEIGHTS)
    expected = sum(WEIGHTS[k] * v for k, v in other.detail.items()) / 2.3
    assert other.raw == pytest.approx(expected)
    assert (empty.value, empty.reason) == (0.0, "empty")
    assert not other.cached
    _, reward = score(service, ["What do you miss?"])
    (again, new) = asyncio.run(
        reward.score([Request(SAMPLE, t) for t in ("What do you miss?", "What do you keep?")])
    )
    assert (again.cached, new.cached) == (True, False)
    longer = f"{SAMPLE.response} What do you do?"
    (one,), _ = score(service, [longer])
    (both,), _ = score(service, [longer], both_directions=True)
    assert both.value <= one.value + 1e-6


def test_the_environment_s_proxies_and_certificates_do_not_apply(service, monkeypatch):
    monkeypatch.setenv("MM_JAX_REWARD_TOKEN", "secret")
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    monkeypatch.setenv("SSL_CERT_FILE", "missing.pem")
    (copy,), _ = score(service, [SAMPLE.response])
    assert copy.value == pytest.approx(1.0, abs=1e-4)
    (one,), _ = score(f"http://{'ä' * 300}:80", [SAMPLE.response])
    assert (one.valid, one.reason) == (False, "malformed answer")


def test_the_service_refuses_strangers_and_oversized_requests(service, monkeypatch):
    with pytest.raises(urllib.error.HTTPError, match="401"):
        fetch(f"{service}/similarity", {"pairs": [["a", "b"]]}, token="wrong")
    for body in ({"pairs": []}, {"pairs": [["a" * 9000, "b"]]}, {"pairs": [["a"]]}):
        with pytest.raises(urllib.error.HTTPError, match="422"):
            fetch(f"{service}/similarity", body)
    unsized = http.client.HTTPConnection(service.removeprefix("http://"), timeout=30)
    unsized.putrequest("POST", "/similarity")
    unsized.putheader("Authorization", "Bearer secret")
    unsized.putheader("Transfer-Encoding", "chunked")
    unsized.endheaders()  # refused before any of the body is sent
    assert unsized.getresponse().status == 411
    unsized.close()
    monkeypatch.setenv("MM_JAX_REWARD_TOKEN", "secret")
    (fine, long), _ = score(service, ["What do you miss?", "so " * 3000])
    assert fine.value > 0  # only the long one fails
    assert (long.value, long.reason) == (0.0, "too long")
    monkeypatch.setenv("MM_JAX_REWARD_TOKEN", "wrong")
    (lost,), reward = score(service, ["What do you miss?"])
    assert not lost.valid
    assert lost.reason == "HTTP 401"
    assert reward.calls.attempts == 1  # retrying does not help a wrong token
    for body in (b'{"pairs": [["\\ud800", "b"]]}', b'{"pairs": NaN}'):
        request = urllib.request.Request(
            f"{service}/similarity", body, {"Authorization": "Bearer secret"}
        )
        request.add_header("Content-Type", "application/json")
        with pytest.raises(urllib.error.HTTPError, match="422"):
            urllib.request.urlopen(request, timeout=30)
    (gone,), _ = score("http://127.0.0.1:9", ["What?"])
    assert gone.reason == "connection"


def test_the_service_is_not_opened_to_the_world_without_a_token(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    environment = {k: v for k, v in os.environ.items() if k != "MM_JAX_REWARD_TOKEN"}
    command = [sys.executable, "tools/serve_reward.py", f"--model={tmp_path}", "--host=0.0.0.0"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "set MM_JAX_REWARD_TOKEN" in done.stderr


def test_the_service_does_not_start_where_it_cannot_answer(tmp_path):
    (tmp_path / "config.json").write_text("{}")

    def start(*arguments):
        command = [sys.executable, "tools/serve_reward.py", f"--model={tmp_path}", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        return done.returncode, done.stderr.splitlines()[-1]

    assert start("--batch_size=0") == (2, "error: --batch_size: expected at least 1, got 0")
    assert start("--port=99999") == (2, "error: --port: expected 1 to 65535, got 99999")
    assert start("--device=foo") == (2, "error: --device: expected cpu or cuda:N, got foo")
    pytest.importorskip("FlagEmbedding")
    code, said = start()  # a folder without a model
    assert code == 1
    assert said.startswith(f"error: --model {tmp_path} on cpu: ")


def test_a_trickling_service_keeps_nobody_waiting():
    """Checks that a read that never ends blocks neither other rewards nor interpreter exit."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def trickle(connection):
            with contextlib.suppress(OSError):
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n")
                while True:
                    connection.sendall(b" ")
                    time.sleep(0.1)

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    threading.Thread(target=trickle, args=(connection,), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        slow = BgeSimilarity(url, Limits(attempts=2, timeout=0.3, backoff=0.01))
        pool = RewardPool([slow, FunctionReward("f", lambda requests: [1.0] * len(requests))])
        began = time.monotonic()
        for n in range(12):
            scores = pool.submit([Request(SAMPLE, f"What {n}?")]).result(timeout=20)
            assert scores["similarity"][0].reason == "timeout"
            assert scores["f"][0].value == 1.0
        pool.close()
        assert time.monotonic() - began < 15


@pytest.mark.parametrize(
    "reply",
    [
        b'HTTP/1.1 200 OK\r\n\r\n{"scores": [{"dense": 1e308, "sparse": 1, "colbert": 1}, {}]}',
        b'HTTP/1.1 200 OK\r\n\r\n{"scores": ' + b"[" * 200_000,
        b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{",
        b"nonsense\r\n\r\n",
        b'HTTP/1.1 200 OK\r\n\r\n{"scores": null}',
        b'HTTP/1.1 200 OK\r\n\r\n{"scores": [1, 2]}',
        b'HTTP/1.1 200 OK\r\n\r\n{"scores": [{"dense": "a", "sparse": 1, "colbert": 1}, {}]}',
        b"HTTP/1.1 200 OK\r\n\r\n[]",
    ],
)
def test_a_broken_service_is_a_counted_failure(reply):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            for _ in range(2):
                connection, _ = server.accept()
                with connection:
                    request = b""
                    while b"pairs" not in request:
                        request += connection.recv(65536)
                    connection.sendall(reply)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        (lost,), reward = score(f"http://127.0.0.1:{server.getsockname()[1]}", ["What?"])
        thread.join()
    assert lost.reason in ("connection", "malformed answer")
    assert reward.counts() == {lost.reason: 2}
