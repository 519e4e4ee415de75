"""Tests `export --layout transformers`: the folder answers as predict does, and comes back."""

import functools
import json
import os
import pickle
import re
import subprocess
import sys

import accelerate
import numpy as np
import peft
import pytest
import torch
import transformers

from mm_jax.__main__ import main
from mm_jax.data import resampling
from mm_jax.generation import exported
from mm_jax.run.remote_code import code_files
from tests.support.hub import running_hub
from tests.support.media import write_video
from tools import convert_checkpoint

HISTORY = [
    {"speaker": "Client", "text": "I can't sleep.", "emotion": "sadness"},
    {"speaker": "Therapist", "text": "Since when?", "emotion": "neutral"},
]


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    """Exports the tiny run, and compares the folder's answers with ours."""
    out = tmp_path_factory.mktemp("exported") / "model"
    assert main(["export", "--from", str(run), "--layout", "transformers", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def loaded(folder):
    """Loads (processor, model) of the folder."""
    return load(folder)


def load(folder):
    processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    return processor, model.eval()


def test_the_check_compares_answers_without_this_package(run, tmp_path, monkeypatch, capsys):
    make, chosen = exported.example_turns, ("text, history", "all")
    turns = lambda *args: {k: v for k, v in make(*args).items() if k in chosen}  # noqa: E731
    monkeypatch.setattr(exported, "example_turns", turns)
    arguments = ["export", "--from", str(run), "--layout", "transformers", "--check"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "tokenizer: the same ids for 1000 texts" in lines
    assert tuple(x.partition(":")[0] for x in lines if "the same reply" in x) == chosen


def test_the_check_finds_differences():
    same = exported.Compared("text", True, 1e-5, 4.0, 1e-6, True)
    exported.report(iter([same]))
    wrong = [dict(same_ids=False), dict(logits=1e-3), dict(probabilities=1e-3)]
    for change in (*wrong, dict(same_reply=False)):
        other = exported.dataclasses.replace(same, **change)
        with pytest.raises(exported.WeightsError, match="text"):
            exported.report(iter([same, other]))


def test_clips_are_answered_as_predict_does(run, folder, tmp_path, capsys):
    """Checks it for a file with pictures and sound, by a process that lacks what we have."""
    clip = write_video(tmp_path / "clip.mp4", frames=20, sound=0.8)
    turn = {"text": "It began in May.", "video": str(clip), "history": HISTORY}
    (theirs,), _ = exported.answers_of(folder, [turn], tmp_path)
    (tmp_path / "history.json").write_text(json.dumps(HISTORY))
    own = ["--video", str(clip), "--text", turn["text"], "--json"]
    own += ["--history", str(tmp_path / "history.json")]
    assert main(["predict", "--checkpoint", str(run), *own]) == 0
    ours = json.loads(capsys.readouterr().out)
    assert ours["seen"]["frames"] == 4
    assert ours["seen"]["seconds_of_sound"] > 0
    same_answer(ours, theirs)


def test_the_cards_snippet_answers(folder, loaded, tmp_path, monkeypatch, capsys):
    clip = write_video(tmp_path / "clip.mp4", frames=12, sound=0.8)
    card = (folder / "README.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    snippet = snippet.replace(f'name = "{folder.name}"', f"name = {str(folder)!r}")
    exec(snippet.replace("clip.mp4", str(clip)), {})
    assert capsys.readouterr().out.startswith("Client's emotion: ")
    assert "Data `synthetic/" in card
    assert "was not evaluated" in card


def full_turn():
    rng = np.random.default_rng(0)
    video = rng.integers(0, 256, (5, 20, 30, 3), np.uint8)
    audio = rng.uniform(-1, 1, 9000).astype(np.float32)
    return {"text": "Hm.", "video": video, "audio": audio, "history": HISTORY}


def rows_of(processor, turns, **more):
    names = dict.fromkeys(name for turn in turns for name in turn)
    return processor(**{name: [turn.get(name) for turn in turns] for name in names}, **more)


def next_logits(model, inputs):
    """Returns what `generate` chooses its first token from."""
    out = model.generate(
        **inputs,
        max_new_tokens=1,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.logits[0].numpy()


def test_rows_of_several_turns_equal_single_ones(loaded):
    processor, model = loaded
    turns = [full_turn(), {"text": "A longer text than the other one has."}]
    together = next_logits(model, rows_of(processor, turns))
    alone = np.concatenate([next_logits(model, processor(**turn)) for turn in turns])
    np.testing.assert_allclose(together, alone, atol=1e-4)
    shown = next_logits(model, processor(**turns[0], modality="text"))
    assert np.abs(shown - alone[:1]).max() > 1e-2


def test_bad_turns_are_one_line(loaded):
    processor, model = loaded
    for message, turn in (
        ("problem: expected a list, as text", {"text": ["a", "b"], "problem": "ab"}),
        ("text: expected a list", {"text": "ab", "video": ["a.mp4", "b.mp4"]}),
        ("expected lists of one length", {"text": ["a", "b"], "history": [HISTORY]}),
        ("expected lists of one length above 0", {"text": []}),
        ("entry 0: speaker: expected", {"text": "a", "history": [{"speaker": "x", "text": "b"}]}),
        ("answer: strategy: expected one of", {"text": "a", "answer": {"strategy": "shout"}}),
        ("sampling_rate: expected whole Hz", {"text": "a", "sampling_rate": 0}),
        ("video no.mp4: no such file", {"video": "no.mp4"}),
    ):
        with pytest.raises(ValueError, match=message):
            processor(**turn)
    beams = transformers.GenerationConfig(num_beams=2)
    with pytest.raises(ValueError, match="num_beams: expected 1, got 2"):
        processor.answer(model, text="a", generation_config=beams)


def test_others_settings_of_the_tokenizer_change_no_prompt(folder):
    processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    want = processor(text="Hm.")["input_ids"]
    processor.tokenizer(["a b c d e f"], truncation=True, max_length=2, padding="max_length")
    again = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    again.tokenizer(["a b c d e f"], truncation=True, max_length=2, padding="max_length")
    for one in (processor, again):
        assert torch.equal(one(text="Hm.")["input_ids"], want)


def test_weights_that_are_kept_off_the_device_compute_the_same(folder, loaded):
    processor, model = loaded
    inputs = processor(**full_turn())
    with torch.no_grad():
        want = model(**inputs).logits
        away = accelerate.cpu_offload(load(folder)[1])
        torch.testing.assert_close(away(**inputs).logits, want)


def test_labels_are_the_answers_tokens(run, loaded):
    processor, model = loaded
    answer = {"client_emotion": "joy", "strategy": "others", "response": "I see."}
    turns = [{**full_turn(), "answer": answer}, {"text": "No.", "answer": {"response": "Go on."}}]
    inputs = rows_of(processor, turns)
    ids, labels = inputs["input_ids"], inputs["labels"]
    texts = [processor.tokenizer.decode(row[row >= 0]) for row in labels]
    first = "Client's emotion: joy\nTherapist's strategy: others\nTherapist's response: I see."
    assert texts == [f"{first}<|im_end|>", "Therapist's response: Go on.<|im_end|>"]
    assert torch.equal(ids[labels >= 0], labels[labels >= 0])
    with torch.no_grad():
        out = model(**inputs)
    logp = out.logits.log_softmax(-1)[:, :-1].gather(-1, labels[:, 1:].clamp(0)[..., None])[..., 0]
    want = -logp[labels[:, 1:] >= 0].mean()
    torch.testing.assert_close(out.loss, want)


def test_a_folder_fine_tuned_by_transformers_comes_back(folder, tmp_path, capsys):
    processor, model = load(folder)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rows = [
        {"text": "Hm.", "history": HISTORY, "answer": {"client_emotion": "joy", "response": "Go"}},
        {"text": "No.", "answer": {"strategy": "others", "response": "I see."}},
    ]
    settings = transformers.TrainingArguments(
        str(tmp_path / "trainer"),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        remove_unused_columns=False,
        save_strategy="no",
        use_cpu=True,
        report_to=[],
    )
    collate = functools.partial(rows_of, processor)
    transformers.Trainer(model.train(), settings, collate, train_dataset=rows).train()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert any("mamba_compressor" in k for k in changed)
    tuned, back = tmp_path / "tuned", tmp_path / "run"
    model.save_pretrained(tuned)
    without = ["--from", str(tuned), "--out", str(back), "--tokenizer", str(folder)]
    assert convert_checkpoint.main(without) == 2
    assert "no processor_config.json" in capsys.readouterr().err
    processor.save_pretrained(tuned)
    assert convert_checkpoint.main(["--from", str(tuned), "--out", str(back)]) == 0
    capsys.readouterr()
    assert main(["predict", "--checkpoint", str(back), "--text", "Hm.", "--json"]) == 0
    ours = json.loads(capsys.readouterr().out)
    again, reloaded = load(tuned)
    theirs = again.answer(reloaded, text="Hm.")
    same_answer(ours, theirs)


def test_adapters_and_bfloat16_work_on_a_folder(folder, tmp_path):
    processor, model = load(folder)
    turn = {**full_turn(), "answer": {"client_emotion": "joy", "response": "Go on."}}
    inputs = processor(**turn)
    with torch.no_grad():
        plain = model(**inputs)
    half = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.bfloat16
    ).eval()
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        loss = half(**inputs).loss
    assert abs(loss - plain.loss) < 0.02 * plain.loss
    said = {"predicted", "probabilities", "response", "text"}
    assert set(processor.answer(half, **full_turn())) == said

    targets = r"model\.layers\.\d+\.self_attn\.(q|v)_proj"
    lora = peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, lora)
    optimizer = torch.optim.Adam((p for p in adapted.parameters() if p.requires_grad), 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        adapted(**inputs).loss.backward()
        optimizer.step()
    adapted.save_pretrained(tmp_path)
    with torch.no_grad():
        want = adapted.eval()(**inputs)
        again = peft.PeftModel.from_pretrained(load(folder)[1], tmp_path).eval()
        torch.testing.assert_close(again(**inputs).logits, want.logits)
    assert want.loss < plain.loss - 0.01
    reply = again.generate(**processor(**full_turn()), max_new_tokens=2, do_sample=False)
    assert reply.shape[0] == 1


def same_answer(ours, theirs):
    assert theirs["predicted"] | {"response": theirs["response"]} == ours["predicted"]
    for task, shares in ours["probabilities"].items():
        for label, p in shares.items():
            assert abs(theirs["probabilities"][task][label] - p) < 1e-4


def test_a_folder_goes_to_the_hub(run, tmp_path):
    """Checks it with a stand-in; what it refuses leaves the folder."""

    def export(out, *more, **env):
        command = [sys.executable, "-m", "mm_jax", "export", "--from", str(run), "--layout=qwen2"]
        return subprocess.run(
            [*command, "--out", str(tmp_path / out), *more],
            env={**os.environ, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", **env},
            capture_output=True,
            text=True,
        )

    with running_hub() as hub:
        token = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_secret"}
        done = export("a", "--push=me/mine", **token)
        assert done.returncode == 0, done.stderr
        assert re.search(r"MB  model\.safetensors\n.*uploaded 6 files", done.stdout, re.DOTALL)
        assert hub.created["me/mine"]["visibility"] == "private"
        here = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
        assert hub.files["me/mine"] == here
        assert hub.tokens == {"hf_secret"}
        hub.files["me/mine"]["model-00001-of-00002.safetensors"] = b"of an older upload"
        assert export("again", "--push=me/mine", **token).returncode == 0
        assert hub.files["me/mine"].keys() == here.keys()
        refused = export("b", "--push=me/refused", **token)
        assert refused.returncode == 2
        assert "403 Forbidden" in refused.stderr
        assert "hf_secret" not in refused.stderr + refused.stdout + done.stderr + done.stdout
        assert {p.name for p in (tmp_path / "b").iterdir()} == set(here)
        dry = export("c", "--push=me/other", "--dry_run", **token)
        assert "dry run: 6 files" in dry.stdout
        assert set(hub.created) == {"me/mine"}
    without = export("d", "--push=me/mine", HF_TOKEN="", HF_HOME=str(tmp_path / "home"))
    assert without.returncode == 2
    assert "HF_TOKEN" in without.stderr
    assert not (tmp_path / "d").exists()


TWIN = """
import pickle, sys
sys.modules.update(dict.fromkeys(("PIL", "librosa", "soxr", "mm_jax")))
sys.path.insert(0, ".")
from twin.resampling_mm_jax import resample, resize
images, waves = pickle.load(open("given", "rb"))
found = [resize(*x) for x in images], [resample(*x) for x in waves]
pickle.dump(found, open("found", "wb"))
"""


def test_numpy_resizes_and_resamples_as_pillow_and_soxr_do(tmp_path):
    rng = np.random.default_rng(0)
    sizes = [(30, 40, 23, 17), (17, 23, 41, 60), (48, 48, 32, 32), (9, 50, 50, 3), (33, 33, 33, 33)]
    images = [(rng.integers(0, 256, (h, w, 3), np.uint8), x, y) for h, w, x, y in sizes]
    exact, near = (8000, 24000, 32000, 48000), (11025, 22050, 44100, 96000)
    waves = [(rng.uniform(-1, 1, r // 3 + 5).astype(np.float32), r) for r in (*exact, *near)]
    (tmp_path / "twin").mkdir()
    for name in ("resampling_mm_jax.py", "fbank_mm_jax.py"):
        (tmp_path / "twin" / name).write_text(code_files()[name])
    (tmp_path / "given").write_bytes(pickle.dumps((images, waves)))
    subprocess.run([sys.executable, "-c", TWIN], cwd=tmp_path, check=True)
    pictures, sounds = pickle.loads((tmp_path / "found").read_bytes())
    for given, got in zip(images, pictures, strict=True):
        np.testing.assert_array_equal(got, resampling.resize(*given))
    for (wave, rate), got in zip(waves, sounds, strict=True):
        want = resampling.resample(wave, rate)
        assert got.shape == want.shape
        ends = slice(None) if rate in exact else slice(200, -200)
        bound = 1e-6 if rate in exact else 1e-3  # of white noise; soxr's stages differ at the ends
        assert np.abs(got - want)[ends].max() < bound, rate
