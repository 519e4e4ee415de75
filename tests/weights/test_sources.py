"""Tests that released layouts are read whole, as transformers reads them, or else refused."""

import dataclasses
import functools
import json
import re
import shutil
import struct

import gguf
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors.torch import load_file, save_file

from mm_jax.config.model import RopeScaling
from mm_jax.models.abstract import abstract_model
from mm_jax.models.beats import Beats, BeatsConfig
from mm_jax.models.compressor import Compressor
from mm_jax.models.decoder import Decoder
from mm_jax.models.decoder_config import FAMILIES, DecoderConfig, inverse_frequencies
from mm_jax.models.mamba import Mamba, MambaConfig
from mm_jax.models.multimood import MultiMood, MultiMoodConfig
from mm_jax.models.sharding import make_mesh
from mm_jax.models.siglip import Siglip, SiglipConfig
from mm_jax.models.stc import StcConfig, StcConnector
from mm_jax.weights import gguf as gguf_source
from mm_jax.weights import keymap, load
from mm_jax.weights.check import check_source, read_vectors, report, run_language_model
from mm_jax.weights.load import DeviceShard, load_state, param_shapes
from mm_jax.weights.save import tensors_of, write_safetensors
from mm_jax.weights.sources import open_source
from mm_jax.weights.tensors import WeightsError, from_array, grown, read_safetensors, read_torch
from tests.conftest import GOLDEN
from tests.support import checkpoints


def check(folder, bound=1e-4):
    """Returns the checks of a source by part, after asserting that each is below the bound."""
    checks = {c.part: c for c in check_source(open_source(str(folder)))}
    for c in checks.values():
        assert c.passed, c
        assert c.error < bound * max(1, c.scale), c
    return checks


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "mistral"])
@pytest.mark.parametrize("tied", [False, True])
def test_decoders_equal_transformers(tmp_path, tied, family):
    checkpoints.decoder(tmp_path / "m", family=family, tied=tied, max_shard_size="20KB")
    assert open_source(str(tmp_path / "m")).configs["llm"].family == family
    assert len(list((tmp_path / "m").glob("model-*.safetensors"))) > 2
    found = check(tmp_path / "m")["language_model"]
    assert len(found.positions) == 16
    assert all(kl < 1e-7 for _, kl in found.positions)


def test_the_original_positions_of_yarn_may_stand_next_to_it():
    rope = {"type": "yarn", "factor": 4.0}
    values = dict(model_type="qwen2", max_position_embeddings=128, rope_scaling=rope)
    for given, expected in (({}, 128), ({"original_max_position_embeddings": 32}, 32)):
        found = DecoderConfig.from_hf_config({**values, **given}).rope_scaling
        assert found.original_max_position_embeddings == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_config_leaves_out_is_as_in_transformers(family):
    theirs = transformers.AutoConfig.for_model(family, sliding_window=None).to_dict()
    left_out = {"model_type": family, "sliding_window": None}
    assert DecoderConfig.from_hf_config(left_out) == DecoderConfig.from_hf_config(theirs)


def write_gguf(path, folder, kind="F32", rope_factors=None, **changes) -> None:
    """Writes a decoder's folder as llama.cpp's converter does; `kind` is the kernels' type."""
    config = json.loads((folder / "config.json").read_text())
    family = {"mistral": "llama"}.get(config["model_type"], config["model_type"])
    writer = gguf.GGUFWriter(path, family)
    heads, keys = config["num_attention_heads"], config["num_key_value_heads"]
    values = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": keys,
        "attention.key_length": config.get("head_dim") or config["hidden_size"] // heads,
    } | changes
    for name, value in values.items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        add(name if "." in name and name.startswith("split") else f"{family}.{name}", value)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    names = {v: k for k, v in {**gguf_source.NAMES, **gguf_source.LAYER_NAMES}.items()}
    for key, tensor in load_file(folder / "model.safetensors").items():
        array = tensor.float().numpy()
        stem, leaf = key.rsplit(".", 1)
        name = names.get(stem)
        if name is None:
            _, _, layer, part = stem.split(".", 3)
            name = f"blk.{layer}.{names[part]}"
            if family == "llama" and part in ("self_attn.q_proj", "self_attn.k_proj"):
                count = heads if "q_proj" in part else keys
                pairs = array.reshape(count, 2, -1, array.shape[1])  # as llama.cpp permutes them
                array = pairs.swapaxes(1, 2).reshape(array.shape)
        chosen = gguf.GGMLQuantizationType[
            kind if array.shape[-1] % 32 == 0 and array.ndim > 1 else "F32"
        ]
        stored = gguf.quants.quantize(np.ascontiguousarray(array), chosen)
        writer.add_tensor(f"{name}.{leaf}", stored, raw_dtype=chosen)
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("family", "kind"),
    [*((f, "F32") for f in FAMILIES), ("llama", "BF16"), ("qwen3", "Q8_0"), ("llama", "Q8_0")],
)
def test_gguf_files(tmp_path, family, kind):
    """Compares with the folder that they were written from, within the quantisation's precision."""
    checkpoints.decoder(tmp_path / "m", family=family, tied=family == "llama")
    write_gguf(tmp_path / "m.gguf", tmp_path / "m", kind)
    folder, file = (open_source(str(tmp_path / name)) for name in ("m", "m.gguf"))
    want, got = folder.configs["llm"], file.configs["llm"]
    same_family = dataclasses.replace(got, family=want.family, head_dim=want.head_dim)
    assert same_family == want
    assert set(file.tensors) == set(folder.tensors)
    bound = {"F32": 0, "BF16": 2**-8, "Q8_0": 2**-7}[kind]
    for key, tensor in folder.tensors.items():
        whole, theirs = file.tensors[key].array(), tensor.array()
        scale = np.abs(theirs).max()
        np.testing.assert_allclose(
            whole.astype(np.float32), theirs, atol=bound * scale, err_msg=key
        )
        part = file.tensors[key].rows(3, 11)
        np.testing.assert_array_equal(part, whole[3:11])
    if kind == "F32":
        ids = np.arange(12)[None] * 7
        ours, theirs = (run_language_model(source, ids) for source in (file, folder))
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_gguf_files_with_the_positions_of_llama_3(tmp_path):
    config = DecoderConfig(
        head_dim=8,
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_theta=5e5,
        rope_scaling=RopeScaling(rope_type="llama3", factor=8.0),
    )
    plain = dataclasses.replace(config, rope_scaling=RopeScaling())
    factors = inverse_frequencies(plain)[0] / inverse_frequencies(config)[0]
    checkpoints.decoder(tmp_path / "m", family="llama")
    write_gguf(tmp_path / "m.gguf", tmp_path / "m", rope_factors=factors)
    scaling = open_source(str(tmp_path / "m.gguf")).configs["llm"].rope_scaling
    assert scaling == config.rope_scaling
    write_gguf(tmp_path / "x.gguf", tmp_path / "m", rope_factors=factors * 1.5)
    with pytest.raises(WeightsError, match=r"rope_freqs\.weight: expected those of Llama 3\.1"):
        open_source(str(tmp_path / "x.gguf"))


def test_bad_gguf_files_are_named(tmp_path):
    checkpoints.decoder(tmp_path / "m", family="llama")
    good = tmp_path / "good.gguf"
    write_gguf(good, tmp_path / "m")
    (tmp_path / "cut.gguf").write_bytes(good.read_bytes()[:5000])
    (tmp_path / "no.gguf").write_bytes(b"GGML" + bytes(100))
    scaled = {"rope.scaling.type": "longrope", "rope.scaling.factor": 2}
    odd = {"rope.scaling.type": "yarn", "rope.scaling.yarn_ext_factor": 2}
    write_gguf(tmp_path / "odd.gguf", tmp_path / "m", **odd)
    write_gguf(tmp_path / "rope.gguf", tmp_path / "m", **scaled)
    write_gguf(tmp_path / "part.gguf", tmp_path / "m", **{"split.count": 3})
    write_gguf(tmp_path / "half.gguf", tmp_path / "m", **{"rope.dimension_count": 4})
    checkpoints.mamba(tmp_path / "s")
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "gemma3")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    for write in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{write}_to_file")()
    writer.close()
    for name, message in (
        ("cut", "cut.gguf is no GGUF file"),
        ("no", "no.gguf is no GGUF file"),
        ("other", "general.architecture: expected one of .*llama.* got 'gemma3'"),
        ("rope", "rope_type: expected one of .* got 'longrope'"),
        ("part", "one of 3 parts; join them"),
        ("odd", "unexpected llama.rope.scaling.yarn_ext_factor"),
        ("half", "rope.dimension_count: expected the head's 8, got 4"),
    ):
        with pytest.raises(WeightsError, match=message):
            open_source(str(tmp_path / f"{name}.gguf"))


def test_qwen2_in_bfloat16_and_in_torch_files(tmp_path):
    model = checkpoints.decoder(tmp_path / "m", dtype=torch.bfloat16)
    check(tmp_path / "m")
    tensors = open_source(str(tmp_path / "m")).tensors
    assert {t.dtype for t in tensors.values()} == {np.dtype(ml_dtypes.bfloat16)}
    torch.save(model.state_dict(), tmp_path / "m" / "pytorch_model.bin")
    (tmp_path / "m" / "model.safetensors").unlink()
    check(tmp_path / "m")


def test_towers_and_mamba_equal_transformers(tmp_path):
    checkpoints.siglip(tmp_path / "s")
    checkpoints.mamba(tmp_path / "m")
    assert set(check(tmp_path / "s")) == {"vision_tower"}
    assert set(check(tmp_path / "m")) == {"mamba_compressor"}
    want = checkpoints.beats(tmp_path / "BEATs.pt")
    source = open_source(str(tmp_path / "BEATs.pt"))
    assert source.configs["audio"].predictor_class == 11
    got = {k.removeprefix("model.audio_tower."): t.array() for k, t in source.tensors.items()}
    assert set(got) == set(want)
    for key, value in want.items():
        np.testing.assert_array_equal(got[key], value.numpy())


def test_check_finds_a_changed_weight(tmp_path):
    checkpoints.decoder(tmp_path / "m")
    source = open_source(str(tmp_path / "m"))
    ids = checkpoints.random_ids(1, 8, 352)
    model = checkpoints.decoder(tmp_path / "same")
    with torch.no_grad():
        logits = model(torch.as_tensor(ids)).logits.numpy()
    np.savez(tmp_path / "v.npz", input_ids=ids, logits=logits)
    vectors = read_vectors(tmp_path / "v.npz")
    (good,) = check_source(source, vectors)
    assert good.passed
    key = "model.layers.1.mlp.up_proj.weight"
    source.tensors[key] = from_array(source.tensors[key].array() * 1.5)
    (bad,) = check_source(source, vectors)
    assert not bad.passed
    with pytest.raises(WeightsError, match="differ by more"):
        report(iter([good, bad]))
    np.savez(tmp_path / "w.npz", input_ids=ids + 400, logits=logits)
    for name, text in (("w.npz", "below V"), ("no.npz", "no.npz")):
        with pytest.raises(WeightsError, match=text):
            read_vectors(tmp_path / name)
    (tmp_path / "text").write_text("x")
    with pytest.raises(WeightsError, match="expected an npz file"):
        read_vectors(tmp_path / "text")
    checkpoints.beats(tmp_path / "b.pt")
    with pytest.raises(WeightsError, match="no model of"):
        list(check_source(open_source(str(tmp_path / "b.pt"))))


def multimood_config(source) -> MultiMoodConfig:
    c = source.configs
    return MultiMoodConfig(
        llm=c["llm"],
        vision=c["vision"],
        audio=c["audio"],
        compressor=c.get("compressor"),
        **source.fields,
    )


def read_back(model_config, source, mesh, table=keymap.MULTIMOOD, cls=MultiMood):
    """Loads onto a mesh, and returns key -> bytes of what is there, and the tensors themselves."""
    create = lambda rngs: cls(model_config, rngs=rngs)  # noqa: E731
    devices = make_mesh(dict(zip(("data", "fsdp", "tensor"), mesh, strict=True)))
    abstract = abstract_model(create, devices)
    state = load_state(
        abstract.params,
        table,
        source.tensors,
        shardings=abstract.shardings,
        dtype=lambda path, dtype: dtype,
    )
    where = dict(nnx.to_flat_state(abstract.shardings))
    for path, variable in nnx.to_flat_state(state):
        assert variable.get_value().sharding == where[path].get_value(), path
    tensors = tensors_of(state, table)
    return {k: t.array().tobytes() for k, t in tensors.items()}, tensors


@pytest.mark.parametrize("mesh", [(1, 1, 8), (2, 2, 2), (1, 8, 1)])
def test_import_and_export_keep_every_byte(tmp_path, monkeypatch, mesh):
    weights = checkpoints.multimood(tmp_path / "m", dtype=torch.bfloat16)
    source = open_source(str(tmp_path / "m"))
    out, tensors = read_back(multimood_config(source), source, mesh)
    assert out == checkpoints.as_numpy(weights)
    monkeypatch.setattr(load, "TILE", 3)
    width = len(out["lm_head.weight"]) // 352
    rows = tensors["lm_head.weight"].rows(7, 19).tobytes()
    assert rows == out["lm_head.weight"][7 * width : 19 * width]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_blocks_written_on_the_device_give_the_same(tmp_path, monkeypatch, dtype):
    """Fills shards as large ones are filled on a GPU."""
    model = checkpoints.decoder(tmp_path / "m", dtype=dtype)
    source = open_source(str(tmp_path / "m"))
    monkeypatch.setattr(load, "make_shard", DeviceShard)
    monkeypatch.setattr("mm_jax.weights.tensors.BLOCK", 1500)
    monkeypatch.setattr(load, "TILE", 7)
    out, _ = read_back(source.configs["llm"], source, (2, 2, 2), keymap.DECODER, Decoder)
    assert out == checkpoints.as_numpy(model.state_dict())


@pytest.mark.parametrize("compressor", [True, False])
@pytest.mark.parametrize("projector", ["linear", "mlp2x_gelu"])
def test_videollama2_with_side_files(tmp_path, compressor, projector):
    args = dict(compressor=compressor, projector=projector)
    whole = checkpoints.multimood(tmp_path / "one", **args)
    checkpoints.multimood(tmp_path / "many", side_files=True, **args)
    for name in ("one", "many"):
        source = open_source(str(tmp_path / name))
        assert ("compressor" in source.configs) == compressor
        config = multimood_config(source)
        assert config.audio_projector_type == projector
        state = nnx.split(nnx.eval_shape(lambda c=config: MultiMood(c, rngs=nnx.Rngs(0))))[1]
        state = load_state(state, keymap.MULTIMOOD, source.tensors)
        got = {k: t.array() for k, t in tensors_of(state, keymap.MULTIMOOD).items()}
        assert set(got) == set(whole)
        for key, value in whole.items():
            np.testing.assert_array_equal(got[key], value.numpy(), err_msg=key)


def test_a_shared_table_may_be_stored_once(tmp_path):
    """`save_pretrained` stores only one copy of what BEATs' layers share."""
    folder = tmp_path / "m"
    checkpoints.multimood(folder)
    weights = load_file(folder / "model.safetensors")
    key = "model.audio_tower.encoder.layers.{}.self_attn.relative_attention_bias.weight"
    different = {**weights, key.format(0): weights[key.format(0)] + 1}
    save_file(different, folder / "model.safetensors", {"format": "pt"})
    source = open_source(str(folder))
    config = multimood_config(source)
    state = nnx.split(nnx.eval_shape(lambda: MultiMood(config, rngs=nnx.Rngs(0))))[1]
    with pytest.raises(WeightsError, match="the same values for every layer"):
        load_state(state, keymap.MULTIMOOD, source.tensors)
    del weights[key.format(0)]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    state = load_state(state, keymap.MULTIMOOD, open_source(str(folder)).tensors)
    out = tensors_of(state, keymap.MULTIMOOD)
    np.testing.assert_array_equal(out[key.format(0)].array(), weights[key.format(1)].numpy())


class Scalars(nnx.Module):
    """Holds a scalar, and one per layer of a stack."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.top = nnx.Param(jnp.zeros((), jnp.bfloat16))
        self.layers = nnx.Dict(gain=nnx.Param(jnp.zeros(3)))


def test_scalars_go_in_and_out(tmp_path):
    table = {"top": "top", "layers": "layers.{layer}"}
    values = {"top": 0.5, **{f"layers.{i}.gain": float(i + 1) for i in range(3)}}
    weights = {k: torch.tensor(v, dtype=torch.bfloat16) for k, v in values.items()}
    save_file(weights, tmp_path / "x.safetensors")
    state = nnx.split(nnx.eval_shape(lambda: Scalars(rngs=nnx.Rngs(0))))[1]
    state = load_state(state, table, read_safetensors(tmp_path / "x.safetensors"))
    assert state["layers"]["gain"].get_value().tolist() == [1, 2, 3]
    (tmp_path / "out").mkdir()
    write_safetensors(tmp_path / "out", tensors_of(state, table, ml_dtypes.bfloat16))
    back = load_file(tmp_path / "out" / "model.safetensors")
    assert {k: (v.dtype, v.item()) for k, v in back.items()} == {
        k: (torch.bfloat16, value) for k, value in values.items()
    }


def test_keymap_is_a_bijection():
    """Every parameter of the 7B model has its own keys, and every key leads back to it."""
    state = nnx.split(nnx.eval_shape(lambda: MultiMood(MultiMoodConfig(), rngs=nnx.Rngs(0))))[1]
    entries = keymap.entries(param_shapes(state), keymap.MULTIMOOD)
    back = {}
    for e in entries:
        for i, key in enumerate(e.keys):
            assert key not in back, key
            back[key] = (e.path, i if e.stacked else None)
    assert {path for path, _ in back.values()} == set(param_shapes(state))
    x = np.arange(24).reshape(2, 3, 4)
    kernel = next(e for e in entries if e.kernel)
    assert kernel.from_torch(x).shape == (4, 3, 2)
    assert kernel.torch_shape((5, 4, 3, 2) if kernel.stacked else (4, 3, 2)) == (2, 3, 4)


def test_new_rows_are_the_mean_of_the_old():
    table = np.random.default_rng(0).normal(1.0, 2.0, (500, 6)).astype(np.float32)
    plain = grown(from_array(table), 503)
    assert plain.shape == (503, 6)
    np.testing.assert_array_equal(plain.rows(0, 500), table)
    np.testing.assert_allclose(plain.rows(499, 503)[1:], [table.mean(0)] * 3, rtol=1e-5)
    noisy = grown(from_array(table), 2500, noise=0.5, seed=3).array()[500:]
    np.testing.assert_array_equal(noisy, grown(from_array(table), 2500, 0.5, 3).array()[500:])
    assert not np.array_equal(noisy, grown(from_array(table), 2500, 0.5, 4).array()[500:])
    np.testing.assert_allclose(noisy.std(0), 0.5 * table.std(0), rtol=0.1)
    np.testing.assert_allclose(noisy.mean(0), table.mean(0), atol=0.1)


def test_errors_list_everything_once_with_the_nearest_names(tmp_path):
    folder = tmp_path / "m"
    checkpoints.decoder(folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_project.weight"] = weights.pop(
        "model.layers.0.mlp.up_proj.weight"
    )
    weights["model.norm.weight"] = torch.ones(5)
    weights["lm_head.weight"] = torch.ones(weights["lm_head.weight"].shape, dtype=torch.int8)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError) as caught:
        list(check_source(open_source(str(folder))))
    message = str(caught.value)
    up = "model.layers.0.mlp.up_proj.weight (nearest: model.layers.0.mlp.up_project.weight)"
    assert f"1 missing: {up}" in message
    assert "1 unexpected: model.layers.0.mlp.up_project.weight" in message
    assert "model.norm.weight: expected (32,), got (5,)" in message
    assert "lm_head.weight: expected one of float32, bfloat16, float16, got int8" in message


def damage(path, how):
    raw = path.read_bytes()
    (n,) = struct.unpack("<Q", raw[:8])
    if how == "truncated":
        raw = raw[:-100]
    elif how == "empty":
        raw = b""
    elif how == "header":
        raw = raw[:8] + b"!" * n + raw[8 + n :]
    elif how == "length":
        raw = struct.pack("<Q", 1 << 40) + raw[8:]
    elif how == "offsets":
        header = json.loads(raw[8 : 8 + n])
        key = next(k for k in header if k != "__metadata__")
        header[key]["shape"] = [1, *header[key]["shape"], 2]
        text = json.dumps(header).encode()
        raw = struct.pack("<Q", len(text)) + text + raw[8 + n :]
    path.write_bytes(raw)


@pytest.mark.parametrize("how", ["truncated", "empty", "header", "length", "offsets"])
def test_damaged_files_are_refused(tmp_path, how):
    checkpoints.decoder(tmp_path / "m")
    damage(tmp_path / "m" / "model.safetensors", how)
    with pytest.raises(WeightsError, match=re.escape(str(tmp_path / "m" / "model.safetensors"))):
        open_source(str(tmp_path / "m"))


def test_damaged_torch_files_and_indexes_are_refused(tmp_path):
    checkpoints.beats(tmp_path / "b.pt")
    raw = (tmp_path / "b.pt").read_bytes()
    (tmp_path / "b.pt").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(WeightsError, match=r"b\.pt is damaged"):
        open_source(str(tmp_path / "b.pt"))
    checkpoints.decoder(tmp_path / "m", max_shard_size="20KB")
    lost = sorted((tmp_path / "m").glob("model-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(WeightsError, match=lost.name):
        open_source(str(tmp_path / "m"))


class Harmful:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_pointers_and_quantised_releases_are_named(tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    for name, read in (("a.safetensors", read_safetensors), ("a.bin", read_torch)):
        (tmp_path / name).write_bytes(pointer)
        with pytest.raises(WeightsError, match="is a Git LFS pointer, not the weights"):
            read(tmp_path / name)
    quantised = {"layer.weight": torch.zeros(2, 2).to(torch.float8_e4m3fn)}
    save_file(quantised, tmp_path / "b.safetensors")
    torch.save(quantised, tmp_path / "b.bin")
    for name, read in (("b.safetensors", read_safetensors), ("b.bin", read_torch)):
        with pytest.raises(WeightsError, match=r"(?i)type F(8_E4M3|loat8_e4m3fn); .*FP8"):
            read(tmp_path / name)


def test_a_torch_file_cannot_run_code(tmp_path, capsys):
    torch.save({"cfg": {}, "model": {"x": Harmful()}}, tmp_path / "b.pt")
    with pytest.raises(WeightsError, match="weights_only"):
        open_source(str(tmp_path / "b.pt"))
    assert "must not run" not in capsys.readouterr().out


def test_unknown_sources_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_source(str(tmp_path / "nowhere" / "a" / "b"))
    with pytest.raises(WeightsError, match="download from the Hugging Face hub failed"):
        open_source("nobody-at-all/no-such-model")
    (tmp_path / "x").mkdir()
    with pytest.raises(WeightsError, match=r"no config\.json"):
        open_source(str(tmp_path / "x"))
    (tmp_path / "x" / "config.json").write_text('{"model_type": "phi3"}')
    with pytest.raises(WeightsError, match=r"model_type: expected one of .*qwen2.* got 'phi3'"):
        open_source(str(tmp_path / "x"))
    checkpoints.decoder(tmp_path / "q")
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "longrope", "rope_theta": 1e6, "factor": 4.0}
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=r"rope_type: expected one of .*yarn.* got 'longrope'"):
        open_source(str(tmp_path / "q"))
    checkpoints.multimood(tmp_path / "m")
    (tmp_path / "m" / "audio_config.json").unlink()
    with pytest.raises(WeightsError, match=r"audio_config\.json"):
        open_source(str(tmp_path / "m"))
    shutil.rmtree(tmp_path / "m" / "siglip")
    (tmp_path / "m" / "audio_config.json").write_text("{}")
    with pytest.raises(WeightsError, match=r"vision_config.*siglip, was not found"):
        open_source(str(tmp_path / "m"))


def test_a_file_cut_while_it_is_read(tmp_path):
    save_file({"x": torch.ones(1000)}, tmp_path / "x.safetensors")
    tensor = read_safetensors(tmp_path / "x.safetensors")["x"]
    with open(tmp_path / "x.safetensors", "r+b") as file:
        file.truncate(500)
    with pytest.raises(WeightsError, match="was truncated while being read"):
        tensor.array()


def test_files_are_those_that_transformers_takes(tmp_path):
    folder = tmp_path / "m"
    checkpoints.decoder(folder, max_shard_size="20KB")  # an index and its files, out of date
    newer = checkpoints.decoder(tmp_path / "n", dtype=torch.bfloat16)
    shutil.copy(tmp_path / "n" / "model.safetensors", folder)
    save_file({"x": torch.ones(2)}, folder / "other.safetensors")
    tensors = open_source(str(folder)).tensors
    got = {k: t.array().tobytes() for k, t in tensors.items()}
    assert got == checkpoints.as_numpy(newer.state_dict())


def test_layers_of_different_types_lose_nothing(tmp_path):
    checkpoints.decoder(tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    weights = load_file(file)
    mixed = {k: v.bfloat16() if ".layers.0." in k else v for k, v in weights.items()}
    save_file(mixed, file, {"format": "pt"})
    source = open_source(str(tmp_path / "m"))
    _, tensors = read_back(source.configs["llm"], source, (1, 1, 8), keymap.DECODER, Decoder)
    for key, value in mixed.items():
        np.testing.assert_array_equal(tensors[key].array(), value.float().numpy(), err_msg=key)
    save_file({k: v.double() for k, v in weights.items()}, file, {"format": "pt"})
    with pytest.raises(WeightsError, match="got float64"):
        list(check_source(open_source(str(tmp_path / "m"))))


def test_bad_configs_are_named(tmp_path):
    folder = tmp_path / "m"
    checkpoints.decoder(folder)
    good = json.loads((folder / "config.json").read_text())
    for change, text in (
        ({"hidden_size": None}, "hidden_size: expected int, got None"),
        ({"hidden_size": "32"}, "hidden_size: expected int, got '32'"),
        ({"num_attention_heads": 0}, "at least one attention"),
        ({"vocab_size": 400}, "vocab_size 400, the table of embeddings has 352 rows"),
        ({"head_dim": 9}, "head_dim: expected an even number, got 9"),
        (
            {"use_sliding_window": True, "sliding_window": 64},
            "sliding_window: expected none, got 64",
        ),
        ({"use_sliding_window": True, "sliding_window": 4096}, "got 4096"),
        ({"layer_types": ["sliding_attention"] * 2}, "layer_types: expected 'full_attention'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "got 'dynamic'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_type linear: lacks factor"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 0.5}},
            "factor: expected at least 1",
        ),
        (
            {
                "rope_scaling": {"type": "yarn", "factor": 4.0, "mscale": 2.0},
                "rope_parameters": None,
            },
            "rope_type yarn: no such field mscale",
        ),
        (
            {"model_type": "llama", "attention_bias": True},
            "attention_bias: expected false, got True",
        ),
        (
            {"model_type": "mistral", "sliding_window": 4096},
            "mistral: sliding_window: expected none, got 4096",
        ),
        ({"model_type": "gemma"}, "model_type: expected one of .*llama.* got 'gemma'"),
    ):
        (folder / "config.json").write_text(json.dumps({**good, **change}))
        with pytest.raises(WeightsError, match=text):
            open_source(str(folder))
    for content in ("[1]", "{"):
        (folder / "config.json").write_text(content)
        with pytest.raises(WeightsError, match=r"config\.json"):
            open_source(str(folder))
    (folder / "config.json").write_text(json.dumps(good))
    (folder / "model.safetensors").rename(folder / "x")
    for content in ("{}", "nonsense"):
        (folder / "model.safetensors.index.json").write_text(content)
        with pytest.raises(WeightsError, match=r"model\.safetensors\.index\.json"):
            open_source(str(folder))
    checkpoints.multimood(tmp_path / "v")
    config = json.loads((tmp_path / "v" / "config.json").read_text())
    del config["mm_projector_type"]
    (tmp_path / "v" / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=r"lacks .*mm_projector_type"):
        open_source(str(tmp_path / "v"))
    open_source(str(tmp_path / "v"), "language_model")  # needs none of it


def golden_modules():
    """Yields (name, weights file, rngs -> module, table) of every golden folder with weights."""
    config = {
        name: json.loads((GOLDEN / name / "config.json").read_text())
        for name in ("qwen2", "siglip", "beats", "mamba", "compressor", "stc")
    }
    for kind in ("tied", "untied"):
        tied = {"tie_word_embeddings": kind == "tied"}
        llm = DecoderConfig.from_hf_config({**config["qwen2"]["model"], **tied})
        yield "qwen2", f"weights_{kind}", functools.partial(Decoder, llm), keymap.DECODER
    vision = SiglipConfig.from_hf_config(config["siglip"]["model"])
    yield "siglip", "weights", functools.partial(Siglip, vision), keymap.SIGLIP
    audio = BeatsConfig.from_hf_config(config["beats"]["model"])
    yield "beats", "weights", functools.partial(Beats, audio), keymap.BEATS
    mamba = MambaConfig.from_hf_config(config["mamba"]["model"])
    yield "mamba", "weights", functools.partial(Mamba, mamba), keymap.MAMBA
    c = config["compressor"]
    mamba = MambaConfig.from_hf_config({**c["mamba"], "vocab_size": c["tokenizer_len"]})
    create = functools.partial(Compressor, mamba, c["llm_input_size"])
    yield "compressor", "weights", create, keymap.COMPRESSOR
    s = config["stc"]["model"]
    stc = StcConfig(s["mm_hidden_size"], s["hidden_size"], s["mm_projector_type"], s["depth"])
    yield "stc", "weights", functools.partial(StcConnector, stc), keymap.STC


@pytest.mark.parametrize("case", golden_modules(), ids=lambda case: f"{case[0]}-{case[1]}")
def test_golden_weights_come_back_byte_for_byte(case):
    name, weights, create, table = case
    file = GOLDEN / name / f"{weights}.safetensors"
    state = nnx.split(nnx.eval_shape(lambda: create(rngs=nnx.Rngs(0))))[1]
    state = load_state(state, table, read_safetensors(file))
    out = {k: t.array().tobytes() for k, t in tensors_of(state, table).items()}
    assert out == checkpoints.as_numpy(load_file(file))


def test_full_depth_equals_transformers(tmp_path):
    """Checks as many layers as the 7B model has, but narrow ones."""
    checkpoints.decoder(tmp_path / "q", layers=28, scale=0.1)
    checkpoints.siglip(tmp_path / "s", layers=27, scale=0.1)
    checkpoints.mamba(tmp_path / "m", layers=48, scale=0.1)
    for name in ("q", "s", "m"):
        check(tmp_path / name)


def test_an_export_in_parts_loads_in_transformers(tmp_path, monkeypatch):
    model = checkpoints.decoder(tmp_path / "m", dtype=torch.bfloat16)
    source = open_source(str(tmp_path / "m"))
    monkeypatch.setattr("mm_jax.weights.save.SHARD_BYTES", 20_000)
    (tmp_path / "out").mkdir()
    write_safetensors(tmp_path / "out", source.tensors)
    shutil.copy(tmp_path / "m" / "config.json", tmp_path / "out")
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert checkpoints.as_numpy(theirs.state_dict()) == checkpoints.as_numpy(model.state_dict())
