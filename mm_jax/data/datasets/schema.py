"""The schema of stored samples: labels, texts, coded pictures; to TFDS' dicts and back."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from mm_jax.data.labels import LabelSpace
from mm_jax.data.records import Sample, Utterance

TEXT_FIELDS = tuple(
    f.name for f in dataclasses.fields(Sample) if f.type == "str" and f.name != "id"
)
# Where records hold labels: MESC's tasks in columns of their own, those of an utterance by kind;
# other data sets' tasks in columns with this prefix. (The order of columns is that of the bytes.)
OWN = "label_"
MESC_COLUMNS = ("client_emotion", "therapist_emotion", "strategy")
MESC_UTTERANCE_COLUMNS = {"emotion": "{speaker}_emotion", "strategy": "strategy"}
# How the frames of records are stored: each as a lossless WebP or a JPEG, or all as zlib's bytes.
FRAME_CODECS = {
    "webp": dict(format="WEBP", lossless=True, method=2, quality=30),
    "jpeg": dict(format="JPEG", quality=95, subsampling=0),
    "zlib": None,
}
SHARE_KEPT = {"webp": 0.22, "jpeg": 0.1, "zlib": 0.55}  # of the raw bytes of two real clips' frames


def label_columns(space: LabelSpace) -> tuple[dict[str, str], dict[str, str]]:
    """Returns the columns of labels in a sample and in an utterance: column -> task."""
    named = {"strategy", *(f"{task.about}_emotion" for task in space.tasks)}
    if set(space.names) <= set(MESC_COLUMNS) & named:  # a task of MESC's name may be another one
        return {name: name for name in MESC_COLUMNS}, MESC_UTTERANCE_COLUMNS
    own = {f"{OWN}{name}": name for name in space.names}
    return own, own


def stored_labels(
    columns: Mapping[str, str], labels: Mapping[str, str], speaker: str = ""
) -> dict[str, str]:
    return {c: labels.get(task.format(speaker=speaker), "") for c, task in columns.items()}


def read_stored_labels(
    columns: Mapping[str, str], stored: Mapping[str, str], speaker: str = ""
) -> dict[str, str]:
    """Returns task -> label of what `stored_labels` made."""
    return {t.format(speaker=speaker): stored[c] for c, t in columns.items() if stored[c]}


def features(image_size: int, codec: str, space: LabelSpace) -> tfds.features.FeaturesDict:
    """Returns the schema of one sample (see `records.Sample`)."""
    text = tfds.features.Text
    columns, of_utterances = label_columns(space)
    # The side is that of samples without frames, too.
    frames = {"frames": tfds.features.Sequence(text()), "image_size": np.int32}
    if FRAME_CODECS[codec] is None:
        shape = (None, image_size, image_size, 3)
        frames = {"frames": tfds.features.Tensor(shape=shape, dtype=np.uint8, encoding="zlib")}
    return tfds.features.FeaturesDict(
        {
            "id": text(),
            **{name: text() for name in (*TEXT_FIELDS[:2], *columns, *TEXT_FIELDS[2:])},
            "turn": np.int32,
            "history": tfds.features.Sequence(
                {
                    **{name: text() for name in ("speaker", "text", *of_utterances, "clue")},
                    "turn": np.int32,
                }
            ),
            **frames,
            "fbank": tfds.features.Tensor(shape=(None, 128), dtype=np.float32, encoding="zlib"),
            # Lengths, so that batches can be planned without decoding media.
            "num_frames": np.int32,
            "fbank_frames": np.int32,
        }
    )


def to_example(sample: Sample, image_size: int, codec: str, space: LabelSpace) -> dict:
    """Converts a `Sample` to the dict that TFDS stores."""
    columns, of_utterances = label_columns(space)
    form, frames = FRAME_CODECS[codec], {"frames": sample.frames}
    if form is not None:
        coded = [encode_picture(picture, form) for picture in sample.frames]
        frames = {"frames": coded, "image_size": image_size}
    elif len(sample.frames) == 0:
        frames = {"frames": np.zeros((0, image_size, image_size, 3), np.uint8)}
    return {
        "id": sample.id,
        **{name: getattr(sample, name) for name in TEXT_FIELDS[:2]},
        **stored_labels(columns, sample.labels),
        **{name: getattr(sample, name) for name in TEXT_FIELDS[2:]},
        "turn": sample.turn,
        "history": [
            {
                "speaker": u.speaker,
                "text": u.text,
                **stored_labels(of_utterances, u.labels, u.speaker),
                "clue": u.clue,
                "turn": u.turn,
            }
            for u in sample.history
        ],
        **frames,
        "fbank": sample.fbank,
        "num_frames": len(sample.frames),
        "fbank_frames": len(sample.fbank),
    }


def encode_picture(picture: np.ndarray, form: dict) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, **form)
    return file.getvalue()


def decode_pictures(stored: Sequence[bytes], size: int) -> np.ndarray:
    """Decodes the pictures of a record to uint8[F, S, S, 3]."""
    out = np.empty((len(stored), size, size, 3), np.uint8)
    for i, data in enumerate(stored):
        out[i] = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    return out


def from_example(example: dict, light: bool = False) -> Sample:
    """Converts a stored dict to a `Sample`.

    `light`: the media were not decoded; `frames` and `fbank` are zeros of the right length that
    take no memory.
    """
    if light:
        frames = np.broadcast_to(np.uint8(0), (int(example["num_frames"]), 1, 1, 3))
        fbank = np.broadcast_to(np.float32(0), (int(example["fbank_frames"]), 128))
        example = {**example, "frames": frames, "fbank": fbank}
    own = {name: name.removeprefix(OWN) for name in example if name.startswith(OWN)}
    columns, of_utterances = own, own
    if not own:
        columns, of_utterances = {name: name for name in MESC_COLUMNS}, MESC_UTTERANCE_COLUMNS
    turns = {name: list(values) for name, values in example["history"].items()}
    history = []
    for i, turn in enumerate(turns.pop("turn")):
        said = {name: values[i].decode() for name, values in turns.items()}
        labels = read_stored_labels(of_utterances, said, said["speaker"])
        history.append(
            Utterance(said["speaker"], said["text"], labels, said["clue"], turn=int(turn))
        )
    return Sample(
        id=example["id"].decode(),
        labels=read_stored_labels(columns, {c: example[c].decode() for c in columns}),
        **{name: example[name].decode() for name in TEXT_FIELDS},
        turn=int(example["turn"]),
        history=tuple(history),
        frames=example["frames"],
        fbank=example["fbank"],
    )
