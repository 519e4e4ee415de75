import shutil

import numpy as np
import pytest
from PIL import Image

from mm_jax.data.datasets.common import DataError, SampleSource
from mm_jax.data.datasets.dfew.dfew_dataset_builder import ClipIndex, hold_out
from mm_jax.data.labels import built_in
from tests.conftest import run_prepare
from tests.support.media import write_tree, write_video


def build(root, out, *arguments):
    return run_prepare(
        "--dataset=dfew",
        f"--raw={root}",
        f"--data_dir={out}",
        "--num_frames=11",
        "--image_size=24",
        *arguments,
    )


@pytest.mark.parametrize(
    "spelling", ["{}(single-labeled)", "{}(single_labeled)", "{}_single-labeled"]
)
def test_fold_with_media_and_missing_clips(tmp_path, spelling):
    folder = build(write_tree(tmp_path / "raw", spelling, fold=3), tmp_path / "data", "--fold=3")
    test = {s.id: s for s in SampleSource(folder, "test")}
    assert {s.target("client_emotion") for s in test.values()} == {"sad", "happy"}
    assert test["00021"].video_status == test["00021"].audio_status == "ok"
    assert test["00022"].audio_status == "no audio stream"
    order = [int(f.mean()) // 20 for f in test["00022"].frames]
    assert order == sorted(order)  # 10.jpg comes after 9.jpg
    assert (test["00023"].video_status, test["00023"].audio_status) == ("missing", "missing")
    sizes = {s: len(SampleSource(folder, s)) for s in ("train", "val")}
    assert sizes == {"train": 18, "val": 2}


def test_frames_are_the_same_in_every_lossless_codec(tmp_path, caplog):
    root, found = write_tree(tmp_path / "raw"), {}
    video = root / "Clip" / "original" / "part" / "00003.mp4"
    rng = np.random.default_rng(0)
    write_video(video, picture=lambda i: rng.integers(0, 256, (8, 8, 3)).repeat(8, 0).repeat(8, 1))
    for codec in ("webp", "zlib", "jpeg"):
        with caplog.at_level("INFO"):
            folder = build(root, tmp_path / codec, f"--frame_codec={codec}")
        assert f"of 24 pixels, {codec})" in caplog.text
        assert folder.parent.name == "fold1_f11_s24" + ("" if codec == "webp" else f"_{codec}")
        splits = ("train", "val", "test")
        found[codec] = {s.id: s.frames for n in splits for s in SampleSource(folder, n)}
        light = {s.id: len(s.frames) for n in splits for s in SampleSource(folder, n, light=True)}
        assert light == {name: len(frames) for name, frames in found[codec].items()}
    for name, frames in found["zlib"].items():
        np.testing.assert_array_equal(found["webp"][name], frames)
        assert found["jpeg"][name].shape == frames.shape == (len(frames), 24, 24, 3)
    assert 0 < np.abs(found["jpeg"]["00003"].astype(int) - found["zlib"]["00003"]).max() < 60


def test_validation_slice_is_stratified_and_seeded():
    labels = {str(i): built_in("dfew").tasks[0].labels[i % 7 if i < 70 else 0] for i in range(100)}
    held = hold_out(labels, 0.2, seed=1)
    counts = [sum(labels[n] == e for n in held) for e in built_in("dfew").tasks[0].labels]
    assert counts == [8, 2, 2, 2, 2, 2, 2]
    assert held == hold_out(labels, 0.2, seed=1)
    assert held != hold_out(labels, 0.2, seed=2)


def test_bad_annotations_are_named(tmp_path):
    root = write_tree(tmp_path / "raw")
    path = root / "EmoLabel_DataSplit" / "test(single-labeled)" / "set_1.csv"
    path.write_text("video_name,label\n5,9\n")
    with pytest.raises(DataError, match="line 2: label: expected 1 to 7, got '9'"):
        build(root, tmp_path / "a")
    path.write_text("name,label\n5,1\n")
    with pytest.raises(DataError, match="expected header video_name,label"):
        build(root, tmp_path / "b")
    path.write_text("video_name,label\n5,1\n")  # a train clip
    with pytest.raises(DataError, match="clips in train and test"):
        build(root, tmp_path / "c")
    write_video(root / "Clip" / "original" / "1.mp4")  # of train
    path.write_text("video_name,label\n../../secret,1\n")
    folder = build(root, tmp_path / "d")
    assert SampleSource(folder, "test")[0].video_status == "outside the media root"


def test_index_finds_frames_in_numeric_order(tmp_path):
    index = ClipIndex(write_tree(tmp_path / "raw"))
    assert [p.stem for p in index.frames("22")] == [str(i) for i in range(1, 12)]


@pytest.mark.parametrize(
    ("video", "frames"),
    [("21.mp4", "22/1.png"), ("00021.MP4", "00022/1.JPG"), ("0021.avi", "22/00001.jpeg")],
)
def test_names_are_found_padded_or_not_with_any_suffix(tmp_path, video, frames):
    root = write_tree(tmp_path / "raw")
    original, faces = root / "Clip" / "original", root / "Clip" / "clip_224x224_16f"
    (original / "part" / "00021.mp4").unlink()
    write_video(original / "a.mp4").rename(original / video)
    for path in (faces / "00022").iterdir():
        path.unlink()
    (faces / "00022").rmdir()
    (faces / frames).parent.mkdir()
    Image.fromarray(np.full((24, 24, 3), 9, np.uint8)).save(faces / "x.png")
    (faces / "x.png").rename(faces / frames)
    folder = build(root, tmp_path / "data")
    test = {s.id: s for s in SampleSource(folder, "test")}
    assert test["00021"].video_status == test["00021"].audio_status == "ok"
    assert test["00022"].video_status == "ok"
    assert test["00023"].video_status == "missing"


def test_a_data_set_without_any_input_is_an_error(tmp_path):
    root = write_tree(tmp_path / "raw")
    shutil.rmtree(root / "Clip")
    (root / "Clip" / "originals").mkdir(parents=True)
    with pytest.raises(DataError, match=r"no media found for any of 23 samples.*holds originals"):
        build(root, tmp_path / "data")
    assert not (tmp_path / "data").exists() or not list((tmp_path / "data").rglob("*.json"))
