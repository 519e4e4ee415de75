"""Tests `chat`: what it answers is what `predict` does, and no line ends it."""

import dataclasses
import io
import json

import numpy as np

from mm_jax.__main__ import main
from mm_jax.commands import chat
from mm_jax.commands.arguments import open_run
from mm_jax.data.conversation import own_sample
from mm_jax.generation.predictor import Prediction, predictor_of
from mm_jax.generation.talk import Conversation


def talked(run, monkeypatch, capsys, *lines):
    """Pipes lines into `chat`; returns its status, and what it wrote."""
    typed = "".join(f"{line}\n" for line in lines).encode(errors="surrogateescape")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8"))
    code = main(["chat", "--checkpoint", str(run), "--config.predict.max_new_tokens=16"])
    out, err = capsys.readouterr()
    return code, out, err


def test_turns_equal_predict_and_remember_the_conversation(run):
    opened, spec, params = open_run(run, None, None, ("predict.max_new_tokens=16",))
    conversation, said = Conversation(opened, params), []
    for words in ("I lost my job.", "My sister does not call.", "What can I do?"):
        turn = own_sample(spec, text=words)
        *parts, whole = conversation.say(turn)
        assert isinstance(parts[0], Prediction)
        assert "".join(parts[1:]).strip() == whole.response
        # The same by `predict`, which reads the whole history again.
        sample = own_sample(spec, text=words, history=conversation.history)
        regime = "gold" if conversation.history else "none"
        (expected,) = predictor_of(opened, 1).predict(params, [sample], "av", regime)
        assert expected.labels == whole.labels
        assert expected.response == whole.response
        for task, shares in expected.probabilities.items():
            found = whole.probabilities[task]
            np.testing.assert_allclose(list(shares.values()), list(found.values()), atol=2e-5)
        conversation.keep(words, whole.response, whole.labels)
        said.append(words)
    assert [u.text for u in conversation.history[::2]] == said
    assert [u.turn for u in conversation.history] == list(range(6))
    assert all(u.labels for u in conversation.history)
    assert conversation.undo()
    assert len(conversation.history) == 4
    *_, again = conversation.say(own_sample(spec, text=said[-1]))
    assert again.response == whole.response  # the memory of what was taken back is not used


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
    assert "/send: no /video or /audio was given" in err
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


def test_what_must_not_be_said_is_held_back(run, monkeypatch, capsys):
    replies = iter(["I hear you. I am a real person.", "You have depression."])

    def say(self, turn):
        yield Prediction({}, "text", "scored")
        yield from next(replies)

    monkeypatch.setattr(Conversation, "say", say)
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
