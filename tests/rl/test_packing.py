"""Tests packed responses against those in rows of their own."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mm_jax.data.batch import Responses
from mm_jax.models.abstract import init_params
from mm_jax.models.sharding import put_whole_batch
from mm_jax.rl import policy
from mm_jax.rl.packing import first_fit, pack
from mm_jax.rl.rollout import padding_share
from tests.support.runs import open_run, two_batches


def test_every_token_stands_in_one_place():
    rng = np.random.default_rng(0)
    packed = 0
    for _ in range(200):
        count, group, width = rng.integers(1, 6), rng.integers(1, 9), rng.integers(1, 40)
        lengths = rng.integers(1, max(2, width // rng.integers(1, 5)), (count, group))
        lengths = np.minimum(lengths, width)
        found = pack(lengths, width)
        if found is None:
            rows = max(first_fit(own, width)[0].max() + 1 for own in lengths)
            assert rows > -(-group // 2) or group == 1
            continue
        packed += 1
        rows = found.source.shape[1]
        assert rows < group
        assert found.source.shape == (count, rows, width)
        for b in range(count):
            places = found.source[b].reshape(-1)
            for g in range(group):
                own = found.target[b, g, : lengths[b, g]]
                assert (places[own] == g * width + np.arange(lengths[b, g])).all()
                assert len(set(own // width)) == 1  # not cut
            assert (places >= 0).sum() == lengths[b].sum()
    assert packed > 50


def test_rows_are_halved_as_often_as_the_fullest_prompt_allows():
    assert pack(np.full((2, 8), 10), 10) is None
    assert pack(np.full((2, 8), 5), 10).source.shape == (2, 4, 10)
    assert pack(np.full((2, 8), 2), 10).source.shape == (2, 2, 10)
    lengths = np.array([[2] * 8, [10] + [5] * 7])  # 5 rows
    assert pack(lengths, 10) is None
    assert pack(np.ones((1, 8), int), 10).source.shape == (1, 1, 10)


def test_padding_counts_prompts_and_rows_of_responses():
    batch = types.SimpleNamespace(mask=np.array([[1, 1, 1, 0], [1, 1, 0, 0]], bool))
    lengths = np.array([[1, 2], [3, 1]])
    found = types.SimpleNamespace(lengths=lengths, size=(2, 3))
    assert padding_share(batch, found) == pytest.approx(1 - (2.5 + 3.5) / (4 + 6))


@pytest.mark.parametrize("critic", ["none", "own"])
def test_scores_and_gradients_are_those_of_single_rows(config, tmp_path, critic):
    config.stages = ("sft",)
    stage = config.stage.sft
    objective = "grpo" if critic == "none" else "ppo"
    stage.update(objective=objective, select_by="loss", label_weight=1.0)
    stage.update(batch_size=8, trainable=("language_model", "mm_projector"))
    stage.rl.update(group=6, max_new_tokens=12)
    if critic != "none":
        stage.rl.critic = critic
    session = open_run(config, tmp_path)
    stage = session.config.stage["sft"]
    own = policy.Policy(session.abstract, stage, session.tokenizer, jnp.float32, 0, 1)
    model = own.model
    state = model.start(init_params(session.create, session.abstract, 0), 0)
    if critic != "none":  # a head that starts at 0 would hide everything
        head = state.trainable["value_head"]["kernel"]
        head.set_value(jax.random.normal(jax.random.key(1), head.shape))
    _, batches = two_batches(config, session)
    batch = batches["av"]
    rng = np.random.default_rng(0)
    shape = (len(batch.tokens), 6, 12)
    lengths = rng.integers(1, 6, shape[:2])
    lengths[0, 0] = 12
    mask = np.arange(12) < lengths[..., None]
    tokens = np.where(mask, rng.integers(3, 60, shape), 0).astype(np.int32)
    packing = pack(lengths, 12)
    assert packing.source.shape[1] < 6

    def loss(trainable, responses):
        scored = policy.score_responses(
            nnx.merge(model.abstract.graph, trainable, state.frozen), responses, stage
        )
        parts = [scored.logps, scored.entropy] + [scored.values] * (critic != "none")
        parts = [jnp.where(responses.mask, x, 0) for x in parts]
        weights = jnp.arange(1.0, 13)
        return sum(jnp.sum(x * weights) for x in parts), parts

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    with jax.set_mesh(model.mesh):
        put = lambda r: put_whole_batch(r, model.mesh)  # noqa: E731
        single = Responses(batch, None, tokens, mask)
        (_, parts), grads = run(state.trainable, put(single))
        (_, own_parts), own_grads = run(state.trainable, put(single._replace(packing=packing)))
    for a, b in zip(parts, own_parts, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(own_grads), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3 * max(1, np.abs(a).max()))
