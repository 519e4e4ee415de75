"""Tests `chat`: what it answers is what `predict` does, and no line ends it."""

import dataclasses
import io
import json
import os
import time
import wave

import numpy as np

from mm_jax.__main__ import main
from mm_jax.commands import chat
from mm_jax.commands.arguments import open_run
from mm_jax.data.conversation import own_sample
from mm_jax.generation.live import Draft, Live, Piece, Turn
from mm_jax.generation.predictor import Prediction, predictor_of
from mm_jax.generation.talk import Conversation


def talked(run, monkeypatch, capsys, *lines):
    """Pipes lines into `chat`; returns its status, and what it wrote."""
    typed = "".join(f"{line}\n" for line in lines).encode(errors="surrogateescape")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8"))
    code = main(["chat", "--checkpoint", str(run), "--config.predict.max_new_tokens=16"])
    out, err = capsys.readouterr()
    return code, out, err


def asked(live, sample, memories, **settings):
    """Returns a turn's draft and its replies' whole texts and predictions."""
    live.submit(Turn("t", sample, memories, **settings))
    told = []
    while not live.is_idle:
        told += live.step()
    draft, *pieces = told
    assert isinstance(draft, Draft)
    return draft, pieces


def test_turns_equal_predict_and_remember_the_conversation(run):
    opened, spec, params = open_run(run, None, None, ("predict.max_new_tokens=16",))
    talk, live, said = Conversation(opened.prompter.label_space), Live(opened, params), []
    for words in ("I lost my job.", "My sister does not call.", "What can I do?"):
        turn = own_sample(spec, text=words, history=talk.history)
        draft, pieces = asked(live, turn, talk.memories)
        whole = pieces[-1].prediction
        assert "".join(piece.text for piece in pieces).strip() == whole.response
        assert sum(len(piece.logps) for piece in pieces) == sum(len(p.tokens) for p in pieces)
        # The same by `predict`, which reads the whole history again.
        regime = "gold" if talk.history else "none"
        (expected,) = predictor_of(opened, 1).predict(params, [turn], "av", regime)
        assert expected.labels == whole.labels == draft.prediction.labels
        assert expected.response == whole.response
        for task, shares in expected.probabilities.items():
            found = whole.probabilities[task]
            np.testing.assert_allclose(list(shares.values()), list(found.values()), atol=2e-5)
        talk.keep(words, whole.response, whole.labels)
        said.append(words)
    assert [u.text for u in talk.history[::2]] == said
    assert [u.turn for u in talk.history] == list(range(6))
    assert all(u.labels for u in talk.history)
    assert talk.undo()
    assert len(talk.history) == 4
    again = own_sample(spec, text=said[-1], history=talk.history)
    _, pieces = asked(live, again, talk.memories)
    assert pieces[-1].prediction.response == whole.response  # what was taken back is not used


def test_a_turn_costs_the_same_however_long_the_conversation_is(run, monkeypatch):
    opened, spec, params = open_run(run, None, None, ("predict.max_new_tokens=2",))
    monkeypatch.setattr("mm_jax.generation.live.MOST_VECTORS", 4)
    talk, live = Conversation(opened.prompter.label_space), Live(opened, params)
    counts, read = [], []
    for _ in range(6):
        before = live.predictor.memory.compressed
        sample = own_sample(spec, text="And then?", history=talk.history)
        draft, _ = asked(live, sample, talk.memories)
        counts.append(draft.prompt_tokens)
        read.append(live.predictor.memory.compressed - before)
        talk.keep("And then?", "Go on.", {})
    assert counts[2:] == [counts[2]] * 4
    assert counts[2] > counts[1] > counts[0]
    assert len(set(read[1:])) == 1  # the newest lines alone
    # A memory that was lost is read anew, with the same result.
    sample = own_sample(spec, text="And then?", history=talk.history)
    kept, _ = asked(live, sample, talk.memories)
    anew, _ = asked(live, sample, {})
    for task, shares in kept.prediction.probabilities.items():
        other = anew.prediction.probabilities[task]
        np.testing.assert_allclose(list(shares.values()), list(other.values()), atol=2e-5)


def test_turns_together_are_answered_as_alone(run):
    """Seeds, temperatures and limits belong to each turn; one that is cancelled disturbs none."""
    opened, spec, params = open_run(run, None, None, ("predict.max_new_tokens=12",))
    live = Live(opened, params, slots=8)
    settings = {
        "greedy": {},
        "drawn": dict(temperature=1.5, seeds=(5,)),
        "nucleus": dict(temperature=1.5, top_p=0.5, seeds=(5,)),
        "short": dict(temperature=1.5, seeds=(5,), limit=3),
        "several": dict(temperature=1.5, seeds=(5, 6, 5)),
    }
    samples = {name: own_sample(spec, text=f"I am {name}.") for name in settings}

    def answers(names, cancel=""):
        for name in names:
            live.submit(Turn(name, samples[name], **settings[name]))
        found = {}
        while not live.is_idle:
            for told in live.step():
                if isinstance(told, Draft) and told.name == cancel:
                    live.cancel(cancel)
                elif not isinstance(told, Draft):
                    assert isinstance(told, Piece)
                    own = found.setdefault((told.name, told.reply), [])
                    own += told.tokens.tolist()
        return found

    alone = {}
    for name in settings:
        alone |= answers([name])
    assert alone["drawn", 0] != alone["greedy", 0]
    assert len(alone["short", 0]) <= 3
    assert alone["several", 0] == alone["several", 2]
    assert alone["several", 0] != alone["several", 1]
    assert answers(settings) == alone
    some = answers(settings, cancel="drawn")
    assert {key: some[key] for key in alone if key[0] != "drawn"} == {
        key: tokens for key, tokens in alone.items() if key[0] != "drawn"
    }
    assert len(some.get(("drawn", 0), [])) < 12


def test_lines_are_answered_and_none_ends_the_chat(run, tmp_path, monkeypatch, capsys):
    saved = tmp_path / "talk.json"
    code, out, err = talked(
        run, monkeypatch, capsys, "I lost my job.", "", "/\udcff", "/video nowhere.mp4",
        "/nonsense", "/labels", "I feel sad.", "/undo", f"/save {saved}", "/send", "/history",
        "/quit", "never read",
    )  # fmt: skip
    assert code == 0
    assert "a machine" in err
    assert "/video: expected a file, got 'nowhere.mp4'" in err
    assert "/send: no /video, /audio or /mic was given" in err
    assert "/undo " in out  # the help
    assert out.count("s to the first sentence") == 2
    assert "never read" not in out
    rows = json.loads(saved.read_text())
    assert [row["speaker"] for row in rows] == ["client", "therapist"]
    assert rows[0]["text"] == "I lost my job."
    assert rows[0]["emotion"]
    # What was saved can be read again.
    more = ["--history", str(saved), "--config.predict.max_new_tokens=4"]
    monkeypatch.setattr("sys.stdin", io.StringIO("/history\n"))
    assert main(["chat", "--checkpoint", str(run), *more]) == 0
    assert "I lost my job." in capsys.readouterr().out


def test_the_microphone_is_recorded_until_enter(run, tmp_path, monkeypatch, capsys, synthetic):
    sound = tmp_path / "heard.wav"
    with wave.open(str(sound), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes(np.zeros(16_000, "<i2").tobytes())
    recorder = tmp_path / "arecord"
    recorder.write_text(
        f"#!/bin/sh\nfor path; do :; done\ntrap 'cp {sound} \"$path\"; exit 0' INT\n"
        f"touch {tmp_path}/begun\nwhile :; do sleep 0.05; done\n"
    )
    recorder.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    heard = []
    own = chat.own_sample
    monkeypatch.setattr(chat, "own_sample", lambda *a, **k: heard.append(own(*a, **k)) or heard[-1])

    class Slow(io.TextIOWrapper):
        lines = 0

        def readline(self, *sizes):
            self.lines += 1
            end = time.monotonic() + 20
            while self.lines == 2 and not (tmp_path / "begun").exists():
                assert time.monotonic() < end  # a person speaks before pressing Enter
                time.sleep(0.05)
            return super().readline(*sizes)

    monkeypatch.setattr(chat.sys, "stdin", Slow(io.BytesIO(b"/mic\n\n/send\n/quit\n")))
    assert main(["chat", "--checkpoint", str(run), "--config.predict.max_new_tokens=4"]) == 0
    assert "goes with the next turn" in capsys.readouterr().out
    assert len(heard[0].fbank) == 96  # of a second
    # Without a recorder it says so.
    monkeypatch.setenv("PATH", "/nowhere")
    assert "no recorder is installed" in talked(run, monkeypatch, capsys, "/mic", "")[2]


def test_what_must_not_be_said_is_held_back(run, monkeypatch, capsys):
    replies = iter(["I hear you. I am a real person.", "You have depression."])
    none = np.zeros(0, np.int32), np.zeros(0, np.float32)

    class Fake:
        def __init__(self, *args, **settings):
            self.told = []

        def submit(self, turn):
            draft = Prediction({}, "text", "scored")
            self.told = [Draft("chat", draft, 1)]
            self.told += [Piece("chat", 0, c, *none, "", None) for c in next(replies)]
            self.told += [Piece("chat", 0, "", *none, "ended", draft)]

        def step(self):
            told, self.told = self.told, []
            return told

        def cancel(self, name):
            pass

        @property
        def is_idle(self):
            return not self.told

    monkeypatch.setattr(chat, "Live", Fake)
    danger = "I want to kill myself tonight."  # nothing is generated
    code, out, _ = talked(run, monkeypatch, capsys, "Hello.", danger, "Bye.", "/history")
    assert code == 0
    assert out.count("This reply is not shown") == 4  # as they are said, and in the history
    assert "real person" not in out
    assert "depression" not in out
    assert "I hear you." in out
    assert "findahelpline.com" in out


def test_a_model_without_replies_is_refused(run, monkeypatch, capsys):
    opened, spec, params = open_run(run)
    space = dataclasses.replace(opened.prompter.label_space, reply=False)
    opened = dataclasses.replace(
        opened, prompter=dataclasses.replace(opened.prompter, label_space=space)
    )
    monkeypatch.setattr(chat, "open_run", lambda *a: (opened, spec, params))
    code, _, err = talked(run, monkeypatch, capsys, "Hello.")
    assert code == 2
    assert "writes no replies" in err
