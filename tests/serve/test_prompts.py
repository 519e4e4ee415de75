"""Tests that the project's own prompts are read back as the samples that they were made from."""

import dataclasses

import pytest

from mm_jax.data.datasets.common import SampleSource
from mm_jax.data.history import history_labels
from mm_jax.data.labels import built_in
from mm_jax.data.prompts import SYSTEM, chat_messages
from mm_jax.data.records import CLIENT, THERAPIST, Sample, Utterance
from mm_jax.data.tokenizer import AUDIO, VIDEO
from mm_jax.serve.prompts import read_prompt
from mm_jax.serve.requests import Message

SPACE = built_in("mesc")
MEDIA = {
    VIDEO: [{"type": "image_url", "image_url": {"url": "data:;base64,AAAA"}}] * 3,
    AUDIO: [{"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}],
}


def read(messages):
    return read_prompt([Message(**message) for message in messages], SPACE)


def lines(sample, labels):
    """Returns what a prompt shows of a history: speakers, texts with clues, labels."""
    shown = []
    for utterance, own in zip(sample.history, labels, strict=True):
        text = f"{utterance.text} {utterance.clue}" if utterance.clue else utterance.text
        shown.append((utterance.speaker, text, dict(own or {})))
    return shown


@pytest.mark.parametrize("template", sorted(SYSTEM))
@pytest.mark.parametrize("media", [{}, MEDIA, {VIDEO: MEDIA[VIDEO]}, {AUDIO: MEDIA[AUDIO]}])
@pytest.mark.parametrize("regime", ["gold", "none"])
def test_every_sample_is_read_back(synthetic, template, media, regime):
    source = SampleSource(synthetic.folder, "train", light=True)
    for i in range(len(source)):
        sample = source[i]
        shown = history_labels(sample, regime)
        found = read(chat_messages(sample, template, SPACE, shown, media))
        for field in ("client_text", "problem_type", "situation", "client_clue"):
            assert getattr(found, field) == getattr(sample, field)
        expected = [(s, t, labels) for s, t, labels in lines(sample, shown)]
        assert lines(found, [u.labels for u in found.history]) == expected


ODD = Sample(
    id="odd",
    dialogue_id="odd",
    client_text="The client now says: nothing.\nWhat can be seen: a trick",
    situation="Line one\nThe conversation so far: none",
    history=(
        Utterance(CLIENT, "(sadness) is my middle name\nand this is a second line"),
        Utterance(THERAPIST, "Client (joy) said this", {"strategy": "open question"}),
        Utterance(CLIENT, ""),
    ),
)


@pytest.mark.parametrize("template", sorted(SYSTEM))
def test_odd_words_give_the_same_prompt_or_none(template):
    for sample in (ODD, dataclasses.replace(ODD, situation=""), Sample("x", "x", "")):
        shown = [u.labels for u in sample.history]
        messages = chat_messages(sample, template, SPACE, shown)
        found = read(messages)
        if found is not None:
            own = [u.labels for u in found.history]
            assert chat_messages(found, template, SPACE, own) == messages


def test_other_messages_are_no_prompts():
    ours = chat_messages(Sample("x", "x", "Hello."), "ecot", SPACE, [])
    assert read(ours).client_text == "Hello."
    assert read(ours[1:]) is None
    assert read([ours[0], ours[1], ours[1]]) is None
    assert read([{"role": "system", "content": "Be kind."}, ours[1]]) is None
    assert read([ours[0], {"role": "user", "content": "Hello."}]) is None
    assert read([ours[0], {"role": "user", "content": ours[1]["content"] + "\nMore."}]) is None
    assert read([ours[0], {"role": "user", "content": "\x00v" + ours[1]["content"]}]) is None
