import json
import threading

import numpy as np
import pytest

from mm_jax.data.datasets.common import SampleSource, in_threads
from mm_jax.data.datasets.synthetic.generator import CUES, make_dialogue, write_raw
from mm_jax.data.media import Clip, MediaSpec, load_media


def test_deterministic_by_seed(tmp_path):
    write_raw(tmp_path / "a", size=2, seed=5)
    write_raw(tmp_path / "b", size=2, seed=5)
    write_raw(tmp_path / "c", size=2, seed=6)
    texts = [(tmp_path / n / "dialogues.json").read_text() for n in "abc"]
    assert texts[0] == texts[1] != texts[2]
    clip = sorted((tmp_path / "a" / "clips").iterdir())[0].name
    got = [load_media([Clip(tmp_path / n / "clips" / clip)], MediaSpec(4, 32)) for n in ("a", "b")]
    np.testing.assert_array_equal(got[0].frames, got[1].frames)
    np.testing.assert_array_equal(got[0].fbank, got[1].fbank)


def test_every_sample_has_media_and_one_cue(synthetic):
    samples = list(SampleSource(synthetic.folder, "train"))
    assert {s.video_status for s in samples} == {s.audio_status for s in samples} == {"ok"}
    assert {s.cue for s in samples} == set(CUES)
    report = json.loads((synthetic.folder / "build_report.json").read_text())
    assert report["media"]["train"]["video"] == {"ok": len(samples)}


def test_emotion_is_shown_in_the_cue_only():
    for index in range(40):
        dialogue, cues, shown = make_dialogue(index, seed=1)
        for i, cue in cues.items():
            face, voice = shown[i]
            emotion = dialogue.utterances[i].labels["client_emotion"]
            assert face == (emotion if cue == "video" else "neutral")
            assert voice == (emotion if cue == "audio" else "neutral")


def test_in_threads_keeps_the_order_and_runs_a_few_items_ahead(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    asked = []

    def items():
        for i in range(100):
            asked.append(i)
            yield i

    both = threading.Barrier(2, timeout=60)

    def square(i: int) -> int:
        if i < 2:
            both.wait()  # the first two are only done side by side
        return i * i

    squares = in_threads(square, items())
    assert next(squares) == 0
    assert len(asked) == 5
    assert list(squares) == [i * i for i in range(1, 100)]
    with pytest.raises(ZeroDivisionError):
        list(in_threads(lambda i: 1 // i, range(3)))
