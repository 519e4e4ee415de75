"""Writes down what is said in recordings, by Whisper (faster-whisper, requirements-speech.txt)."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import pathlib
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np

from mm_jax.config.errors import ConfigError, require
from mm_jax.config.files import parse_json, well_formed
from mm_jax.data.recording import Clip, MediaError
from mm_jax.data.sound import read_sounds

logging.getLogger("faster_whisper").setLevel(logging.WARNING)
NOT_INSTALLED = "it needs faster-whisper: pip install -r requirements-speech.txt"


@dataclasses.dataclass(frozen=True)
class Transcript:
    """What is said, "" if nothing is; segments: (start, end, text), in seconds of the sound."""

    text: str
    language: str
    segments: tuple[tuple[float, float, str], ...]


class Transcriber:
    """Holds a Whisper model in CTranslate2's format: a local folder, or a name such as "small" or
    "Systran/faster-whisper-small", which is downloaded.

    It runs on a GPU if CTranslate2 finds one, in float16 where it can. language: a code such as
    "en"; "" lets the model find out. Raises ConfigError.
    """

    def __init__(self, model: str, language: str = ""):
        try:
            import ctranslate2
            import faster_whisper
        except ImportError as error:
            raise ConfigError(f"--transcribe: {NOT_INSTALLED}") from error
        device = "cuda" if ctranslate2.get_cuda_device_count() > 0 else "cpu"
        kinds = ctranslate2.get_supported_compute_types(device)
        half = device == "cuda" and "float16" in kinds
        try:
            self.whisper = faster_whisper.WhisperModel(
                model, device=device, compute_type="float16" if half else "float32"
            )
        except Exception as error:  # of CTranslate2, of the hub, of the network
            raise ConfigError(f"--transcribe: {model}: {error}") from error
        known = self.whisper.supported_languages
        require(
            not language or language in known,
            f"--language: {model} knows {', '.join(known)}; got {language!r}",
        )
        self.model, self.language = model, language

    def __call__(self, sound: np.ndarray) -> Transcript:
        """Transcribes float32[samples] at 16 kHz; silence has no words. Raises ConfigError."""
        try:
            found, info = self.whisper.transcribe(
                sound,
                language=self.language or None,
                temperature=0.0,  # else it samples where it is unsure
                condition_on_previous_text=False,
                vad_filter=True,  # on silence and noise it would invent words
            )
            segments = tuple(
                (round(s.start, 2), round(s.end, 2), well_formed(s.text.strip())) for s in found
            )
        except RuntimeError as error:  # of CUDA: a library that is absent, no memory
            raise ConfigError(
                f"--transcribe: {self.model}: {error}; "
                "with CUDA_VISIBLE_DEVICES= it runs on the CPU"
            ) from error
        text = " ".join(text for _, _, text in segments if text)
        return Transcript(text, info.language, segments)


def _ends_a_line(file: BinaryIO) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read() == b"\n"


def sound_of(clips: Sequence[Clip]) -> np.ndarray:
    """Joins the sound of clips, float32[samples]; those without are left out. Raises MediaError if
    none has any."""
    sounds, _, reasons = read_sounds(clips)
    if not sounds:
        raise MediaError(reasons[0] if reasons else "no recording")
    return np.concatenate(sounds)


class Transcripts:
    """Keeps the transcripts of a data set's samples in a JSONL file: an interrupted build goes on
    where it was, other builds use them, and words can be corrected by hand.

    A transcript belongs to a sample, its sound, a model and the language asked for; of several the
    last counts. Raises ConfigError for a damaged file.
    """

    def __init__(self, path: pathlib.Path, model: str, language: str = ""):
        self.path, self.transcriber = path, Transcriber(model, language)
        self.made_by = {"model": model, "asked_language": language}
        self.texts: dict[tuple[str, str], str] = {}
        if path.is_file():
            with open(path, "r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # another build may be writing a line
                self._read(file)

    def _read(self, file: BinaryIO) -> None:
        data = file.read()
        *lines, last = data.split(b"\n")
        for number, line in enumerate([*lines, last], 1):
            if not line.strip():
                continue
            try:
                row = parse_json(line.decode("utf-8-sig"))  # of an editor
                key, text = (str(row["id"]), str(row["sound"])), well_formed(row["text"])
                made_by = {name: row[name] for name in self.made_by}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                if number > len(lines):  # it was being written when a build was killed
                    file.truncate(len(data) - len(last))
                    break
                raise ConfigError(
                    f"{self.path} line {number}: not a transcript: {error!r}"
                ) from error
            if made_by == self.made_by:
                self.texts[key] = text

    def __call__(self, sample: str, clips: Sequence[Clip]) -> str:
        """Returns the words of a sample's clips, "" if there are none. Raises MediaError."""
        sound = sound_of(clips)
        mark = hashlib.sha256(sound).hexdigest()[:16]
        if (sample, mark) not in self.texts:
            found = self.transcriber(sound)
            row = {"id": sample, "sound": mark, **dataclasses.asdict(found), **self.made_by}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            line = json.dumps(row, ensure_ascii=False).encode()
            with open(self.path, "a+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                # An editor may have left out the end of the last line.
                if file.seek(0, os.SEEK_END) and not _ends_a_line(file):
                    line = b"\n" + line
                file.write(line + b"\n")
            self.texts[sample, mark] = found.text
        return self.texts[sample, mark]
