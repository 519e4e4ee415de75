"""Tests continuous batching against plain sampling, over random schedules."""

import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mm_jax.generation import sampler
from mm_jax.generation.engine import Engine, Request
from mm_jax.generation.slots import Drawing
from mm_jax.models.decoder import Decoder
from mm_jax.models.sharding import make_mesh
from tests.support.models import TINY_DECODER as CONFIG

MOST, PROMPTS, STOPS = 12, 24, (3, 17, *range(40, 55))
DRAWING = Drawing(STOPS, 0, MOST, temperature=1.3, top_p=0.9)


class Prompts(NamedTuple):
    """Stands in for the states of a prompt's batch."""

    tokens: np.ndarray
    mask: np.ndarray


class World:
    """A tiny decoder, prompts of 2 to 16 tokens, and what plain sampling answers."""

    def __init__(self):
        lm = Decoder(CONFIG, rngs=nnx.Rngs(0))
        lm.unstack()
        self.graph, self.params = nnx.split(lm)
        rng = np.random.default_rng(4)
        self.lengths = rng.integers(2, 17, PROMPTS)
        self.tokens = rng.integers(CONFIG.vocab_size, size=(PROMPTS, 16)).astype(np.int32)
        self.seeds = rng.integers(2**32, size=(PROMPTS, 8), dtype=np.uint32)
        self.read, self.answers = jax.jit(self._read), {}

    def model(self, params):
        return nnx.merge(self.graph, params)

    def _read(self, params, tokens, mask):
        lm = self.model(params)
        hidden, cache = lm.prefill(lm.embed(tokens), mask)
        last = sampler._last(hidden, jnp.sum(mask, axis=1))
        return sampler.Decoding(cache, jnp.int32(tokens.shape[1]), lm.logits(last))

    def prefill(self, index, length):
        mask = np.arange(length) < self.lengths[list(index)][:, None]
        return self.read(self.params, self.tokens[list(index), :length], mask)

    def plain(self, group: int, drawing: Drawing) -> sampler.Samples:
        if (group, drawing) not in self.answers:
            self.answers[group, drawing] = self._plain(group, drawing)
        return self.answers[group, drawing]

    def _plain(self, group, drawing):
        def run(params, at, seeds):
            return sampler.generate(
                self.model(params),
                at,
                sampler.row_keys(jax.random.key(7), seeds),
                **vars(drawing),
            )

        at = self.prefill(range(PROMPTS), 16)
        return jax.device_get(jax.jit(run)(self.params, at, self.seeds[:, :group]))

    def engine(self, group, steps, drawing=DRAWING, mesh=None, slots=4):
        mesh = mesh or make_mesh(dict(data=1, fsdp=1, tensor=1), jax.devices()[:1])
        sizes = dict(slots=slots, kv_heads=2, longest=16, group=group, steps=steps)
        return Engine(self.model, mesh, drawing, **sizes)

    def request(self, i, group, limit=0, deadline=None):
        return Request(i, self.seeds[i, :group], limit, deadline)

    def check(self, i, group, drawing, result, limit=0):
        """Compares a result with the first `limit` tokens of plain sampling."""
        limit = limit or drawing.max_new_tokens
        want = self.plain(group, drawing)
        lengths = np.minimum(want.lengths[i], limit)
        np.testing.assert_array_equal(result.lengths, lengths)
        np.testing.assert_array_equal(result.ended, want.ended[i] & (want.lengths[i] <= limit))
        real = np.arange(drawing.max_new_tokens) < lengths[:, None]
        np.testing.assert_array_equal(result.tokens, np.where(real, want.tokens[i], 0))
        np.testing.assert_allclose(result.logps, np.where(real, want.logps[i], 0), atol=1e-5)


@pytest.fixture(scope="module")
def world():
    return World()


def blocks_of(rng, order):
    """Cuts prompts into blocks of two rows, some with a row of padding."""
    order = list(order)
    while order:
        one = order.pop(0)
        pair = (one, order.pop(0)) if order and rng.random() < 0.8 else (one, None)
        yield pair if rng.random() < 0.5 else pair[::-1]


def run_schedule(world, engine, rng):
    """Runs a random schedule; returns what became of every request, and the streamed tokens."""
    group = engine.group
    order = rng.permutation(PROMPTS)[: rng.integers(1, PROMPTS + 1)]
    blocks = list(blocks_of(rng, order))
    limits = {i: int(rng.integers(0, MOST + 1)) if rng.random() < 0.4 else 0 for i in order}
    late = {i for i in order if rng.random() < 0.1}
    results, streamed, asked = {}, {i: [[] for _ in range(group)] for i in order}, set()
    while blocks or not engine.is_idle:
        for _ in range(int(rng.integers(0, 4))):
            if not blocks:
                break
            pair = blocks.pop(0)
            index = [i if i is not None else 0 for i in pair]
            length = 8 if max(world.lengths[index]) <= 8 else 16
            past = time.monotonic() - 1
            requests = [
                None
                if i is None
                else world.request(i, group, limits[i], past if i in late else None)
                for i in pair
            ]
            engine.admit(world.prefill(index, length), requests, seed=7)
            asked |= {i for i in pair if i is not None}
        if asked - results.keys() and rng.random() < 0.1:
            engine.cancel(rng.choice(sorted(asked - results.keys())))
        for progress in engine.step(world.params):
            for kept, new in zip(streamed[progress.name], progress.tokens, strict=True):
                kept.extend(new)
            if progress.finished:
                assert progress.name not in results
                results[progress.name] = progress
    assert results.keys() == set(order)
    return results, streamed, limits, late


@pytest.mark.parametrize(("group", "steps"), [(1, 1), (1, 4), (4, 16), (8, 4)])
def test_random_schedules_give_what_plain_sampling_gives(world, group, steps):
    engine = world.engine(group, steps)
    kinds = set()
    for schedule in range(60):
        found = run_schedule(world, engine, np.random.default_rng((schedule, group, steps)))
        results, streamed, limits, late = found
        for i, progress in results.items():
            got = progress.result
            kinds.add(progress.finished)
            if progress.finished in ("cancelled", "deadline"):
                assert progress.finished == "cancelled" or i in late
                # What it has is the beginning of its answer.
                count = max(got.lengths, default=0)
                world.check(i, group, DRAWING, got, count) if count else None
            else:
                world.check(i, group, DRAWING, got, limits[i])
                ended = progress.finished == "ended"
                assert ended == got.ended.all()
            for g in range(group):
                assert streamed[i][g] == list(got.tokens[g, : got.lengths[g]])
    assert kinds == {"ended", "length", "cancelled", "deadline"}
    assert engine.programs.decode._cache_size() <= 4  # two sizes, two lengths


def test_results_are_bitwise_the_same_in_every_slot_and_order(world):
    """With one number of slots; another size of matrix product rounds differently."""
    engine, found = world.engine(4, 4), []
    for order in (range(PROMPTS), reversed(range(PROMPTS))):
        blocks = (
            (world.prefill(pair, 16), [world.request(i, 4) for i in pair], 7)
            for pair in zip(*[iter(order)] * 2, strict=True)
        )
        told = engine.finished(world.params, blocks)
        found.append({p.name: p.result for p in told})
    (one, other) = found
    assert one.keys() == other.keys() == set(range(PROMPTS))
    for i in one:
        np.testing.assert_array_equal(one[i].tokens, other[i].tokens)


def test_greedy_and_a_single_token(world):
    for drawing in (Drawing(STOPS, 0, MOST), Drawing(STOPS, 0, 1, temperature=1.0)):
        engine = world.engine(1, 4, drawing)
        blocks = [(world.prefill([i, i + 1], 16), [world.request(i, 1), None], 7) for i in range(6)]
        told = list(engine.finished(world.params, blocks))
        assert len(told) == 6
        for progress in told:
            world.check(progress.name, 1, drawing, progress.result)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 8, 1), (4, 1, 2)])
def test_slots_on_a_mesh(world, sizes):
    mesh = make_mesh(dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)))
    ways = sizes[0] * sizes[1]
    engine = world.engine(4, 4, mesh=mesh, slots=2 * ways)
    order = [*range(PROMPTS)]

    def blocks():
        for start in range(0, PROMPTS, ways):
            index = order[start : start + ways]
            at = world.prefill(index, 16)
            yield at, [world.request(i, 4) for i in index], 7

    told = list(engine.finished(world.params, blocks()))
    assert sorted(p.name for p in told) == order
    for progress in told:
        world.check(progress.name, 4, DRAWING, progress.result)


def test_what_does_not_fit_is_refused(world):
    engine = world.engine(1, 4)
    at = world.prefill([0, 1], 16)
    long = at._replace(cache=at.cache._replace(mask=jnp.ones((2, 20), bool)))
    with pytest.raises(ValueError, match="a prompt takes 20 places, and a slot has 16"):
        engine.admit(long, [world.request(0, 1), None])
    with pytest.raises(ValueError, match="limit 13, expected at most 12"):
        engine.admit(at, [world.request(0, 1), world.request(1, 1, limit=13)])
    engine.admit(at, [world.request(0, 1), None])
    with pytest.raises(ValueError, match="there is a request 0 already"):
        engine.admit(at, [None, world.request(0, 1)])
    assert [p.name for p in engine.finished(world.params, [])] == [0]


def test_a_row_that_is_not_finite_spoils_no_other(world):
    engine = world.engine(1, 4, slots=1)
    at = world.prefill([0, 1], 16)
    nan = jnp.full_like(at.cache.k[:, :1], jnp.nan)
    bad = at.cache._replace(k=at.cache.k.at[:, :1].set(nan), v=at.cache.v.at[:, :1].set(nan))
    blocks = [(at._replace(cache=bad), [world.request(0, 1), world.request(1, 1)], 7)]
    found = {p.name: p.result for p in engine.finished(world.params, blocks)}
    assert np.isnan(found[0].logps).any()
    world.check(1, 1, DRAWING, found[1])


def test_few_blocks_wait_and_an_error_leaves_nothing(world):
    engine, waiting = world.engine(1, 4, slots=2), []

    def blocks(last=False):
        for i in range(0, PROMPTS, 2):
            waiting.append(len(engine.waiting))
            if last and i > 6:
                raise RuntimeError("unread")
            yield world.prefill([i, i + 1], 16), [world.request(i, 1), None], 7
        yield world.prefill([0, 1], 16), [None, None], 7

    with pytest.raises(RuntimeError, match="unread"):
        list(engine.finished(world.params, blocks(last=True)))
    assert engine.is_idle
    assert engine.slots is None
    assert len(list(engine.finished(world.params, blocks()))) == PROMPTS // 2
    assert max(waiting) <= 1


def test_a_decoded_token_gathers_no_rows(world):
    mesh = make_mesh(dict(data=4, fsdp=2, tensor=1))
    engine = world.engine(4, 4, mesh=mesh, slots=16)
    at = world.prefill(range(8), 16)
    slots, _, limits = engine.programs.abstract_arguments(at, 16)
    with jax.set_mesh(mesh):
        program = engine.programs.decode.lower(world.params, slots, limits).compile().as_text()
    for name in ("all-gather", "all-to-all", "collective-permute"):
        assert f" {name}(" not in program
        assert f" {name}-start(" not in program
