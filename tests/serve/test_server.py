"""Tests `serve` as clients see it: the `openai` client, kept conversations, hostile requests."""

import base64
import io
import itertools
import json
import os
import signal
import socket
import threading
import time

import numpy as np
import openai
import pytest
from PIL import Image

from mm_jax.__main__ import main
from mm_jax.commands.arguments import open_run, split_samples
from mm_jax.data.labels import built_in
from mm_jax.data.prompts import chat_messages
from mm_jax.data.records import Sample
from mm_jax.evaluation.predictions import read_predictions
from mm_jax.generation.predictor import predictor_of
from tests.support.served import serve

LIMITS = ("--config.predict.max_new_tokens=24", "--max_mb=1", "--max_seconds=20", "--name=tiny")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def server(trained, folder):
    with serve(trained, *LIMITS, "--queue=16", folder=folder) as served:
        yield served


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def clip(synthetic):
    return next(synthetic.raw.rglob("*.mp4")).read_bytes()


def data_url(kind, data):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def png(width, height, colour=100):
    file = io.BytesIO()
    Image.new("RGB", (width, height), (colour, 0, 0)).save(file, "PNG")
    return file.getvalue()


def user(*content):
    return [{"role": "user", "content": content[0] if len(content) == 1 else list(content)}]


def test_the_openai_client_is_answered_whole_and_streamed(client):
    assert [model.id for model in client.models.list().data] == ["tiny"]
    asked = dict(model="tiny", messages=user("I lost my job."))
    whole = client.chat.completions.create(**asked, logprobs=True)
    (choice,) = whole.choices
    usage = whole.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert len(choice.logprobs.content) == usage.completion_tokens
    assert all(token.logprob <= 0 for token in choice.logprobs.content)
    assert set(whole.labels) == {"client_emotion", "therapist_emotion", "strategy"}
    for task, shares in whole.probabilities.items():
        assert sum(shares.values()) == pytest.approx(1, abs=1e-4)
        assert max(shares, key=shares.get) == whole.labels[task]
    parts = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    assert parts[0].labels == whole.labels
    text = "".join(part.choices[0].delta.content or "" for part in parts[:-1])
    assert text.strip() == choice.message.content
    assert parts[-2].choices[0].finish_reason == choice.finish_reason
    assert parts[-1].usage == usage
    as_text = client.chat.completions.create(**asked, extra_body={"labels_as_text": True})
    expected = f"Client's emotion: {whole.labels['client_emotion']}\n"
    assert as_text.choices[0].message.content.startswith(expected)
    assert as_text.choices[0].message.content.endswith(choice.message.content)


def test_seeds_stops_and_several_replies(client):
    asked = dict(model="mm_jax", messages=user("Hello."), temperature=1.5, n=3)
    first, again = (client.chat.completions.create(**asked, seed=4) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(set(texts)) > 1
    other = client.chat.completions.create(**asked, seed=5)
    assert [c.message.content for c in other.choices] != texts
    short = client.chat.completions.create(**asked, seed=4, max_tokens=2)
    assert {c.finish_reason for c in short.choices} <= {"length", "stop"}
    assert short.usage.completion_tokens <= 6
    text = max(texts, key=len)
    stop = text[len(text) // 2 :][:3]
    cut = client.chat.completions.create(**asked, seed=4, stop=[stop])
    found = cut.choices[texts.index(text)]
    assert found.message.content == text[: text.index(stop)].strip()
    assert found.finish_reason == "stop"


def test_pictures_sounds_and_videos_reach_the_model(client, clip):
    words = {"type": "text", "text": "Look at me."}
    video = {"type": "video_url", "video_url": {"url": data_url("video/mp4", clip)}}
    pictures = [
        {"type": "image_url", "image_url": {"url": data_url("image/png", png(64, 48, i))}}
        for i in range(6)
    ]
    sound = {
        "type": "input_audio",
        "input_audio": {"data": base64.b64encode(clip).decode(), "format": "wav"},
    }
    for parts, modality in (
        ([words, video], "av"),
        ([video, video], "av"),
        ([words, *pictures], "v"),
        ([sound], "a"),
        ([words, *pictures, sound], "av"),
    ):
        found = client.chat.completions.create(model="tiny", messages=user(*parts, {**words}))
        assert found.modality == modality
        assert found.seen["frames"] == (4 if "v" in modality else 0)
        assert (found.seen["seconds_of_sound"] > 0) == ("a" in modality)
    earlier = [*user(words, video), {"role": "assistant", "content": "I see."}, *user("And now?")]
    found = client.chat.completions.create(
        model="tiny", messages=[{"role": "system", "content": "Be kind."}, *earlier]
    )
    assert found.modality == "text"
    assert found.ignored == ["clips of earlier messages", "system message"]


def test_logprobs_tell_nothing_that_is_not_shown(client):
    asked = dict(model="tiny", messages=user("Hello."), temperature=1.5, seed=4, logprobs=True)
    (whole,) = client.chat.completions.create(**asked).choices
    text = whole.message.content
    stop = text[len(text) // 2 :][:3]
    (cut,) = client.chat.completions.create(**asked, stop=stop).choices
    told = "".join(row.token for row in cut.logprobs.content)
    assert told.strip() in text[: text.index(stop)]
    assert len(cut.logprobs.content) < len(whole.logprobs.content)


def test_danger_gets_the_fixed_text(server, client):
    before = server.metric("mm_jax_safety_total")
    for extra in ({}, {"stream": True}):
        found = client.chat.completions.create(
            model="tiny", messages=user("I want to kill myself tonight."), **extra
        )
        if extra:
            parts = [part.choices[0] for part in found]
            text = "".join(part.delta.content or "" for part in parts)
            finish = parts[-1].finish_reason
        else:
            text, finish = found.choices[0].message.content, found.choices[0].finish_reason
            assert found.labels == {}
            assert found.safety["danger"]
        assert "findahelpline.com" in text
        assert finish == "content_filter"
    assert server.metric("mm_jax_safety_total") == before + 2


def test_conversations_are_kept_forked_undone_and_deleted(server, clip):
    _, made = server.ask("/v1/conversations", {"problem": "work"})
    path = f"/v1/conversations/{made['id']}"
    _, first = server.ask(f"{path}/turns", {"content": "I lost my job."})
    part = {"type": "video_url", "video_url": {"url": data_url("video/mp4", clip)}}
    _, second = server.ask(f"{path}/turns", {"content": [part]})
    assert second["modality"] == "av"
    _, rows = server.ask(f"{path}/export")
    assert [row["speaker"] for row in rows] == ["client", "therapist"] * 2
    assert rows[0] == {
        "speaker": "client", "text": "I lost my job.", "emotion": first["labels"]["client_emotion"]
    }  # fmt: skip
    assert rows[1]["text"] == first["choices"][0]["message"]["content"]
    _, other = server.ask(f"{path}/fork", {})
    assert other["history"] == rows
    assert server.ask(f"{path}/undo", {})[1]["history"] == rows[:2]
    # The same turn again is answered alike in the fork's past and in what was taken back.
    fork = f"/v1/conversations/{other['id']}"
    server.ask(f"{fork}/undo", {})
    answers = [server.ask(f"{p}/turns", {"content": "And now?"})[1] for p in (path, fork)]
    assert answers[0]["choices"][0]["message"] == answers[1]["choices"][0]["message"]
    assert answers[0]["labels"] == answers[1]["labels"]
    # The whole history at once is read alike.
    _, whole = server.ask("/v1/conversations", {"problem": "work", "history": rows[:2]})
    _, anew = server.ask(f"/v1/conversations/{whole['id']}/turns", {"content": "And now?"})
    assert anew["labels"] == answers[0]["labels"]
    assert server.ask(path, method="DELETE")[1]["deleted"]
    assert server.ask(path)[0] == 404
    assert server.ask(f"{path}/turns", {"content": "Hello?"})[0] == 404
    for _ in range(2):
        assert server.ask(f"{fork}/undo", {})[0] == 200
    assert server.ask(f"{fork}/undo", {})[0] == 409


def test_what_is_said_through_the_server_is_what_predict_says(server, trained, monkeypatch):
    """`baseline` sends the project's own prompts, with the frames that the model sees."""
    arguments = ["--checkpoint", str(trained), "--base_url", f"{server.url}/v1", "--model=tiny"]
    opened, _, params = open_run(trained, None, None, ("predict.max_new_tokens=24",))
    samples = split_samples(opened, None, "test")
    for media, modality in ((None, "text"), ("frames", "v")):
        more = [f"--media={media}"] if media else []
        assert main(["baseline", *arguments, "--name=served", *more]) == 0
        rows = read_predictions(trained / "baselines" / "served.jsonl")
        expected = predictor_of(opened).predict(params, samples, modality, "gold")
        assert len(rows) == len(samples)
        for row, own in zip(rows, expected, strict=True):
            assert row.predicted == {**own.labels, "response": own.response}


def test_a_client_that_goes_away_frees_its_place(server, client):
    before = server.metric("mm_jax_cancelled_total")
    stream = client.chat.completions.create(
        model="tiny", messages=user("Hello."), stream=True, temperature=1.0, n=8
    )
    next(iter(stream))
    stream.close()
    asked = {"model": "tiny", "messages": user("Hello there."), "n": 8, "temperature": 1.5}
    body = json.dumps(asked).encode()
    for _ in range(30):  # and some that never hear anything
        with socket.create_connection(server.url.removeprefix("http://").split(":")) as line:
            line.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
                b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
            )
    deadline = time.monotonic() + 20
    while server.metric("mm_jax_turns ") or server.metric("mm_jax_batch_replies"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert server.metric("mm_jax_cancelled_total") > before
    assert server.ask("/healthz") == (200, {"status": "ok"})


def hostile(clip):
    """Yields (path, body, headers, statuses) of requests that must be refused."""
    chat, turn = "/v1/chat/completions", "/v1/conversations/none/turns"

    def of(*parts):
        return {"model": "tiny", "messages": user(*parts)}

    def media(kind, value):
        if kind == "input_audio":
            return of(
                {"type": kind, kind: {"data": value, "format": "wav"}},
                {"type": "text", "text": "x"},
            )
        return of({"type": kind, kind: {"url": value}}, {"type": "text", "text": "x"})

    rng = np.random.default_rng(0)
    for kind in ("image_url", "video_url", "input_audio"):
        for value in (
            "/etc/passwd", "file:///etc/passwd", "http://127.0.0.1:1/x.mp4", "https://x.org/a.png",
            "ftp://x.org/a", "data:text/plain,hello", "data:;base64,", "data:;base64,@@@@", "",
            "\x00", "../../x", "concat:/etc/passwd|/etc/hosts", "data:;base64,AAA", "%2e%2e",
        ):  # fmt: skip
            yield chat, media(kind, value), {}, {400}
        for data in (
            b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n",
            b"ffconcat version 1.0\nfile /etc/passwd\n",
            b"v=0\no=- 0 0 IN IP4 127.0.0.1\nm=video 1 RTP/AVP 96\n",
            clip[:200], clip[200:], b"RIFF" + bytes(40), b"\x1aE\xdf\xa3" + bytes(100),
            b"GIF89a" + bytes(20), b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.4",
            *(rng.integers(256, size=n, dtype=np.uint8).tobytes() for n in (1, 100, 10_000)),
        ):  # fmt: skip
            url = data_url("video/mp4", data)
            yield chat, media(kind, url), {}, {400}
        for k in range(90):  # damaged in many places
            damaged = bytearray(clip[: len(clip) * (k + 1) // 91])
            for at in rng.integers(len(damaged), size=max(4, len(damaged) // 50)):
                damaged[at] = rng.integers(256)
            yield chat, media(kind, data_url("video/mp4", bytes(damaged))), {}, {200, 400}
    for size in ((10_000, 10_000), (1, 60_000), (60_000, 300)):
        statuses = {400} if size[1] != 60_000 else {200, 400}
        yield chat, media("image_url", data_url("image/png", png(*size))), {}, statuses
    good = of("Hello.")
    for name, values in {
        "temperature": ("hot", -1, 3, True, [], {}, "NaN"), "top_p": (0, 2, "x", None is True),
        "max_tokens": (0, -5, 1.5, "9"), "n": (0, 9, 1e9, "2"), "seed": (1.5, "a", 2**70),
        "stop": ("", ["a"] * 9, [1], {"a": 1}, ["x" * 500]), "stream": ("yes", 1),
        "logprobs": ("x", 7), "top_logprobs": (3,), "frequency_penalty": (1.0,), "tools": ([1],),
        "response_format": ({"type": "json_object"},), "model": (1, None, [], "x" * 500),
        "messages": ([], {}, "x", [1], [None], [{"role": "user"}],
                     [{"role": "god", "content": "x"}], [{"role": "user", "content": 5}],
                     [{"role": "user", "content": [5]}],
                     [{"role": "user", "content": [{"type": "file"}]}], user(""), user("  "),
                     [{"role": "assistant", "content": "x"}]),
        "unknown": (1,), "__proto__": (1,), "problem": (5,), "stream_options": ("x", {"a": 1}),
    }.items():  # fmt: skip
        for value in values:
            yield chat, {**good, name: value}, {}, {400, 404}
    yield chat, {**good, "model": "gpt-4"}, {}, {404}
    yield chat, of("x" * 300_000), {}, {413}
    yield chat, of("word " * 30_000), {}, {413}
    yield chat, of("w. " * 6_000), {}, {400}  # more tokens than a prompt may have
    for body in (
        b"", b"{", b"null", b"[]", b"1", b'"x"', b"\xff\xfe", b'{"model": "\xff"}', b"[" * 100_000,
        b'{"a":' * 50_000, b'{"model":NaN}', b"{}", b'{"messages":[{"role":"user"}]}',
        b'{"model":"tiny","messages":[{"role":"user","content":"\xed\xa0\x80"}]}',
    ):  # fmt: skip
        yield chat, body, {}, {400}
        yield "/v1/conversations", body if body != b"{}" else b"[1]", {}, {400}
        yield turn, body, {}, {400}
        yield "/v1/transcriptions", body, {}, {400}
    yield chat, b"x" * 1_100_000, {}, {413}
    yield chat, of(*[{}] * 200_000), {}, {413}
    yield chat, of(*[{}] * 20_000), {}, {400}
    yield chat, {**good, **{f"k{i}": 1 for i in range(30_000)}}, {}, {400}
    yield chat, of(*[{"type": "text", "text": "x"}] * 1000), {}, {400}
    for name in ("Host", "Origin"):
        yield chat, b"{}", {name: "http://["}, {400, 403}
    yield chat, b"{}", {"Origin": "null"}, {403}
    yield chat, b"{}", {"Content-Type": "text/plain"}, {415}
    yield chat, b"{}", {"Content-Type": "application/x-www-form-urlencoded"}, {415}
    yield chat, b"{}", {"Origin": "https://elsewhere.org"}, {403}
    yield chat, b"{}", {"Host": "elsewhere.org"}, {403}
    yield "/v1/conversations", {"history": [{"speaker": "dog", "text": "x"}]}, {}, {400}
    yield (
        "/v1/conversations",
        {"history": [{"speaker": "client", "text": "x", "emotion": "y"}]},
        {},
        {400},
    )
    for path in (
        "/v1/conversations/../../etc/passwd", "/etc/passwd", "/v1/conversations/%2e%2e/export",
        "/v1/files", "/docs", "/openapi.json", "/v1/models/none", "/v1/conversations/none",
        "/v1/conversations/none/export", "/page.html", "//etc/passwd", "/v1/conversations/'--",
    ):  # fmt: skip
        yield path, None, {}, {404}
        yield path, b"{}", {}, {404, 405}
    for path in ("/", "/healthz", "/metrics", "/v1/about", "/v1/models"):
        yield path, b"{}", {}, {405}


def test_hostile_requests_are_refused_and_nothing_is_written(server, clip, folder):
    count, slow = 0, []

    def ask(path, body, headers):
        began = time.monotonic()
        answer = server.ask(path, body, headers=headers)
        return *answer, time.monotonic() - began

    for path, body, headers, statuses in hostile(clip):
        status, found, took = ask(path, body, headers)
        count += 1
        if took > 1 and 200 not in statuses:
            slow.append((path, body, headers))
        assert status in statuses, (path, str(body)[:300], headers, status, found)
        if status >= 400:
            assert status < 500
            assert set(found["error"]) == {"message", "type", "param", "code"}
            assert "passwd" not in json.dumps(found)
    assert count > 500
    # Within a second each: what waited for the tests next to this one does not wait again.
    assert len(slow) < 10
    for request in slow:
        assert min(ask(*request)[2] for _ in range(3)) < 1
    assert server.ask("/healthz") == (200, {"status": "ok"})
    # Special tokens are words like any others.
    for words in ("<|im_end|>", "<video>", "<|endoftext|><MEM><history>", "\ud800", "\x00\x07"):
        status, found = server.ask(
            "/v1/chat/completions", {"model": "tiny", "messages": user(words)}
        )
        assert status == 200, found
        assert found["modality"] == "text"
    lone = {"problem": "\ud800", "situation": "\ud800"}
    assert server.ask("/v1/conversations", lone)[0] == 400
    assert (
        server.ask("/v1/chat/completions", {"model": "tiny", "messages": user("x"), **lone})[0]
        == 400
    )
    small = {"top_p": 1e-50, "temperature": 1e-37, "logprobs": True}
    smaller = {"top_p": 1e-50, "temperature": 1.0, "logprobs": True}
    neutral = {"tools": [], "logit_bias": {}, "tool_choice": "none", "stop": None, "user": "me"}
    for more in (small, smaller, neutral):
        body = {**more, "model": "tiny", "messages": user("x")}
        assert server.ask("/v1/chat/completions", body)[0] == 200
    prompt = chat_messages(Sample("x", "x", "Hello."), "ecot", built_in("mesc"), [])
    prompt[1]["content"] = prompt[1]["content"].replace("Hello.", "\ud800")
    body = {"model": "tiny", "messages": prompt}
    assert server.ask("/v1/chat/completions", body)[0] == 200
    assert not list(folder.iterdir())


def test_slow_bodies_are_cut_off(server):
    host, port = server.url.removeprefix("http://").split(":")
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
    head += b"Content-Type: application/json\r\nContent-Length: 90000\r\n\r\n"
    for drip in (b"", b"{"):
        with socket.create_connection((host, int(port))) as line:
            line.sendall(head)
            began = time.monotonic()
            line.settimeout(0.2)
            answer = b""
            while not answer and time.monotonic() < began + 5:
                try:
                    if drip:
                        line.sendall(drip)
                    answer = line.recv(100)
                except TimeoutError:
                    continue
            assert answer.startswith(b"HTTP/1.1 408")
            assert time.monotonic() - began < 2


def workers(server):
    """Lists the process ids of a server's media workers."""
    children = f"/proc/{server.process.pid}/task/{server.process.pid}/children"
    found = []
    for pid in open(children).read().split():
        if b"media_worker" in open(f"/proc/{pid}/cmdline", "rb").read():
            found.append(int(pid))
    return found


def test_a_killed_media_worker_is_replaced_unnoticed(server, client, clip):
    video = {"type": "video_url", "video_url": {"url": data_url("video/mp4", clip)}}
    for _ in range(2):
        for pid in workers(server):
            os.kill(pid, signal.SIGKILL)
        found = client.chat.completions.create(model="tiny", messages=user(video, video))
        assert found.modality == "av"


def test_too_many_are_told_when_to_come_again(server):
    statuses, before = [], server.metric("mm_jax_refused_total")

    def ask():
        body = {"model": "tiny", "messages": user("Hello."), "n": 8, "temperature": 1.0}
        statuses.append(server.ask("/v1/chat/completions", body)[0])

    threads = [threading.Thread(target=ask) for _ in range(60)]  # there are 24 places
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(statuses) == {200, 429}
    assert server.metric("mm_jax_refused_total") - before == statuses.count(429)
    ask()
    assert statuses[-1] == 200


def test_tokens_stores_and_the_end(trained, tmp_path):
    store = tmp_path / "talks.sqlite"
    more = (*LIMITS, f"--store={store}", "--idle_minutes=0.1")
    with serve(trained, *more, token="secret") as served:
        for path in ("/v1/models", "/metrics", "/v1/about", "/v1/conversations/x/export"):
            for headers in (
                {"Authorization": ""}, {"Authorization": "Bearer wrong"},
                {"Authorization": "Basic secret"}, {"Authorization": "Bearer secret2"},
                {"Authorization": "Bearer secr\u00e9t"},
            ):  # fmt: skip
                status, found = served.ask(path, headers=headers)
                assert status == 401
                assert found["error"]["code"] == "invalid_api_key"
        assert served.ask("/healthz", headers={"Authorization": ""})[0] == 200
        assert served.ask("/", headers={"Authorization": ""})[0] == 200
        assert served.ask("/v1/models")[0] == 200
        _, made = served.ask("/v1/conversations", {})
        path = f"/v1/conversations/{made['id']}"
        assert served.ask(f"{path}/turns", {"content": "My unmistakable words."})[0] == 200
        assert oct(store.stat().st_mode)[-3:] == "600"
        assert b"unmistakable" in store.read_bytes()
        deadline = time.monotonic() + 30
        while b"unmistakable" in store.read_bytes():  # it expires without being asked for
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert served.ask(path)[0] == 404
        # Replies that run are finished before the server ends.
        found = []
        body = {"model": "tiny", "messages": user("And now?"), "n": 8, "temperature": 1.0}
        threads = [
            threading.Thread(target=lambda: found.append(served.ask("/v1/chat/completions", body)))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        while served.metric("mm_jax_turns ") < 4 and len(found) < 4:
            time.sleep(0.001)
        waiting = 8 - len(found)
        assert served.stop() == 0
        for thread in threads:
            thread.join()
        assert waiting > 0
        assert [status for status, _ in found] == [200] * 8


def test_what_cannot_be_served_is_said_before_anything_starts(trained, tmp_path, capsys):
    for arguments, said in (
        (["--host=0.0.0.0"], "set MM_JAX_TOKEN"),
        (["--port=70000"], "--port: expected 0 to 65535"),
        (["--slots=0"], "--slots: expected more than 0"),
        (["--language=en"], "--language belongs to --transcribe"),
        (["--safety=configs/safety.py:xx"], "expected a locale of de, en"),
        (["--config.data.folder=x"], "serve can override --config.predict.* only"),
    ):
        assert main(["serve", f"--checkpoint={trained}", *arguments]) == 2
        assert said in capsys.readouterr().err
    bad = tmp_path / "bad.sqlite"
    bad.write_bytes(b"no database" * 100)
    assert main(["serve", f"--checkpoint={trained}", f"--store={bad}"]) == 2
    assert "--store" in capsys.readouterr().err
    assert list(itertools.islice(tmp_path.iterdir(), 2)) == [bad]
