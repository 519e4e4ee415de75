"""Tests LoRA: identity at first, merged = adapted, what is trained, quantised bases."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mm_jax.config.errors import ConfigError
from mm_jax.config.stage import Lora
from mm_jax.models import lora
from mm_jax.models.abstract import abstract_model, adapt_params, adapted_model, init_params
from mm_jax.models.decoder_config import DecoderConfig
from mm_jax.models.multimood import MultiMood, MultiMoodConfig
from mm_jax.models.sharding import make_mesh
from tests.support.runs import leaves, train

DECODERS = {
    "qwen2": DecoderConfig(96, 64, 128, 2, 4, 2),
    "qwen3": DecoderConfig(96, 64, 128, 2, 4, 2, head_dim=32, family="qwen3"),
    "llama": DecoderConfig(96, 64, 128, 2, 4, 2, family="llama", tie_word_embeddings=True),
}


@pytest.fixture(scope="module")
def plain(request):
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    llm = DECODERS[getattr(request, "param", "qwen2")]
    config = MultiMoodConfig(llm=llm, vision=None, audio=None, compressor=None)
    create = lambda rngs: MultiMood(config, rngs=rngs)  # noqa: E731
    abstract = abstract_model(create, mesh)
    return abstract, init_params(create, abstract, 0)


def hidden(abstract, params, key=None):
    x = jax.random.normal(jax.random.key(1), (2, 8, 64))

    @jax.jit
    def run(params):
        model = nnx.merge(abstract.graph, params)
        return model.language_model(x, jnp.ones((2, 8), bool), dropout_key=key)

    return np.asarray(run(params))


def adapted(plain, config):
    abstract, params = plain
    add = lambda model, rngs: lora.add_adapters(model, config, rngs)  # noqa: E731
    new = adapted_model(abstract, add)
    copy = jax.tree.map(jnp.copy, params)  # it is donated
    donate = config.base == "none"
    return new, adapt_params(abstract, new, add, copy, seed=3, donate=donate)


def merged_plain(abstract, config, params):
    merge = lambda p: lora.plain(p, abstract.params, config, jnp.float32)  # noqa: E731
    return jax.jit(merge, out_shardings=abstract.shardings)(params)


def with_random_b(params):
    flat = [
        (path, v.replace(0.05 * jax.random.normal(jax.random.key(5), v.shape)))
        if path[-1] == "lora_b"
        else (path, v)
        for path, v in nnx.to_flat_state(params)
    ]
    return nnx.from_flat_state(flat)


@pytest.mark.parametrize("plain", DECODERS, indirect=True)
def test_adapters_change_nothing_at_first_and_merge_exactly(plain):
    whole = jax.tree.map(lambda a: jnp.asarray(np.asarray(a)), plain[1])  # on one device
    np.testing.assert_allclose(hidden(plain[0], whole), hidden(*plain), atol=1e-5)
    config = Lora(rank=4, alpha=8.0)
    abstract, params = adapted(plain, config)
    np.testing.assert_allclose(hidden(abstract, params), hidden(*plain), atol=1e-5)
    params = with_random_b(params)
    moved = hidden(abstract, params)
    assert np.abs(moved - hidden(*plain)).max() > 0.05
    merged = merged_plain(plain[0], config, params)
    np.testing.assert_allclose(hidden(plain[0], merged), moved, atol=2e-5)
    kernel = abstract.shardings["language_model"]["layers"]["mlp"]["up_proj"]
    assert kernel["lora_a"].get_value().spec == jax.sharding.PartitionSpec(None, "fsdp", None)
    assert kernel["lora_b"].get_value().spec == jax.sharding.PartitionSpec(None, None, "tensor")


def test_dropout_needs_a_key(plain):
    config = Lora(rank=4, dropout=0.5)
    abstract, params = adapted(plain, config)
    params = with_random_b(params)
    a = hidden(abstract, params)
    b, c = (hidden(abstract, params, jax.random.key(k)) for k in (0, 1))
    assert np.abs(a - b).max() > 1e-3
    assert np.abs(b - c).max() > 1e-3


@pytest.mark.parametrize(
    ("plain", "base", "error"),
    [("qwen2", "int8", 0.01), ("qwen3", "nf4", 0.11), ("llama", "int8", 0.01)],
    indirect=["plain"],
)
def test_quantised_bases(plain, base, error):
    kernel = np.asarray(jax.random.normal(jax.random.key(0), (3, 128, 40)) * 0.1)
    codes, scale = lora.quantise(jnp.asarray(kernel), base)
    assert codes.nbytes == kernel.size // (2 if base == "nf4" else 1)
    back = np.asarray(lora.dequantise(codes, scale, base, jnp.float32))
    assert np.sqrt(np.mean((back - kernel) ** 2)) < error * kernel.std()
    config = Lora(rank=4, base=base)
    abstract, params = adapted(plain, config)
    near = hidden(abstract, params)
    assert 0 < np.abs(near - hidden(*plain)).mean() < 0.3
    params = with_random_b(params)
    merged = merged_plain(plain[0], config, params)
    np.testing.assert_allclose(hidden(plain[0], merged), hidden(abstract, params), atol=5e-5)


def test_nf4_codes_are_the_nearest_levels():
    values = np.linspace(-1, 1, 64, dtype=np.float32)[:, None]  # one block, scale 1
    codes, scale = lora.quantise(jnp.asarray(values), "nf4")
    back = np.asarray(lora.dequantise(codes, scale, "nf4", jnp.float32))[:, 0]
    nearest = lora.NF4[np.argmin(np.abs(values - lora.NF4), axis=1)]
    np.testing.assert_array_equal(back, nearest)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(rank=-1), "rank: expected at least 0, got -1"),
        (dict(targets=("q_proj", "lm_head")), r"targets: expected one of .*got 'lm_head'"),
        (dict(base="fp4"), "base: expected one of"),
        (dict(dropout=1.0), "dropout: expected 0 <= value < 1, got 1.0"),
    ],
)
def test_bad_settings_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        Lora(**values)


def test_a_lora_stage_trains_adapters_alone_and_leaves_plain_checkpoints(config, tmp_path):
    """Checks that the next stage and prediction read its checkpoint like any other."""
    config.model.parts = ("compressor",)
    config.model.llm.update(hidden_size=64, intermediate_size=128)
    config.stage.utterances.trainable = ("mamba_compressor",)
    config.stage.sft.update(steps=3, checkpoint_every=1, trainable=("language_model",))
    config.stage.sft.lora.update(rank=4, base="nf4", targets=("q_proj", "down_proj"), dropout=0.1)
    train(config, tmp_path / "run")
    before = leaves(config, tmp_path / "run", "utterances")
    after = leaves(config, tmp_path / "run", "sft")
    changed = {p[-2] for p in before if not np.allclose(before[p], after[p], atol=1e-7)}
    assert changed == {"q_proj", "down_proj"}
    config.stage.sft.trainable = ("mamba_compressor",)
    with pytest.raises(ConfigError, match="needs 'language_model' in the trainable modules"):
        train(config, tmp_path / "other")


@pytest.mark.parametrize("settings", [
    dict(optimizer="adafactor", weight_decay=0.1),
    dict(momentum_dtype="bfloat16"),
])  # fmt: skip
def test_optimisers_learn_on_a_mesh(config, tmp_path, settings):
    config.model.parts = ("compressor",)
    config.mesh.update(data=2, fsdp=2, tensor=2)
    config.stages = ("utterances",)
    config.stage.utterances.update(steps=8, learning_rate=1e-2, **settings)
    train(config, tmp_path / "run")
    rows = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = [r["loss"] for r in rows if "loss" in r]
    assert found[-1] < found[0] - 0.5
