"""Tests that sharded = unsharded on 8 virtual devices, with asserted partitions."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from mm_jax.data.datasets.common import SampleSource
from mm_jax.data.pipeline import BatchSchedule, Loader, list_items
from mm_jax.models.abstract import init_params
from mm_jax.models.beats import BeatsConfig, PositionalConv
from mm_jax.models.layers import Dtypes
from mm_jax.models.sharding import (
    AXES,
    batch_sharding,
    make_mesh,
    param_spec,
    put_batch,
    replicated,
)
from mm_jax.run import build
from mm_jax.training.checkpoint import Checkpoints
from mm_jax.training.state import StageModel, TrainState
from mm_jax.training.supervised import make_train_step
from tests.support.runs import open_run


def opened(synthetic, workdir, parts, mesh):
    """Opens a run of `parts` on a mesh (data, fsdp, tensor); returns it with the batches of three
    steps of 8 rows."""
    from tests.conftest import tiny_config

    config = tiny_config(synthetic.folder)
    config.model.parts, config.stages = parts, ("sft",)
    config.mesh.update(dict(zip(AXES, mesh, strict=True)))
    run = open_run(config, workdir)
    recipe = build.stage_recipe(run.config, run.config.stage["sft"])
    light = SampleSource(config.data.folder, "train", light=True)
    items, _ = list_items(light, recipe, run.prompter)
    shapes = build.shapes(run.config, run.model_config, [item.lengths for item in items])
    schedule = BatchSchedule(items, recipe, 8, 1, 3, shapes)
    source = SampleSource(config.data.folder, "train")
    loader = Loader(source, recipe, run.prompter)
    return run, [loader(schedule[i])[1] for i in range(3)]


@pytest.fixture(scope="module")
def runs(synthetic, tmp_path_factory):
    """Trains three steps on several meshes (data, fsdp, tensor), and with accumulation."""
    workdir = tmp_path_factory.mktemp("run")
    out = {}
    for name, mesh, accumulation in (
        ("data", (8, 1, 1), 1),
        ("fsdp", (1, 8, 1), 1),
        ("mixed", (2, 2, 2), 1),
        ("tensor", (1, 2, 4), 1),
        ("accumulated", (2, 2, 2), 2),
    ):
        run, batches = opened(synthetic, workdir, ("compressor",), mesh)
        stage = run.config.stage["sft"].model_copy(update={"accumulation": accumulation})
        model = StageModel(run.abstract, stage, 3, np.float32)
        state = model.start(init_params(run.create, run.abstract, 0), 0)
        step = make_train_step(model, 0)
        losses, norms = [], []
        for batch in batches:
            with jax.set_mesh(model.mesh):
                new, metrics = step(*state, put_batch(batch, model.mesh))
            state = TrainState(*new, state.frozen)
            losses.append(float(metrics["loss"]))
            norms.append(float(metrics["grad_norm"]))
        out[name] = (losses, norms, state)
    return out


@pytest.mark.parametrize("other", ["fsdp", "mixed", "tensor", "accumulated"])
def test_meshes_and_accumulation_give_the_same_training(runs, other):
    losses, norms, state = runs["data"]
    other_losses, other_norms, other_state = runs[other]
    np.testing.assert_allclose(losses, other_losses, rtol=2e-5)
    np.testing.assert_allclose(norms, other_norms, rtol=1e-4)
    assert losses[0] != losses[2]
    pairs = zip(
        jax.tree.leaves(state.trainable), jax.tree.leaves(other_state.trainable), strict=True
    )
    apart = np.concatenate([np.abs(np.asarray(a) - np.asarray(b)).ravel() for a, b in pairs])
    # Adam moves by +-lr where a gradient is nothing but round-off, so a few entries may differ.
    assert np.mean(apart > 1e-4) < 0.02
    assert np.mean(apart) < 1e-4
    assert np.max(apart) <= 3e-3


def test_parameters_and_moments_are_where_the_rules_say(runs):
    _, _, state = runs["mixed"]
    lm = state.trainable["language_model"]
    assert lm["layers"]["self_attn"]["q_proj"]["kernel"].get_value().sharding.spec == P(
        None, "fsdp", "tensor"
    )
    assert lm["layers"]["mlp"]["down_proj"]["kernel"].get_value().sharding.spec == P(
        None, "tensor", "fsdp"
    )
    assert lm["embed_tokens"]["embedding"].get_value().sharding.spec == P(("tensor", "fsdp"), None)
    moments = state.opt_state[1][0].mu["language_model"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert moments.get_value().sharding.spec == P(None, "fsdp", "tensor")


def test_saving_small_arrays_compiles_nothing(tmp_path, caplog, monkeypatch):
    """Checks that replicas do not share their writing: every device would compile its slice."""
    where = replicated(make_mesh({"data": 8, "fsdp": 1, "tensor": 1}))
    params = nnx.State({"kernel": jax.device_put(np.ones((16, 56), np.float32), where)})
    jax.config.update("jax_log_compiles", True)
    try:
        checkpoints = Checkpoints(tmp_path / "large")
        checkpoints.save_params(params, {})
        checkpoints.close()
        assert "Compiling" not in caplog.text
        monkeypatch.setattr("mm_jax.training.checkpoint.SHARED_BYTES", 64)
        checkpoints = Checkpoints(tmp_path / "small")
        checkpoints.save_params(params, {})
        checkpoints.close()
        assert "Compiling" in caplog.text
    finally:
        jax.config.update("jax_log_compiles", False)


def test_indivisible_dimensions_are_replicated():
    mesh = make_mesh({"data": 1, "fsdp": 4, "tensor": 2})
    assert param_spec(("embed", "mlp"), (8, 6), mesh) == P("fsdp", "tensor")
    assert param_spec(("embed", "mlp"), (6, 7), mesh) == P(None, None)
    assert param_spec(("vocab_in", "embed_in"), (16, 6), mesh) == P(("tensor", "fsdp"), None)


def test_video_and_sound_on_a_mesh(synthetic, tmp_path):
    """Embeddings and their gradients on a mesh whose axes are all wider than 1: where nothing
    keeps the rows apart, XLA splits reshapes of the connector wrongly."""
    run, (batch, *_) = opened(synthetic, tmp_path, ("vision", "audio"), (2, 2, 2))
    assert batch.frames.size
    assert batch.fbank.size
    where = run.abstract

    def loss(params, batch):
        x = nnx.merge(where.graph, params).embed(batch)
        return (x * jax.random.normal(jax.random.key(0), x.shape)).sum(), x

    grad = jax.value_and_grad(loss, has_aux=True)
    params = init_params(run.create, where, 0)
    alone = jax.jit(grad)(jax.device_get(params), batch)
    with jax.set_mesh(where.mesh):
        once = replicated(where.mesh)
        split = jax.jit(grad, out_shardings=((once, once), where.shardings))
        got = split(params, put_batch(batch, where.mesh))
    equal = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3)
    jax.tree.map(equal, jax.device_get(got), jax.device_get(alone))


def test_the_grouped_convolution_gathers_no_rows():
    config = BeatsConfig(encoder_embed_dim=24, conv_pos=5, conv_pos_groups=4)
    conv = PositionalConv(config, dtypes=Dtypes(), rngs=nnx.Rngs(0))
    graph, params = nnx.split(conv)
    x = jax.random.normal(jax.random.key(1), (8, 12, 24))

    def loss(params, x):
        return (nnx.merge(graph, params)(x) ** 2).sum()

    grad = jax.value_and_grad(loss, (0, 1))
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    rows = batch_sharding(mesh)
    given = jax.device_put(params, replicated(mesh)), jax.device_put(x, rows)
    with jax.set_mesh(mesh):
        step = jax.jit(grad, out_shardings=(None, (replicated(mesh), rows))).lower(*given).compile()
        got = step(*given)
    equal = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    jax.tree.map(equal, got, grad(params, x))
    assert " all-reduce(" in step.as_text()
    assert " all-gather(" not in step.as_text()


def test_mesh_sizes():
    assert dict(make_mesh({"data": 2, "fsdp": -1, "tensor": 1}).shape)["fsdp"] == 4
    with pytest.raises(ValueError, match="6 places for 8 devices"):
        make_mesh({"data": 2, "fsdp": 3, "tensor": 1})
    with pytest.raises(ValueError, match="at most one -1"):
        make_mesh({"data": -1, "fsdp": -1, "tensor": 1})
