"""Tests runs that start from released weights, and the folders that `export` writes."""

import dataclasses
import errno
import json
import os
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from flax import nnx
from safetensors.torch import load_file

from mm_jax.__main__ import main
from mm_jax.commands import export
from mm_jax.config.errors import ConfigError
from mm_jax.config.load import read_config, resolve
from mm_jax.data import tokenizer
from mm_jax.models.abstract import abstract_model
from mm_jax.models.lora import TARGETS
from mm_jax.run import build
from mm_jax.run.build import Run
from mm_jax.run.start import apply_sources, start_params, training_dtype
from mm_jax.training.checkpoint import load_stage
from mm_jax.weights import keymap
from mm_jax.weights.check import check_source
from mm_jax.weights.save import tensors_of
from mm_jax.weights.sources import merge_adapter, open_adapter, open_source
from mm_jax.weights.tensors import WeightsError, from_array
from tests.conftest import tiny_config
from tests.support import checkpoints
from tests.support.runs import train
from tools import convert_checkpoint


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Writes decoders, Mamba and BEATs as they are released."""
    base = tmp_path_factory.mktemp("released")
    for family in FAMILIES:
        checkpoints.decoder(base / family, family=family)
    checkpoints.mamba(base / "mamba")
    checkpoints.beats(base / "BEATs.pt")
    return base


FAMILIES = ("qwen2", "qwen3", "llama")


def released_config(synthetic, base, family="qwen2"):
    c = tiny_config(synthetic.folder)
    c.init_from.update(
        language_model=str(base / family),
        mamba_compressor=str(base / "mamba"),
        audio_tower=str(base / "BEATs.pt"),
    )
    c.model.parts = ("audio", "compressor")
    c.stages = ("sft",)
    trainable = ("language_model", "mm_projector_a", "mamba_compressor")
    c.stage.sft.update(steps=1, learning_rate=1e-9, trainable=trainable)
    return c


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def adapted(request, synthetic, base, tmp_path_factory):
    """Trains adapters (and nothing else) on a released decoder for two steps; returns the decoder's
    family and the run."""
    run = tmp_path_factory.mktemp("runs") / "lora"
    c = released_config(synthetic, base, request.param)
    c.stage.sft.update(steps=2, learning_rate=0.05, trainable=("language_model",))
    c.stage.sft.lora.update(rank=4, alpha=8.0)
    train(c, run)
    return request.param, run


@pytest.fixture(scope="module")
def lora_run(adapted):
    return adapted[1]


def logits(model, ids) -> np.ndarray:
    with torch.no_grad():
        return model(torch.as_tensor(ids)).logits.float().numpy()


def test_sizes_tokenizer_and_values_come_from_the_sources(synthetic, base, tmp_path):
    c = released_config(synthetic, base)
    run = tmp_path / "run"
    train(c, run)
    kept = read_config(run / "config.json")
    assert kept.model.llm.vocab_size == 352
    assert kept.model.llm.rope_theta == 5e5
    assert kept.model.audio.predictor_class == 11
    assert kept.model.compressor.time_step_rank == 2
    assert kept.model.compressor.hidden_size == 16
    session = Run.open(kept, run)
    assert len(session.tokenizer) < 352
    assert session.model_config.llm.vocab_padding == 352 - len(session.tokenizer)
    params = load_stage(session, "sft")[0]
    out = {k: t.array() for k, t in tensors_of(params, keymap.MULTIMOOD).items()}
    theirs = load_file(base / "qwen2" / "model.safetensors")
    for key, value in theirs.items():
        np.testing.assert_allclose(out[key], value.numpy(), atol=1e-6, err_msg=key)
    table = "model.mamba_compressor.mamba.embeddings.weight"
    old = load_file(base / "mamba" / "model.safetensors")["backbone.embeddings.weight"].numpy()
    assert out[table].shape[0] == len(session.tokenizer)
    np.testing.assert_allclose(out[table][:60], old, atol=1e-6)
    rows = out[table][60:]
    np.testing.assert_allclose(rows, np.broadcast_to(old.mean(0), rows.shape), atol=1e-6)


def test_a_run_goes_on_without_its_sources(synthetic, base, tmp_path):
    """Checks that it does once its first stage is done, and that a changed source is refused."""
    shutil.copytree(base, tmp_path / "sources")
    c = released_config(synthetic, tmp_path / "sources")
    train(c, tmp_path / "run")
    (tmp_path / "sources").rename(tmp_path / "moved")
    train(released_config(synthetic, tmp_path / "sources"), tmp_path / "run", resume=True)
    with pytest.raises(ConfigError, match="init_from"):
        train(released_config(synthetic, base), tmp_path / "run", resume=True)


def test_padded_rows_never_get_probability(synthetic, base):
    c = released_config(synthetic, base)
    lm = language_model(c)
    ids = np.zeros((1, 4), np.int32)
    out = np.asarray(lm.logits(lm(lm.embed(ids), np.ones((1, 4), bool))))
    real = 352 - lm.config.vocab_padding
    assert lm.config.vocab_padding > 0
    assert np.asarray(jax.nn.softmax(out))[..., real:].max() == 0
    assert (out[..., :real] > -1e3).all()


def language_model(c):
    """Returns the language model that a run of this config starts from."""
    c = apply_sources(resolve(c)).replace(model__parts=())
    config = build.model_config(c, tokenizer.load(c.data.tokenizer))
    create = build.create_model(c, config)
    abstract = abstract_model(create, build.mesh_of(c.mesh))
    with jax.set_mesh(abstract.mesh):
        params = start_params(c, create, abstract)
    return nnx.merge(abstract.graph, params).language_model


def test_frozen_parts_keep_the_compute_type_and_trained_ones_float32(synthetic, base):
    c = released_config(synthetic, base)
    c.precision = "bfloat16"
    dtype = training_dtype(resolve(c), resolve(c).stage["sft"])
    assert dtype(("language_model", "norm"), None) == np.float32
    assert dtype(("audio_tower", "norm"), None).name == "bfloat16"
    c.stage.sft.lora.rank = 4
    dtype = training_dtype(resolve(c), resolve(c).stage["sft"])
    assert dtype(("language_model", "norm"), None).name == "bfloat16"
    assert dtype(("mamba_compressor", "norm"), None) == np.float32


def test_the_whole_model_goes_in_and_out_byte_for_byte(tmp_path, capsys):
    weights = checkpoints.multimood(tmp_path / "released", side_files=True, dtype=torch.bfloat16)
    run, out = tmp_path / "run", tmp_path / "out"
    mesh = ["--config.mesh.fsdp=4", "--config.mesh.data=2"]
    arguments = ["--from", str(tmp_path / "released"), "--out", str(run), *mesh]
    assert convert_checkpoint.main(arguments) == 0
    assert main(["export", "--from", str(run), "--layout", "multimood", "--out", str(out)]) == 0
    assert checkpoints.stored(out) == checkpoints.as_numpy(weights)
    # What was written is a source itself, with nothing else needed.
    assert convert_checkpoint.main(["--from", str(out), "--check"]) == 0
    assert "language_model: largest difference" in capsys.readouterr().out
    card = (out / "README.md").read_text()
    assert "not trained by it" in card
    assert str(tmp_path) not in card
    for layout, lacking in (("videollama2", "mamba_compressor"), ("qwen2", "mm_projector")):
        folder = tmp_path / layout
        assert main(["export", "--from", str(run), "--layout", layout, "--out", str(folder)]) == 0
        part = checkpoints.stored(folder)
        assert part
        assert not any(lacking in key for key in part)
        assert part.items() <= checkpoints.stored(out).items()
    folder = tmp_path / "mamba"
    assert main(["export", "--from", str(run), "--layout", "mamba", "--out", str(folder)]) == 0
    model = transformers.MambaModel.from_pretrained(folder)
    table = weights["model.mamba_compressor.mamba.embeddings.weight"]
    assert torch.equal(model.embeddings.weight, table.to(model.dtype))
    assert convert_checkpoint.main(["--from", str(folder), "--check"]) == 0
    back = open_source(str(folder))
    assert {group[1] for group in back.groups} == {"mamba", "memory_projection"}
    compressor = {k: v for k, v in weights.items() if "mamba_compressor" in k}
    got = {k: t.array().tobytes() for k, t in back.tensors.items()}
    assert got == checkpoints.as_numpy(compressor)


def test_the_language_models_export_loads_in_transformers(adapted, tmp_path, capsys):
    (family, lora_run), out = adapted, tmp_path / "lm"
    other = "mistral" if family == "llama" else "llama"
    arguments = ["export", "--from", str(lora_run), "--layout", other, "--out", str(out)]
    assert main(arguments) == 2
    assert f"use --layout {family}" in capsys.readouterr().err
    arguments[4] = family
    assert main([*arguments, "--dtype=float32", "--check"]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto").eval()
    assert (theirs.dtype, theirs.config.model_type) == (torch.float32, family)
    tok = transformers.AutoTokenizer.from_pretrained(out)
    session = Run.open(read_config(lora_run / "config.json"), lora_run)
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "I feel sad"}]
    ids = tok.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    text = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nI feel sad<|im_end|>\n"
    assert ids == session.tokenizer.encode(f"{text}<|im_start|>assistant\n")
    assert tok.eos_token_id == session.tokenizer.end_id == theirs.config.eos_token_id
    params = load_stage(session, "sft")[0]
    lm = nnx.merge(session.abstract.graph, params).language_model
    x = np.array([ids])
    ours = np.asarray(jax.jit(lambda m, x: m.logits(m(m.embed(x), x >= 0)))(lm, x))
    real = len(session.tokenizer)
    np.testing.assert_allclose(ours[..., :real], logits(theirs, x)[..., :real], atol=1e-4)


@pytest.mark.parametrize("kind", ["float16", "q8_0"])
def test_gguf_files_hold_the_language_model(adapted, kind, tmp_path, capsys):
    """Checks that transformers computes the same from a file, and its weights against the run's."""
    (family, lora_run), out = adapted, tmp_path / "lm"
    arguments = ["export", "--from", str(lora_run), "--layout", "gguf", "--out", str(out)]
    # transformers takes every Qwen3 file's heads for 128 wide.
    check = ["--check"] if family == "llama" else []
    assert main([*arguments, f"--dtype={kind}", *check]) == 0
    assert ("tokenizer: the same ids for 1000 texts" in capsys.readouterr().out) == bool(check)
    (file,) = out.glob("*.gguf")
    assert {p.name for p in out.iterdir()} == {file.name, "README.md"}
    session = Run.open(read_config(lora_run / "config.json"), lora_run)
    params = load_stage(session, "sft")[0]
    want = tensors_of(params, keymap.MULTIMOOD)
    got = open_source(str(file)).tensors
    assert set(got) == {k for k in want if k.startswith(("model.layers", "model.norm", "lm_head"))
                        or k == "model.embed_tokens.weight"}  # fmt: skip
    bound = {"float16": 2**-10, "q8_0": 2**-7}[kind]
    for key, tensor in got.items():
        ours = want[key].array()
        scale = np.abs(ours).max()
        np.testing.assert_allclose(tensor.array(), ours, atol=bound * scale, err_msg=key)


LLAMA_CPP = """
import json, sys
import xllamacpp
p = xllamacpp.CommonParams()
p.model.path, p.n_ctx, p.n_parallel, p.cpuparams.n_threads, p.warmup = sys.argv[1], 512, 1, 2, False
p.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # float16
p.cache_type_k = p.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
server, (prompts, letter) = xllamacpp.Server(p), json.loads(sys.argv[2])
# Answers "a", whatever is likely: an end, or half a character, has no log-probabilities.
asked = {"max_tokens": 1, "temperature": 0, "logprobs": 20, "logit_bias": {letter: 1e3}}
print(json.dumps([server.handle_completions({"prompt": x, **asked}) for x in prompts]))
"""


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory):
    """Returns a function (GGUF file, prompts) -> completions, by llama.cpp itself."""
    folder = tmp_path_factory.mktemp("llama_cpp")
    install = (sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder))
    subprocess.run([*install, "xllamacpp==2026.10.11549"], check=True)

    def complete(file, prompts, letter):
        command = [sys.executable, "-c", LLAMA_CPP, str(file), json.dumps([prompts, letter])]
        env = {**os.environ, "PYTHONPATH": str(folder)}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.splitlines()[-1])

    return complete


@pytest.mark.slow
def test_llama_cpp_computes_the_same_from_gguf_files(adapted, llama_cpp, tmp_path):
    out = tmp_path / "lm"
    arguments = ["export", "--from", str(adapted[1]), "--layout", "gguf", "--out", str(out)]
    assert main([*arguments, "--dtype=float32"]) == 0
    (file,) = out.glob("*.gguf")
    session = Run.open(read_config(adapted[1] / "config.json"), adapted[1])
    tok = session.tokenizer
    text = "<|im_start|>user\nI'm 42, na\u00efve; it cost 1,234 \U0001f642\n\nok?<|im_end|>\n"
    ids, (letter,) = tok.encode(text), tok.encode("a")
    lengths = [1, 2, 5, 20, len(ids), len(ids)]
    answers = llama_cpp(file, [*(ids[:n] for n in lengths[:-1]), text], letter)
    lm = nnx.merge(session.abstract.graph, load_stage(session, "sft")[0]).language_model
    ours = np.asarray(jax.jit(lambda m, x: m.logits(m(m.embed(x), x >= 0))[0])(lm, np.array([ids])))
    for n, answer in zip(lengths, answers, strict=True):
        assert answer["usage"]["prompt_tokens"] == n
        (token,) = answer["choices"][0]["logprobs"]["content"]
        # The rows of the table that have no token are random here, and so likely to be among them.
        top = [t for t in token["top_logprobs"] if t["id"] < len(tok)]
        assert len(top) > 5
        best, row = top[0], ours[n - 1]
        assert best["id"] == row.argmax()
        for other in top:
            below = row[other["id"]] - row[best["id"]]
            assert abs(other["logprob"] - best["logprob"] - below) < 1e-4


def test_adapters_go_to_peft_and_back(synthetic, base, adapted, tmp_path):
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    family, lora_run = adapted
    released = str(base / family)
    common = ["export", "--from", str(lora_run)]
    out = ["--layout", "peft", "--out", str(adapter)]
    assert main([*common, *out, "--base", released]) == 0
    half = [*common, "--layout", "peft", "--dtype", "bfloat16", "--out", str(tmp_path / "half")]
    assert main(half) == 0
    kinds = load_file(tmp_path / "half" / "adapter_model.safetensors").values()
    assert {v.dtype for v in kinds} == {torch.bfloat16}
    assert main([*common, "--layout", family, "--out", str(merged)]) == 0
    ids = checkpoints.random_ids(2, 9, 352)
    plain = transformers.AutoModelForCausalLM.from_pretrained(released).eval()
    before = logits(plain, ids)
    want = logits(transformers.AutoModelForCausalLM.from_pretrained(merged).eval(), ids)
    assert np.abs(want - before).max() > 0.01  # training changed something
    theirs = peft.PeftModel.from_pretrained(plain, adapter).eval()
    np.testing.assert_allclose(logits(theirs, ids), want, atol=1e-4)
    assert {k.split(".")[-3] for k in open_adapter(str(adapter)).tensors} == set(TARGETS)

    # Merged into the base as it is read.
    c = released_config(synthetic, base, family)
    c.init_from.adapter = str(adapter)
    lm = language_model(c)
    got = np.asarray(lm.logits(lm(lm.embed(ids), np.ones(ids.shape, bool))))
    real = 352 - lm.config.vocab_padding
    np.testing.assert_allclose(got[..., :real], want[..., :real], atol=1e-4)

    # Kept apart: training continues with them.
    c = released_config(synthetic, base, family)
    c.stage.sft.update(trainable=("language_model",))
    c.stage.sft.lora.update(rank=4, alpha=8.0, init_from=str(adapter))
    train(c, tmp_path / "more")
    again = tmp_path / "again"
    arguments = ["--layout", "peft", "--out", str(again)]
    assert main(["export", "--from", str(tmp_path / "more"), *arguments]) == 0
    first, second = (load_file(f / "adapter_model.safetensors") for f in (adapter, again))
    assert set(first) == set(second)
    for key, value in first.items():
        np.testing.assert_allclose(value, second[key], atol=1e-6, err_msg=key)
    c.stage.sft.lora.alpha = 16.0
    with pytest.raises(ConfigError, match=r"stage\.sft\.lora.*\(4, 8\.0.*got \(4, 16\.0"):
        apply_sources(resolve(c))


def test_an_adapter_made_by_peft(base, tmp_path):
    plain = transformers.AutoModelForCausalLM.from_pretrained(base / "qwen2")
    config = peft.LoraConfig(
        r=4, lora_alpha=6, use_rslora=True, target_modules=["q_proj", "up_proj"]
    )
    model = peft.get_peft_model(plain, config)
    checkpoints.randomise(model, 5)
    model.save_pretrained(tmp_path / "a")
    adapter = open_adapter(str(tmp_path / "a"))
    assert adapter.scale == 3.0
    ids = checkpoints.random_ids(1, 7, 352)
    source = open_source(str(base / "qwen2"))
    base_weights = {k: v for k, v in model.get_base_model().state_dict().items() if "lora" not in k}
    for key, value in base_weights.items():  # `randomise` changed them too
        source.tensors[key.replace(".base_layer", "")] = from_array(value.detach().numpy())
    tensors = merge_adapter(source.tensors, adapter)
    source.tensors.update(tensors)
    (check,) = check_source(source, (ids, logits(model.eval(), ids)))
    assert check.error < 1e-4 * max(1, check.scale)
    key = next(k for k in adapter.tensors if "lora_A" in k)
    lost = {k: t for k, t in adapter.tensors.items() if k != key}
    with pytest.raises(WeightsError, match=re.escape(f"needs {key}")):
        merge_adapter(source.tensors, dataclasses.replace(adapter, tensors=lost))
    wide = {**adapter.tensors, key: from_array(np.zeros((4, 33), np.float32))}
    with pytest.raises(WeightsError, match=r"expected shapes \(\(4, 32\).*\(4, 33\)"):
        merge_adapter(source.tensors, dataclasses.replace(adapter, tensors=wide))
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    for change in (
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
        {"alora_invocation_tokens": [5]},
        {"rank_pattern": {"q_proj": 8}},
    ):
        text = json.dumps({**config, **change})
        (tmp_path / "a" / "adapter_config.json").write_text(text)
        with pytest.raises(WeightsError, match=next(iter(change))):
            open_adapter(str(tmp_path / "a"))
    del config["r"]
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=r"lacks \['r'\]"):
        open_adapter(str(tmp_path / "a"))


@pytest.mark.parametrize("layout", ["llama", "transformers", "gguf"])
@pytest.mark.parametrize("adapted", ["llama"], indirect=True)
def test_a_crash_leaves_no_folder_that_looks_whole(lora_run, layout, tmp_path, monkeypatch):
    out = tmp_path / "out"
    arguments = ["export", "--from", str(lora_run), "--layout", layout, "--out", str(out)]
    writes = "write_gguf" if layout == "gguf" else "write_weights"
    whole = getattr(export, writes)

    def then(error):
        def write(*arguments):
            whole(*arguments)
            raise error

        monkeypatch.setattr(export, writes, write)

    then(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        main(arguments)
    assert not list(tmp_path.iterdir())
    then(OSError(errno.ENOSPC, "No space left on device"))
    assert main(arguments) == 2
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(export, writes, whole)
    assert main(arguments) == 0
    assert list(tmp_path.iterdir()) == [out]
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    assert main(arguments) == 2  # an existing folder is never written to
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


@pytest.mark.parametrize("adapted", ["llama"], indirect=True)
def test_bad_input_is_one_line(base, lora_run, tmp_path, capsys):
    def error(*arguments) -> str:
        assert main(["export", "--out", str(tmp_path / "o"), *arguments]) == 2
        return capsys.readouterr().err

    assert "no config at" in error("--from", str(tmp_path / "no"), "--layout", "llama")
    run = ["--from", str(lora_run)]
    assert "--stage: expected one of" in error(*run, "--layout", "llama", "--stage", "nope")
    assert "no checkpoint" in error(*run, "--layout", "llama", "--step", "77")
    assert "not the config of a run" in error("--from", str(base / "qwen2"), "--layout", "llama")
    assert "npz" in error(*run, "--layout", "llama", "--check", str(tmp_path / "no.npz"))
    assert "--base belongs to --layout peft" in error(*run, "--layout", "llama", "--base", "x")
    assert not list(tmp_path.iterdir())
    config = json.loads((lora_run / "config.json").read_text())
    config["model"]["parts"] = []
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text(json.dumps(config))
    shutil.copy(lora_run / "stages.json", tmp_path / "bare")
    bare = error("--from", str(tmp_path / "bare"), "--layout", "multimood")
    assert "none of ['audio', 'compressor', 'vision']" in bare
