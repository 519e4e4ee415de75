"""Tests sampling against sorted nuclei and counted draws, the shared prefix against plain rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mm_jax.data.batch import Batch
from mm_jax.generation import sampler
from mm_jax.models.decoder import Decoder
from mm_jax.ops.log_probs import token_log_probs
from tests.support.models import TINY_DECODER as CONFIG
from tests.support.models import Shell


def nucleus(logits, top_k, top_p):
    """Computes by sorting the probabilities that transformers' logits warpers leave."""
    order = np.argsort(-logits)
    kept = order[: top_k or len(order)]
    p = np.exp(logits[kept] - logits.max())
    p /= p.sum()
    size = int(np.searchsorted(np.cumsum(p), top_p)) + 1 if top_p < 1 else len(kept)
    out = np.zeros(len(logits))
    out[kept[:size]] = p[:size] / p[:size].sum()
    return out


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (7, 1.0), (0, 0.8), (20, 0.6), (0, 0.05)])
def test_draws_follow_the_truncated_distribution(top_k, top_p):
    logits = np.random.default_rng(0).normal(0, 2.0, size=300).astype(np.float32)
    draws = 20000
    keys = jax.random.split(jax.random.key(0), draws)
    token, logp = jax.jit(sampler.sample_token, static_argnums=(2, 3, 4))(
        keys, jnp.broadcast_to(logits, (draws, 300)), 0.7, top_k, top_p
    )
    found, want = np.bincount(token, minlength=300), nucleus(logits / 0.7, top_k, top_p)
    assert not found[want == 0].any()
    likely = want * draws > 5
    squares = (found - want * draws)[likely] ** 2 / (want * draws)[likely]
    assert squares.sum() < likely.sum() + 4 * np.sqrt(2 * likely.sum())  # chi-squared
    whole = jax.nn.log_softmax(logits / 0.7)
    np.testing.assert_allclose(logp, whole[token], rtol=1e-5, atol=1e-5)


def test_logits_that_are_not_finite_do_not_hang_it():
    logits = jnp.full((2, 300), jnp.nan)
    token, _ = sampler.sample_token(jax.random.split(jax.random.key(0), 2), logits, 1.0, 0, 0.9)
    assert token.shape == (2,)


def test_the_inverse_of_the_distribution_is_exact():
    p = np.random.default_rng(0).exponential(size=300).astype(np.float32)
    grid = (np.arange(200, dtype=np.float32) + 0.5) / 200
    uniform = np.stack(np.meshgrid(grid, grid, 0.99), axis=-1).reshape(-1, 3)
    blocks = sampler._blocks(jnp.broadcast_to(p, (40000, 300)))
    found = np.bincount(sampler._inverse_cdf(*blocks, uniform), minlength=300) / 40000
    np.testing.assert_allclose(found, p / p.sum(), atol=4e-3)
    np.testing.assert_allclose(
        [found[i : i + 128].sum() for i in (0, 128, 256)],
        [p[i : i + 128].sum() / p.sum() for i in (0, 128, 256)],
        atol=6e-3,
    )


def test_an_impossible_token_is_never_drawn():
    p = jnp.where(jnp.arange(300) % 3 == 1, 1.0, 0.0)
    ends = np.array([0.0, 0.5, np.nextafter(np.float32(1), np.float32(0))], np.float32)
    uniform = np.stack(np.meshgrid(ends, ends, ends), axis=-1).reshape(-1, 3)
    token = sampler._inverse_cdf(*sampler._blocks(jnp.broadcast_to(p, (27, 300))), uniform)
    assert (np.asarray(token) % 3 == 1).all()


def test_next_to_impossible_tokens_are_not_drawn():
    """Draws from a whole vocabulary with one likely token; rounded sums would let others in."""
    logits = 2.5 * jax.random.normal(jax.random.key(0), (152064,))
    logits = logits.at[777].set(jnp.max(logits) + 12)

    draw = jax.jit(jax.vmap(lambda key: sampler.sample_token(key, logits, 1.0, 0, 1.0)[0]))
    keys = jax.random.split(jax.random.key(1), (64, 4096))
    tokens = np.stack([draw(k) for k in keys])
    p = np.asarray(jax.nn.softmax(logits), np.float64)
    rare = p < 1e-10
    assert 0.01 < p[rare].sum() * tokens.size < 1
    assert rare[tokens].sum() <= 2
    sometimes = (p > 1e-9) & (p < 1e-2)
    expected = p[sometimes].sum() * tokens.size
    assert abs(sometimes[tokens].sum() - expected) < 5 * expected**0.5 + 5


@pytest.fixture(scope="module")
def world():
    model = Decoder(CONFIG, rngs=nnx.Rngs(0), remat="full")
    graph, params = nnx.split(model)
    rng = np.random.default_rng(1)
    lengths, tails = [5, 9, 2], [[4, 6, 1], [6, 6, 3], [2, 5, 6]]
    ids = rng.integers(83, size=(3, 9)).astype(np.int32)
    mask = np.arange(9) < np.array(lengths)[:, None]
    tail_ids = rng.integers(83, size=(3, 3, 6)).astype(np.int32)
    tail_mask = np.arange(6) < np.array(tails)[..., None]
    return graph, params, ids, mask, tail_ids, tail_mask


def shared_logps(model, ids, mask, tails, tail_mask, temperature=1.0):
    last, hidden = model.shared_prefix(model.embed(ids), mask, model.embed(tails), tail_mask)
    first = jnp.broadcast_to(last[:, None, None], hidden[:, :, :1].shape)
    before = jnp.concatenate([first, hidden[:, :, :-1]], axis=2)
    flat = before.reshape(-1, *before.shape[2:])
    found = token_log_probs(
        flat, model.head_kernel(), tails.reshape(-1, tails.shape[-1]), temperature
    )
    return found.logps.reshape(tails.shape)


def plain_logps(model, ids, mask, tails, tail_mask):
    """Scores every response with its own copy of the prompt, without padding between."""
    out = jnp.zeros(tails.shape)
    for b in range(len(ids)):
        n = int(mask[b].sum())
        for g in range(tails.shape[1]):
            m = int(tail_mask[b, g].sum())
            row = jnp.concatenate([ids[b, :n], tails[b, g, :m]])[None]
            hidden = model(model.embed(row), jnp.ones(row.shape, bool))
            logps = jax.nn.log_softmax(model.logits(hidden))[0]
            picked = logps[jnp.arange(n - 1, n + m - 1), tails[b, g, :m]]
            out = out.at[b, g, :m].set(picked)
    return out


def test_the_shared_prefix_equals_the_unshared_computation(world):
    graph, params, ids, mask, tails, tail_mask = world
    weights = jnp.asarray(np.random.default_rng(2).normal(size=tails.shape) * tail_mask)

    def loss(params, logps):
        found = logps(nnx.merge(graph, params), ids, mask, tails, tail_mask)
        return jnp.sum(found * weights), jnp.where(tail_mask, found, 0)

    step = lambda f: jax.jit(jax.value_and_grad(lambda p: loss(p, f), has_aux=True))(params)  # noqa: E731
    (shared, shared_all), shared_grad = step(shared_logps)
    (plain, plain_all), plain_grad = step(plain_logps)
    np.testing.assert_allclose(shared_all, plain_all, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(shared, plain, atol=1e-5, rtol=1e-5)
    for (path, a), (_, b) in zip(
        nnx.to_flat_state(shared_grad), nnx.to_flat_state(plain_grad), strict=True
    ):
        scale = float(jnp.abs(b.get_value()).max()) + 1e-6
        np.testing.assert_allclose(
            a.get_value() / scale, b.get_value() / scale, atol=1e-5, err_msg=str(path)
        )


def test_the_log_probs_of_sampling_are_those_of_training(world):
    graph, params, ids, mask, *_ = world

    def run(params):
        model = nnx.merge(graph, params)
        at = sampler.prefill(Shell(model), Batch(ids, mask, *[None] * 6))
        keys = sampler.row_keys(jax.random.key(3), jnp.arange(12, dtype=jnp.uint32).reshape(3, 4))
        samples = sampler.generate(
            model, at, keys, stop_ids=(5, 17), pad_id=0, max_new_tokens=20, temperature=1.3
        )
        real = jnp.arange(20) < samples.lengths[..., None]
        return samples, real, shared_logps(model, ids, mask, samples.tokens, real, 1.3)

    samples, real, again = jax.tree.map(np.asarray, jax.jit(run)(params))
    assert 12 * 20 > real.sum() > 12
    assert samples.ended.any()
    np.testing.assert_allclose(samples.logps[real], again[real], atol=2e-5)
