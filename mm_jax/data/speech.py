"""Writes down what is said in recordings, by Whisper (faster-whisper, requirements-speech.txt)."""

from __future__ import annotations

import dataclasses
import json
import logging
import pathlib
from collections.abc import Sequence

import numpy as np

from mm_jax.config.errors import ConfigError, require
from mm_jax.config.files import parse_json, well_formed
from mm_jax.data.recording import Clip, MediaError
from mm_jax.data.sound import read_sound

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

    It runs on a GPU in float16 if CTranslate2 finds one, and else in float32. language: a
    code such as "en"; "" lets the model find out. Raises ConfigError.
    """

    def __init__(self, model: str, language: str = ""):
        try:
            import ctranslate2
            import faster_whisper
        except ImportError as error:
            raise ConfigError(f"--transcribe: {NOT_INSTALLED}") from error
        on_gpu = ctranslate2.get_cuda_device_count() > 0
        kind = dict(device="cuda", compute_type="float16") if on_gpu else {}
        try:
            self.whisper = faster_whisper.WhisperModel(
                model, **(kind or dict(device="cpu", compute_type="float32"))
            )
        except Exception as error:  # of CTranslate2, of the hub, of the network
            raise ConfigError(f"--transcribe: {model}: {error}") from error
        known = self.whisper.supported_languages
        require(
            not language or language in known,
            f"--language: {model} knows {', '.join(known)}; got {language!r}",
        )
        self.model, self.language = model, language

    def __call__(self, clips: Sequence[Clip]) -> Transcript:
        """Transcribes joined clips; those without usable sound are left out. Silence has no words.
        Raises MediaError if no clip has sound."""
        waves, errors = [], []
        for clip in clips:
            try:
                waves.append(read_sound(clip)[0])
            except MediaError as error:
                errors.append(error)
        if not waves:
            raise errors[0] if errors else MediaError("missing")
        found, info = self.whisper.transcribe(
            np.concatenate(waves),
            language=self.language or None,
            temperature=0.0,  # else it samples where it is unsure
            condition_on_previous_text=False,
            vad_filter=True,  # on silence and noise it would invent words
        )
        segments = tuple(
            (round(s.start, 2), round(s.end, 2), well_formed(s.text.strip())) for s in found
        )
        text = " ".join(text for _, _, text in segments if text)
        return Transcript(text, info.language, segments)


class Transcripts:
    """Keeps the transcripts of a data set's samples in a JSONL file, so that an interrupted build
    goes on where it was, and words can be corrected by hand. Raises ConfigError for a damaged file
    and for one of another model or language."""

    def __init__(self, path: pathlib.Path, model: str, language: str = ""):
        self.path, self.transcriber = path, Transcriber(model, language)
        self.made_by = {"model": model, "asked_language": language}
        self.texts: dict[str, str] = {}
        if not path.is_file():
            return
        whole, _, torn = path.read_bytes().rpartition(b"\n")
        if torn:  # the line that was being written when a build was killed
            path.write_bytes(whole + b"\n" if whole else b"")
        for number, line in enumerate(whole.split(b"\n") if whole else (), 1):
            where = f"{path} line {number}"
            try:
                row = parse_json(line.decode())
                self.texts[row["id"]] = well_formed(row["text"])
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ConfigError(f"{where}: expected a transcript: {error}") from error
            made_by = {name: row.get(name) for name in self.made_by}
            require(
                made_by == self.made_by,
                f"{where}: transcribed with {made_by}, now asked for {self.made_by}; remove the "
                "file to transcribe again",
            )

    def __call__(self, sample: str, clips: Sequence[Clip]) -> str:
        """Returns the words of a sample's clips, "" if there are none. Raises MediaError."""
        if sample not in self.texts:
            found = self.transcriber(clips)
            row = {"id": sample, **dataclasses.asdict(found), **self.made_by}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            self.texts[sample] = found.text
        return self.texts[sample]
