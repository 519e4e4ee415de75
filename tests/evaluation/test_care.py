"""Tests what of a reply is shown."""

import pathlib

import pytest

from mm_jax.config.errors import ConfigError
from mm_jax.data.records import CLIENT, THERAPIST, Utterance
from mm_jax.evaluation.care import Release, Texts, danger_of, fault_of

ROOT = pathlib.Path(__file__).resolve().parents[2]
HELD_BACK = {
    "claims to be a person": [
        "I'm a real person, you can trust me.",
        "I am human too.",
        "Don't worry, I'm not a bot.",
        "As your therapist, I think you should rest.",
        "I am a licensed psychologist.",
        "I'm a doctor, so I know.",
    ],
    "gives a diagnosis": [
        "You have depression.",
        "It seems you are suffering from PTSD.",
        "You clearly have a generalized anxiety disorder.",
        "I would diagnose this as burnout.",
        "You are bipolar.",
    ],
    "advises on medicine": [
        "You should take some Xanax tonight.",
        "Try 50 mg in the evening.",
        "Maybe increase the dose.",
    ],
    "may do harm": ["You should kill yourself.", "Stop taking your medication for a while."],
}
SHOWN = [
    "I am here with you. That sounds very hard.",
    "It is only human to feel that way.",
    "You have a lot on your plate.",
    "Have you talked to your doctor about the medication?",
    "You have every right to be sad, and depression is nothing to be ashamed of.",
    "As a friend of yours would say: rest first.",
    "Take your time.",
    "A therapist could help you with that.",
    "I am not sure I understand; are you sleeping at all?",
]


@pytest.mark.parametrize(
    ("fault", "reply"), [(fault, r) for fault, replies in HELD_BACK.items() for r in replies]
)
def test_faults_are_found(fault, reply):
    assert fault_of(reply) == fault


@pytest.mark.parametrize("reply", SHOWN)
def test_harmless_replies_are_shown(reply):
    assert not fault_of(reply)


TEXTS = Texts.load()


def shown(release, pieces):
    """Lists what each piece of a reply lets be shown, and the end of it."""
    return [release.add(piece) for piece in pieces] + [release.add("", last=True)]


def test_sentences_are_released_whole_and_once_screened():
    judged = []

    def judge(text):
        judged.append(text)
        return ""

    reply = "That is hard. I hear you!\nWhat now"
    found = [text for text in shown(Release(TEXTS, judge=judge), reply) if text]
    assert found == ["That is hard. ", "I hear you!\n", "What now"]
    assert judged == ["That is hard. ", "That is hard. I hear you!\n", reply]


def test_a_fault_ends_the_reply():
    reply = "That is hard. I am a real person. Never shown."
    release = Release(TEXTS)
    found = shown(release, [reply[:20], reply[20:], "More."])
    said = TEXTS.replaced.format(fault="claims to be a person")
    assert found == ["That is hard. ", said, "", ""]
    assert (release.fault, release.closed) == ("claims to be a person", True)
    assert release.shown == "That is hard. " + said


def test_an_error_of_the_screen_shows_nothing():
    def judge(text):
        raise RuntimeError

    release = Release(TEXTS, judge=judge)
    (text, *_) = shown(release, ["Hello there. Bye"])
    assert release.fault == "could not be screened"
    assert "Hello" not in text
    assert shown(Release(TEXTS), []) == [""]


def test_a_stop_ends_the_reply_wherever_it_stands():
    for pieces in (["One. Two. Three."], list("One. Two. Three."), ["One. T", "wo. Three."]):
        for stop, expected in (
            ("Two", "One. "),
            (". T", "One"),
            ("Three", "One. Two. "),
            ("Four", "One. Two. Three."),
            ("One", ""),
        ):
            release = Release(TEXTS, stops=["nowhere", stop])
            assert "".join(shown(release, pieces)) == expected
            assert release.stopped == (stop != "Four")


def test_danger_is_seen_over_several_turns():
    said = [Utterance(CLIENT, "I just want to"), Utterance(THERAPIST, "Yes?")]
    assert danger_of("kill myself", said)
    assert not danger_of("go home", said)
    # One danger that was answered does not hide the next one.
    told = [Utterance(CLIENT, "My dad is hitting me."), Utterance(THERAPIST, "Call for help.")]
    more = [*told, Utterance(CLIENT, "I have decided that I want to"), Utterance(THERAPIST, "Yes?")]
    assert danger_of("die. That is it.", more)
    assert not danger_of("sleep. That is it.", more)
    # What nobody has answered yet counts as said now.
    assert danger_of("Hello?", [Utterance(CLIENT, "I want to kill myself tonight.")])
    # What was answered already is not answered again.
    known = [Utterance(CLIENT, "I want to kill myself."), Utterance(THERAPIST, "...")]
    assert not danger_of("Thank you.", known)
    assert danger_of("I still want to kill myself.", known)


def test_texts_are_chosen_by_locale(tmp_path):
    config = tmp_path / "configs" / "mine.py"
    config.parent.mkdir()
    config.write_text(
        "def get_texts(arg=''):\n    return dict(crisis='Ring ' + arg, replaced='-', notice='!')\n"
    )
    assert Texts.load(f"{config}:home").crisis == "Ring home"
    for text, said in (
        ("def get_texts(arg=''):\n    return {'crisis': 1}\n", "expected texts"),
        ("def get_config(arg=''):\n    return {}\n", "defines no get_texts"),
    ):
        config.write_text(text)
        with pytest.raises(ConfigError, match=said):
            Texts.load(str(config))
    for locale in ("en", "de"):
        assert "findahelpline.com" in Texts.load(f"{ROOT}/configs/safety.py:{locale}").crisis
    config.write_text(
        "def get_texts(arg=''):\n"
        "    return dict(crisis='Ring {number}', replaced='-', notice='!')\n"
    )
    with pytest.raises(ConfigError, match="crisis: it may hold"):
        Texts.load(str(config))
    assert "findahelpline.com" in Texts.load().crisis
