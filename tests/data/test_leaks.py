"""Tests what is found that splits share."""

import dataclasses
import json

import numpy as np

from mm_jax.__main__ import main
from mm_jax.data.datasets.common import BUILD_REPORT
from mm_jax.data.datasets.leaks import marks_of, shared
from mm_jax.data.records import Sample
from tests.support.media import write_tree, write_video


def smooth(rng):
    """Draws pictures uint8[4, 48, 48, 3] of large blocks."""
    blocks = rng.integers(0, 256, (4, 8, 8, 3))
    return blocks.repeat(6, axis=1).repeat(6, axis=2).astype(np.uint8)


def test_each_kind_is_found_and_nothing_else():
    rng = np.random.default_rng(0)
    plain = [
        Sample(str(i), f"d{i}", f"Nobody else says this here {i}.", "joy", frames=smooth(rng))
        for i in range(40)
    ]
    assert shared({"train": map(marks_of, plain[:20]), "test": map(marks_of, plain[20:])}) == {}
    noise = rng.integers(-6, 7, plain[0].frames.shape)
    changed = np.clip(plain[0].frames.astype(int) + noise + 9, 0, 255).astype(np.uint8)
    dark = np.full_like(changed, 9)
    train = [*plain[:20], Sample("dark", "x", "Yes, I know.", "joy", frames=dark)]
    test = [
        dataclasses.replace(plain[20], dialogue_id="d3"),
        dataclasses.replace(plain[21], client_text="nobody ELSE says this, here: 4"),
        dataclasses.replace(plain[22], client_text="Yes, I know."),  # too short to tell
        dataclasses.replace(plain[23], frames=plain[5].frames),
        dataclasses.replace(plain[24], frames=changed),
        dataclasses.replace(plain[25], frames=dark + 1),  # dark pictures are all alike
        Sample("words", "y", "", "joy"),
    ]
    found = shared({"train": map(marks_of, train), "val": [], "test": map(marks_of, test)})
    assert found == {
        "train, test": {
            "dialogues": {"count": 1, "pairs": ["3 = 20"]},
            "longer texts": {"count": 1, "pairs": ["4 = 21"]},
            "equal clips": {"count": 1, "pairs": ["5 = 23"]},
            "similar clips": {"count": 1, "pairs": ["0 = 24"]},
        }
    }


def test_prepare_tells_what_splits_share(tmp_path, capsys):
    root = write_tree(tmp_path / "raw")
    clips = root / "Clip" / "original" / "part"
    for name in ("00003", "00004"):
        write_video(clips / f"{name}.mp4")  # as the test clip 00021
    arguments = ["prepare", "--dataset=dfew", f"--raw={root}", f"--data_dir={tmp_path / 'data'}"]
    assert main([*arguments, "--num_frames=4", "--image_size=24"]) == 0
    out = capsys.readouterr().out
    (report,) = (tmp_path / "data").rglob(BUILD_REPORT)
    found = json.loads(report.read_text())["shared"]["train, test"]["equal clips"]
    (pair,) = found["pairs"]
    assert found["count"] == 1
    assert pair in ("00003 = 00021", "00004 = 00021")
    assert f"shared by train and test: 1 equal clips ({pair})" in out
