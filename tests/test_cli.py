"""Tests the commands end to end on a tiny run: predict, evaluate, own files, messages."""

import json
import pathlib
import platform
import re
import shlex
import subprocess
import sys

import pytest

from mm_jax import __version__
from mm_jax.__main__ import COMMANDS, build_parser, main
from mm_jax.config.load import resolve
from tests.conftest import ROOT, tiny_config
from tests.support.media import write_video
from tests.support.runs import train

REAL = ROOT.parent / "shared" / "data" / "media"


def test_predict_and_evaluate(run, capsys):
    regimes = ["gold", "predicted", "none"]
    arguments = ["predict", f"--checkpoint={run}", "--modality", "text", "av"]
    assert main([*arguments, "--history_labels", *regimes]) == 0
    rows = [json.loads(x) for x in (run / "predictions.jsonl").read_text().splitlines()]
    groups = {(r["modality_asked"], r["history_labels"]) for r in rows}
    assert groups == {(m, g) for m in ("text", "av") for g in regimes}
    for row in rows:
        assert row["status"] == "scored"
        for task, p in row["probabilities"].items():
            assert sum(p.values()) == pytest.approx(1, abs=1e-4)
            assert row["predicted"][task] == max(p, key=p.get)
    assert main(["evaluate", f"--checkpoint={run}"]) == 0
    out = capsys.readouterr().out
    assert "repeat last label" in out
    metrics = json.loads((run / "metrics.json").read_text())
    assert len(metrics["systems"]) == 6
    assert {"majority", "logistic regression", "echo", "constant reply"} <= set(
        metrics["baselines"]
    )
    assert set(metrics["systems"][0]["by_cue"]) <= {"audio", "video", "text", "history"}
    report = (run / "report.html").read_text()
    assert report.count("data:image/png;base64") >= 4
    assert not re.search(r"(src|href)=.https?:", report)


def test_shards_predict_what_one_process_does(run, tmp_path, capsys):
    arguments = ["predict", f"--checkpoint={run}", "--labels_only", "--modality", "text", "a"]
    arguments += ["--history_labels", "predicted", "gold"]
    assert main([*arguments, f"--out={tmp_path}/whole.jsonl"]) == 0
    out = tmp_path / "parts.jsonl"
    for shard in (2, 0, 1):
        assert not out.exists()
        assert main([*arguments, f"--out={out}", f"--shard={shard}/3"]) == 0
    whole, parts = (
        [json.loads(x) for x in (tmp_path / f"{n}.jsonl").read_text().splitlines()]
        for n in ("whole", "parts")
    )
    assert [(r["id"], r["modality"]) for r in whole] == [(r["id"], r["modality"]) for r in parts]
    for a, b in zip(whole, parts, strict=True):
        assert a["predicted"] == b["predicted"]
        assert a["history_labels"] == b["history_labels"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["parts.jsonl", "whole.jsonl"]
    assert main([*arguments, "--shard=3/3"]) == 2
    assert "--shard: expected I/N with 0 <= I < N, got '3/3'" in capsys.readouterr().err


def test_predicted_regime_shows_the_models_own_labels(run, synthetic, monkeypatch):
    """Checks that every wave sees the labels predicted for earlier turns."""
    from mm_jax.generation import predictor as predict_lib

    seen = {}
    original = predict_lib.history_labels

    def spy(sample, regime, known):
        shown = original(sample, regime, known)
        seen[sample.id] = (sample, shown)
        return shown

    monkeypatch.setattr(predict_lib, "history_labels", spy)
    out = run / "waves.jsonl"
    arguments = ["predict", f"--checkpoint={run}", "--split=train", "--history_labels=predicted"]
    assert main([*arguments, "--modality=text", "--labels_only", f"--out={out}"]) == 0
    rows = {r["id"]: r for r in map(json.loads, out.read_text().splitlines())}
    checked = 0
    for sample, shown in seen.values():
        for utterance, labels in zip(sample.history, shown, strict=True):
            owner = rows.get(predict_lib_owner(sample, utterance))
            if owner is None:
                assert labels == {}
            elif utterance.speaker == "client":
                assert labels["client_emotion"] == owner["predicted"]["client_emotion"]
                checked += 1
    assert checked > 10


def test_dfew_from_files_to_report(tmp_path_factory, capsys):
    """Runs the task without text, history or replies; clips without usable media stay in."""
    from tests.conftest import run_prepare
    from tests.support.media import write_tree

    base = tmp_path_factory.mktemp("dfew")
    raw = write_tree(base / "raw")
    for i in range(1, 21):
        write_video(raw / "Clip" / "original" / "part" / f"{i:05d}.mp4", frames=5, sound=0.5)
    folder = run_prepare(
        "--dataset=dfew",
        f"--raw={raw}",
        f"--data_dir={base / 'data'}",
        "--num_frames=4",
        "--image_size=32",
    )
    config = tiny_config(folder)
    config.model.parts = ("vision", "audio")
    config.stages = ("sft",)
    config.stage.sft.update(steps=1, select_by="labels")
    train(config, base / "run")
    assert main(["predict", f"--checkpoint={base / 'run'}"]) == 0
    assert main(["evaluate", f"--checkpoint={base / 'run'}"]) == 0
    metrics = json.loads((base / "run" / "metrics.json").read_text())
    (system,) = metrics["systems"]
    assert set(system["standard"]) == {"client_emotion"}
    assert system["n"] == 3
    assert metrics["media"]["video"] == {"ok": 2, "missing": 1}
    rows = (base / "run" / "predictions.jsonl").read_text().splitlines()
    modality = {r["id"]: r["modality"] for r in map(json.loads, rows)}
    assert modality == {"00021": "av", "00022": "v", "00023": "text"}


def predict_lib_owner(sample, utterance):
    from mm_jax.data.records import labelling_sample_id

    return labelling_sample_id(sample.dialogue_id, utterance)


def test_generated_labels_are_parsed(run):
    out = run / "generated.jsonl"
    arguments = ["predict", f"--checkpoint={run}", "--limit=4", f"--out={out}"]
    assert main([*arguments, "--config.predict.labels=generated"]) == 0
    rows = [json.loads(x) for x in out.read_text().splitlines()]
    assert len(rows) == 4
    for row in rows:  # an untrained model writes no valid answer, and nothing is guessed
        assert row["status"].startswith("unparseable")
        assert row["predicted"]["client_emotion"] == ""
        assert "probabilities" not in row


def test_own_files(run, tmp_path, capsys):
    clip = write_video(tmp_path / "me.mp4")
    (tmp_path / "history.txt").write_text("Therapist: Hello.\nClient: I am tired.\n")
    arguments = ["predict", f"--checkpoint={run}", f"--video={clip}", "--text=It goes on."]
    assert main([*arguments, f"--history={tmp_path / 'history.txt'}"]) == 0
    out = capsys.readouterr().out
    assert "4 frames" in out
    assert "2 earlier utterances" in out
    for line in ("Client's emotion:", "Therapist's strategy:", "Therapist's response:"):
        assert line in out
    history = [{"speaker": "Client", "text": "Hm.", "emotion": "Fear"}]
    (tmp_path / "history.json").write_text(json.dumps(history))
    arguments = ["predict", f"--checkpoint={run}", "--text=Yes.", "--json"]
    assert main([*arguments, f"--history={tmp_path / 'history.json'}"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["modality"], row["history_labels"]) == ("text", "gold")


def test_words_of_danger_are_answered_with_where_help_is_found_first(run, capsys):
    text = "--text=I want to kill myself tonight"
    assert main(["predict", f"--checkpoint={run}", text]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("[These words speak of danger (wish to die).")
    assert out.index("988") < out.index("Client's emotion:")
    assert "trained on synthetic clips" in err
    assert main(["predict", f"--checkpoint={run}", text, "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["danger"]["kind"] == "wish to die"
    assert "988" in row["danger"]["notice"]
    assert row["seen"]["characters_of_text"] == 29
    assert "synthetic" in row["notes"][0]
    assert main(["predict", f"--checkpoint={run}", "--text=This job is killing me."]) == 0
    assert "danger" not in capsys.readouterr().out


def test_a_part_of_a_split_never_replaces_the_whole(run, capsys):
    whole, page = run / "predictions.jsonl", run / "report.html"
    whole.write_text("mine\n")
    page.write_text("whole")
    assert main(["predict", f"--checkpoint={run}", "--limit=2", "--labels_only"]) == 0
    assert whole.read_text() == "mine\n"
    part = run / "predictions_first_2.jsonl"
    assert len(part.read_text().splitlines()) == 2
    assert main(["evaluate", f"--checkpoint={run}", f"--predictions={part}", "--partial"]) == 0
    assert "Partial: these predictions cover only a part" in capsys.readouterr().out
    assert page.read_text() == "whole"
    report = (run / "partial" / "report.md").read_text()
    assert "a part of the test split" in report.splitlines()[0]
    whole.unlink()
    commands = len((run / "commands.jsonl").read_text().splitlines())
    assert main(["evaluate", f"--checkpoint={run}"]) == 2  # a command that fails leaves no trace
    assert len((run / "commands.jsonl").read_text().splitlines()) == commands


def test_one_request_computes_one_row_and_has_a_limit(run, capsys, monkeypatch):
    from mm_jax.generation import predictor as predict_lib

    shapes, original = [], predict_lib.collate
    monkeypatch.setattr(
        predict_lib, "collate", lambda rows, *a: shapes.append(len(rows)) or original(rows, *a)
    )
    assert main(["predict", f"--checkpoint={run}", "--text=Hm."]) == 0
    assert set(shapes) == {8}  # the mesh's eight devices get a row each
    assert main(["predict", f"--checkpoint={run}", "--text=" + "ab " * 9000]) == 2
    assert "tokens, max_length is 8192" in capsys.readouterr().err


@pytest.mark.skipif(not REAL.is_dir(), reason="needs the real media")
@pytest.mark.parametrize("name", sorted(p.name for p in REAL.glob("*")))
def test_own_real_files(run, name, capsys):
    kind = "audio" if name.endswith(".flac") else "video"
    assert main(["predict", f"--checkpoint={run}", f"--{kind}={REAL / name}"]) == 0
    assert "Client's emotion:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--video=gone.mp4"], "--video gone.mp4: no such file"),
        ([f"--video={ROOT / 'README.md'}"], "README.md: not a video file that FFmpeg can decode"),
        (["--text=a", "--out=x"], "--out does not go with --text: it belongs to the prediction of"),
        (["--text=a", "--modality=av"], "--modality does not go with --text"),
        (["--problem=grief"], "expected at least one of --video, --audio and --text"),
        (["--limit=0"], "--limit: expected at least 1, got 0"),
        (["--text="], "expected at least one of --video, --audio and --text"),
        (
            ["--text=a", "--history=gone.txt"],
            "--history: gone.txt does not exist",
        ),
        (["--text=a", "--split=val"], "--split does not go with --text"),
        (["--stage=nothing"], "--stage: expected one of ['sft'], got 'nothing'"),
        (["--config.predict.tempature=1"], "did you mean predict.temperature?"),
        (["--config.seed=1"], "can override --config.predict.* only"),
        (["--config.predict.temperature=hot"], "expected float"),
    ],
)
def test_bad_arguments_give_one_clear_error(run, arguments, message, capsys):
    assert main(["predict", f"--checkpoint={run}", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_evaluate_names_bad_predictions(run, tmp_path, capsys):
    path = tmp_path / "p.jsonl"
    for text, message in (
        ("", "no predictions"),
        ("{oops", "line 1: not JSON"),
        ('{"id": "x"}', "line 1: missing fields"),
    ):
        path.write_text(text)
        assert main(["evaluate", f"--checkpoint={run}", f"--predictions={path}"]) == 2
        assert message in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as done:
        main(["--version"])
    assert done.value.code == 0
    assert capsys.readouterr().out == f"mm_jax {__version__}\n"


def test_a_missing_step_is_named(run, capsys):
    assert main(["predict", f"--checkpoint={run}", "--text=Hm.", "--step=999999"]) == 2
    assert "--step: no checkpoint of step 999999 in " in capsys.readouterr().err


def test_unknown_run_and_command(tmp_path, capsys):
    assert main(["predict", f"--checkpoint={tmp_path}"]) == 2
    assert "expected a run folder written by `train`" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["fly"])


def test_help_of_every_command():
    for name in COMMANDS:
        with pytest.raises(SystemExit) as done:
            build_parser(name).parse_args([name, "--help"])
        assert done.value.code == 0


def test_readme_commands_parse():
    """Checks that every `python -m mm_jax` line of the README and docs/results.md has known
    arguments and a valid config."""
    from mm_jax.config.load import load_config

    text = (ROOT / "README.md").read_text() + (ROOT / "docs" / "results.md").read_text()
    text = text.replace("\\\n", " ")
    lines = re.findall(r"^python -m mm_jax (.+)$", text, re.MULTILINE)
    assert len(lines) >= 5
    for line in lines:
        words = [w for w in shlex.split(line, comments=True) if not w.startswith("--config.")]
        args = build_parser(words[0]).parse_args(words)
        if getattr(args, "config", None):
            resolve(load_config(str(ROOT / args.config)))


def test_configs_are_valid():
    from configs.decoders import SIZES
    from mm_jax.config.load import load_config

    for path in sorted((ROOT / "configs").glob("*.py")):
        if "def get_config" in path.read_text():
            resolve(load_config(str(path)))
    for more in ("mesc_smollm2.py:grpo", "mesc_smollm2.py:compressor", "mesc_qwen3.py:1.7b"):
        resolve(load_config(str(ROOT / "configs" / more)))
    for decoder in SIZES:
        config = resolve(load_config(f"{ROOT}/configs/base.py:grpo,{decoder}"))
        assert config.stages[-1] == "grpo"
        assert config.model.llm.family == SIZES[decoder]["family"]


def test_module_runs_without_installation():
    done = subprocess.run(
        [sys.executable, "-m", "mm_jax", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "prepare" in done.stdout


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is not glibc's")
@pytest.mark.skipif(pathlib.Path("/dev/nvidiactl").exists(), reason="not on a GPU host")
def test_training_keeps_freed_memory():
    """Checks that a block that a thread frees and allocates again causes no page faults."""
    code = """
import ctypes, resource, threading
from mm_jax.run.host_memory import keep_freed_memory
keep_freed_memory()
libc, size, faults = ctypes.CDLL(None), ctypes.c_size_t(64 << 20), []
libc.malloc.restype = ctypes.c_void_p
def work():
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        block = ctypes.c_void_p(libc.malloc(size))
        libc.memset(block, 1, size)
        libc.free(block)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
thread = threading.Thread(target=work); thread.start(); thread.join()
print(faults[-1])
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 0, found.stderr
    assert int(found.stdout) < 100  # of 16,384 pages


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is not glibc's")
def test_memory_that_a_compilation_leaves_is_given_back():
    code = """
import ctypes, resource
import jax
from mm_jax.run.host_memory import COMPILED, give_back_compiler_memory
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
blocks = [ctypes.c_void_p(libc.malloc(ctypes.c_size_t(100_000))) for _ in range(1001)]
for block in blocks:
    libc.memset(block, 1, 100_000)
for block in blocks[:-1]:  # the last one keeps malloc from giving them back by itself
    libc.free(block)
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
give_back_compiler_memory()
before = resident()
jax.monitoring.record_event_duration_secs(COMPILED, 0.1)
short = before - resident()
jax.monitoring.record_event_duration_secs(COMPILED, 10.0)
seen = []
jax.monitoring.register_event_duration_secs_listener(lambda event, seconds, **_: seen.append(event))
print(short, before - resident())
jax.jit(lambda x: x + 1)(1.0)
assert COMPILED in seen, seen
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 0, found.stderr
    short, long = map(int, found.stdout.split())
    assert short < 10e6
    assert long > 90e6


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is not glibc's")
@pytest.mark.skipif(pathlib.Path("/dev/nvidiactl").exists(), reason="not on a GPU host")
def test_freed_memory_of_many_sizes_does_not_add_up():
    """Frees ever larger blocks with small ones between them, as the programs of several shapes do:
    what is kept is bounded, and what is in use is untouched."""
    code = """
import ctypes, time
from mm_jax.run import host_memory
host_memory.keep_freed_memory()
host_memory.KEPT_SHARE = 150e6 / host_memory.memory_limit()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
def block(size):
    found = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(size)))
    libc.memset(found, 1, ctypes.c_size_t(size))
    return found
before, pins = host_memory.own_memory(), []
for size in range(100, 300, 50):
    large = block(size * 1_000_000)
    pins.append(block(100_000))
    libc.free(large)
    pins.append(block(100_000))  # takes the place of the large one
print(host_memory.own_memory() - before)
host_memory.bound_kept_memory()
time.sleep(2.5)
print(host_memory.own_memory() - before)
assert all(ctypes.string_at(pin, 100_000) == b"\\1" * 100_000 for pin in pins)
kept = block(100_000_000)
libc.free(kept)
time.sleep(1.5)  # below the bound: stays, so that the next step takes no page faults
print(host_memory.own_memory() - before)
for _ in range(2):  # above the bound, again and again: what runs needs it
    needed = block(200_000_000)
    libc.free(needed)
    time.sleep(2.5)
print(host_memory.own_memory() - before)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 0, found.stderr
    kept, bounded, again, needed = map(int, found.stdout.split())
    assert kept > 300e6
    assert bounded < 50e6
    assert again > 90e6
    assert needed > 190e6
