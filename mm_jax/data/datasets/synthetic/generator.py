"""Generates synthetic emotional-support dialogues with encoded media, deterministic by seed.

Every client turn shows its emotion in one channel only, its `cue`: the face (mp4 video), the voice
(AAC sound), the words, or the history ("the same as before"); the other channels are neutral. So
the contribution of each modality can be measured.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from fractions import Fraction

import av
import numpy as np
from PIL import Image, ImageDraw

from mm_jax.data.datasets.common import in_threads
from mm_jax.data.datasets.schema import MESC_UTTERANCE_COLUMNS, stored_labels
from mm_jax.data.records import (
    CLIENT,
    CLIENT_EMOTION,
    STRATEGY,
    THERAPIST,
    THERAPIST_EMOTION,
    Dialogue,
    Utterance,
)

FPS, SIDE, SOUND_RATE = 8, 96, 16_000
CUES = ("video", "audio", "text", "history")
CUE_SHARES = (0.3, 0.3, 0.2, 0.2)


@dataclasses.dataclass(frozen=True)
class Look:
    """The look of an emotion.

    mouth: -1 (down) to 1 (up); open: mouth opening; brow: -1 (inner ends down) to 1 (up);
    eye: opening 0 to 1; tint: skin colour.
    """

    mouth: float
    open: float
    brow: float
    eye: float
    tint: tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Voice:
    """The voice of an emotion.

    pitch: in Hz; loudness: 0 to 1; tempo: syllables per second; tremble: 0 to 1.
    """

    pitch: float
    loudness: float
    tempo: float
    tremble: float


LOOKS = {
    "anger": Look(-0.6, 0.1, -1.0, 0.9, (228, 140, 120)),
    "sadness": Look(-1.0, 0.0, 0.7, 0.5, (190, 185, 205)),
    "disgust": Look(-0.5, 0.3, -0.5, 0.3, (190, 205, 150)),
    "depression": Look(-0.6, 0.0, 0.3, 0.15, (165, 160, 160)),
    "neutral": Look(0.0, 0.0, 0.0, 0.6, (224, 185, 160)),
    "joy": Look(1.0, 0.4, 0.3, 0.7, (245, 205, 150)),
    "fear": Look(-0.1, 0.9, 0.9, 1.0, (238, 222, 215)),
}
VOICES = {
    "anger": Voice(210, 0.9, 6.0, 0.1),
    "sadness": Voice(125, 0.25, 2.0, 0.1),
    "disgust": Voice(165, 0.55, 2.5, 0.0),
    "depression": Voice(95, 0.12, 1.5, 0.0),
    "neutral": Voice(145, 0.45, 4.0, 0.0),
    "joy": Voice(280, 0.65, 5.0, 0.0),
    "fear": Voice(350, 0.35, 7.5, 0.8),
}
PHRASES = {
    "anger": ("it makes me furious", "I could shout at all of them", "I am so mad at him"),
    "sadness": ("I cried all evening", "I miss her so much", "it hurts to think of it"),
    "disgust": ("it makes me feel sick", "I find it revolting", "I cannot stand the sight of it"),
    "depression": ("nothing matters any more", "I stay in bed all day", "everything feels empty"),
    "neutral": ("it was an ordinary day", "I went there and came back", "it is on my list"),
    "joy": ("I laughed the whole day", "it went wonderfully", "I feel so light and happy"),
    "fear": ("I am scared to go out", "my heart was pounding", "I keep thinking it will go wrong"),
}
TOPICS = (
    ("my job", "job loss or career setbacks", "They gave my work to somebody else."),
    ("my brother", "the relationship with friends and family", "We have not spoken for a year."),
    ("the divorce", "breakups or divorce", "The papers came last month."),
    ("my mother", "parental influence", "She calls me every morning."),
    ("the exam", "self-assessment", "I have to sit it again in spring."),
    ("the move", "interpersonal relationships", "I came to this town alone."),
)
VAGUE = (
    "It was about {topic} this week.",
    "You asked about {topic}, so here it is.",
    "There was something with {topic} again.",
    "I wanted to talk about {topic}.",
)
SAME = ("It is the same as before with {topic}.", "About {topic} I feel as I did before.")
FILLERS = ("Well.", "You know.", "Anyway.", "So.")
STRATEGY_OF = {
    "anger": "restatement",
    "sadness": "approval",
    "disgust": "interpretation",
    "depression": "advisement",
    "neutral": "open question",
    "joy": "communication skills",
    "fear": "self-disclosure",
}
REPLIES = {
    "restatement": "So {topic} is what you are angry about.",
    "approval": "It is brave to speak about {topic} with such grief.",
    "interpretation": "Perhaps {topic} stands for something you reject.",
    "advisement": "Could you do one small thing about {topic} tomorrow?",
    "open question": "What comes to mind about {topic}?",
    "communication skills": "I am glad to hear that about {topic}.",
    "self-disclosure": "I have been afraid too, in a way like you with {topic}.",
    "structuring the therapy": "Let us meet again next week and go on with {topic}.",
}


def therapist_labels(emotion: str, strategy: str) -> dict[str, str]:
    return {THERAPIST_EMOTION: emotion, STRATEGY: strategy}


def make_dialogue(
    index: int, seed: int
) -> tuple[Dialogue, dict[int, str], dict[int, tuple[str, str]]]:
    """Makes a dialogue; also maps client utterances to their cues and (face, voice) emotions."""
    rng = np.random.default_rng((seed, 11, index))
    topic, problem, situation = TOPICS[rng.integers(len(TOPICS))]
    emotions = tuple(LOOKS)
    utterances: list[Utterance] = []
    cues: dict[int, str] = {}
    shown: dict[int, tuple[str, str]] = {}
    turns, emotion = int(rng.integers(2, 5)), ""
    if rng.random() < 0.3:  # a therapist may open the dialogue
        utterances.append(
            Utterance(
                THERAPIST, "Please sit down.", therapist_labels("neutral", "communication skills")
            )
        )
    for turn in range(turns):
        cue = str(rng.choice(CUES, p=CUE_SHARES))
        if cue == "history" and not emotion:
            cue = "text"
        if cue == "history":
            text = SAME[rng.integers(len(SAME))].format(topic=topic)
        else:
            emotion = emotions[rng.integers(len(emotions))]
            text = VAGUE[rng.integers(len(VAGUE))].format(topic=topic)
        if cue == "text":
            phrase = PHRASES[emotion][rng.integers(len(PHRASES[emotion]))]
            text = f"{text} Well, {phrase}."
        face = emotion if cue == "video" else "neutral"
        voice = emotion if cue == "audio" else "neutral"
        first, labels = len(utterances), {CLIENT_EMOTION: emotion}
        if rng.random() < 0.25:
            utterances.append(Utterance(CLIENT, FILLERS[rng.integers(len(FILLERS))], labels))
        utterances.append(Utterance(CLIENT, text, labels))
        for i in range(first, len(utterances)):
            cues[i], shown[i] = cue, (face, voice)
        last = turn == turns - 1 and rng.random() < 0.2
        strategy = "structuring the therapy" if last else STRATEGY_OF[emotion]
        mood = "joy" if emotion == "joy" else "neutral"
        reply = REPLIES[strategy].format(topic=topic)
        utterances.append(Utterance(THERAPIST, reply, therapist_labels(mood, strategy)))
    return Dialogue(str(index), tuple(utterances), problem, situation), cues, shown


def draw_face(look: Look, openness: float, rng: np.random.Generator) -> np.ndarray:
    """Draws a face uint8[SIDE, SIDE, 3]; `openness` moves the mouth, rng places the head."""
    scale = 4
    image = Image.new("RGB", (SIDE, SIDE), tuple(int(v) for v in rng.integers(40, 90, 3)))
    draw = ImageDraw.Draw(image)
    cx, cy = SIDE / 2 + rng.normal(0, 2), SIDE / 2 + rng.normal(0, 2)
    r = SIDE * 0.4
    draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=look.tint)
    for side in (-1, 1):
        ex, ey = cx + side * r * 0.42, cy - r * 0.2
        h = 1 + look.eye * r * 0.16
        draw.ellipse((ex - r * 0.17, ey - h, ex + r * 0.17, ey + h), fill=(255, 255, 255))
        draw.ellipse((ex - 3, ey - min(3, h), ex + 3, ey + min(3, h)), fill=(20, 20, 30))
        inner, outer = ex - side * r * 0.22, ex + side * r * 0.22
        by = ey - r * 0.32
        draw.line(
            (inner, by - look.brow * r * 0.16, outer, by + look.brow * r * 0.1),
            fill=(50, 30, 20),
            width=scale,
        )
    gap = (look.open * 0.5 + openness * 0.25) * r * 0.35
    points = []
    for x in np.linspace(-1, 1, 9):
        points.append(
            (cx + x * r * 0.42, cy + r * 0.48 - look.mouth * r * 0.22 * (x * x - 0.5) * 2)
        )
    if gap > 1:
        lower = [(x, y + gap) for x, y in reversed(points)]
        draw.polygon(points + lower, fill=(120, 30, 40))
    draw.line(points, fill=(120, 30, 40), width=scale - 1)
    noise = rng.normal(0, 3, (SIDE, SIDE, 1))
    return np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)


def speak(voice: Voice, seconds: float, rng: np.random.Generator) -> np.ndarray:
    """Synthesises float32[samples] at 16 kHz: a harmonic tone in syllables."""
    t = np.arange(int(seconds * SOUND_RATE)) / SOUND_RATE
    pitch = voice.pitch * rng.normal(1, 0.03)
    wobble = 1 + voice.tremble * 0.06 * np.sin(2 * np.pi * 12 * t)
    phase = 2 * np.pi * np.cumsum(pitch * wobble) / SOUND_RATE
    tone = sum(np.sin(k * phase) / k for k in range(1, 7))
    tempo = voice.tempo * rng.normal(1, 0.05)
    syllables = np.clip(np.sin(2 * np.pi * tempo * t + rng.uniform(0, 2 * np.pi)), 0, 1)
    loudness = voice.loudness * rng.normal(1, 0.05)
    sound = 0.3 * loudness * tone * (0.15 + 0.85 * syllables) + rng.normal(0, 0.002, len(t))
    return np.clip(sound, -1, 1).astype(np.float32)


def write_clip(path: pathlib.Path, face: str, voice: str, rng: np.random.Generator) -> None:
    """Writes an mp4 of one utterance: H.264 video and an AAC track."""
    seconds = float(rng.uniform(0.9, 1.4))
    frames = max(2, round(seconds * FPS))
    sound = speak(VOICES[voice], seconds, rng)
    with av.open(str(path), "w") as container:
        video = container.add_stream("h264", rate=FPS)
        video.width = video.height = SIDE
        video.pix_fmt = "yuv420p"
        video.options = {"preset": "ultrafast", "crf": "20", "threads": "1"}
        audio = container.add_stream("aac", rate=SOUND_RATE, layout="mono")
        head = np.random.default_rng(int(rng.integers(2**31)))
        for i in range(frames):
            openness = 0.5 + 0.5 * np.sin(2 * np.pi * VOICES[voice].tempo * i / FPS)
            image = draw_face(LOOKS[face], openness, head)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            container.mux(video.encode(frame))
        container.mux(video.encode())
        for start in range(0, len(sound), 1024):
            frame = av.AudioFrame.from_ndarray(
                sound[None, start : start + 1024], format="fltp", layout="mono"
            )
            frame.sample_rate, frame.pts = SOUND_RATE, start
            frame.time_base = Fraction(1, SOUND_RATE)
            container.mux(audio.encode(frame))
        container.mux(audio.encode())


def raw_utterance(utterance: Utterance) -> dict:
    """Returns an utterance as dialogues.json holds it."""
    raw, columns = dataclasses.asdict(utterance), MESC_UTTERANCE_COLUMNS
    labels = stored_labels(columns, raw.pop("labels"), utterance.speaker)
    return {"speaker": raw.pop("speaker"), "text": raw.pop("text"), **labels, **raw}


def write_raw(root: pathlib.Path, size: int, seed: int) -> None:
    """Writes `size` dialogues: `dialogues.json` and `clips/{dialogue}_{utterance}.mp4`."""
    clips = root / "clips"
    clips.mkdir(parents=True, exist_ok=True)

    def write(index: int) -> dict:
        dialogue, cues, shown = make_dialogue(index, seed)
        for i, (face, voice) in shown.items():
            rng = np.random.default_rng((seed, 13, index, i))
            write_clip(clips / f"{dialogue.id}_{i}.mp4", face, voice, rng)
        raw = dataclasses.asdict(dialogue)
        raw["utterances"] = [raw_utterance(u) for u in dialogue.utterances]
        return {**raw, "cues": cues}

    dialogues = list(in_threads(write, range(size)))
    (root / "dialogues.json").write_text(json.dumps(dialogues, indent=1))
