"""Tests the choice of padded shapes against exact ones."""

import itertools
import time

import numpy as np
import pytest

from mm_jax.data.batch import Shape
from mm_jax.data.shapes import STEPS, Shapes, choose, geometric, holds, joined, rounded
from mm_jax.models.multimood import MultiMoodConfig
from mm_jax.run.flops import forward_flops, row_cost

WEIGHTS = np.array([8.0, 40.0, 3.0, 2.0, 1.0])


def cost(shapes):
    return shapes @ WEIGHTS + shapes[:, 0] ** 2 / 50


def padded(lengths, shapes):
    return sum(cost(np.array([shapes.holding(row)]))[0] for row in lengths)


def exact(lengths, count):
    """Tries all intervals of sorted lengths, in one dimension."""
    unique = sorted({rounded(row).tokens for row in lengths})
    best = np.inf
    for ends in itertools.combinations(unique[:-1], min(count - 1, len(unique) - 1)):
        sizes = [Shape(n, 0, 0, 0, 0) for n in (*ends, unique[-1])]
        best = min(best, padded(lengths, Shapes(tuple(sizes))))
    return best


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("count", [1, 2, 3])
def test_near_the_best_in_one_dimension(seed, count):
    rng = np.random.default_rng(seed)
    lengths = [Shape(int(n), 0, 0, 0, 0) for n in rng.lognormal(4.5, 0.6, 40) + 1]
    found = choose(lengths, count, cost)
    assert len(found.sizes) <= count
    assert padded(lengths, found) <= 1.05 * exact(lengths, count)


def mixed(rng, rows):
    """Draws rows, some without media or history."""
    video, audio, turn = rng.random(rows) < 0.8, rng.random(rows) < 0.7, rng.integers(0, 20, rows)
    tokens = 40 + turn + 72 * video + 30 * audio + rng.integers(0, 60, rows)
    columns = (tokens, 8 * video, audio * rng.integers(100, 1000, rows), 14 * turn, turn)
    return [Shape(*map(int, row)) for row in zip(*columns, strict=True)]


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_all_rows_fit_and_more_shapes_cost_less(count):
    lengths = mixed(np.random.default_rng(1), 500)
    found = choose(lengths, count, cost)
    assert 1 <= len(found.sizes) <= count
    assert holds(found.sizes[-1], joined(lengths))
    assert all(n % step == 0 for size in found.sizes for n, step in zip(size, STEPS, strict=True))
    if count > 1:
        fewer = choose(lengths, count // 2, cost)
        assert padded(lengths, found) < padded(lengths, fewer)
    assert found == choose(list(reversed(lengths)), count, cost)
    more = [*lengths, Shape(2000, 8, 0, 0, 0)]
    assert found.extended(lengths) is found
    assert holds(found.extended(more).sizes[-1], joined(more))
    with pytest.raises(ValueError, match="does not fit"):
        found.holding(more[-1])


def test_a_hundred_thousand_rows_take_under_a_second():
    lengths = mixed(np.random.default_rng(2), 100_000)
    network = row_cost(MultiMoodConfig())
    began = time.perf_counter()
    found = choose(lengths, 4, network)
    assert time.perf_counter() - began < 3  # 0.9 s alone; tests share the cores
    assert len(found.sizes) == 4


def test_costs_are_those_of_a_forward_pass():
    c, row = MultiMoodConfig(), Shape(300, 8, 496, 200, 20)
    shapes = dict(tokens=(1, 300), frames=(1, 8), fbank=(1, 496))
    shapes |= dict(history_tokens=(1, 200), memory_index=(1, 20))
    want = sum(forward_flops(c, shapes, head=False).values())
    np.testing.assert_allclose(row_cost(c)(np.array([row])), [want], rtol=1e-6)


def test_lengths_that_come_one_at_a_time():
    assert [geometric(n, 64) for n in (0, 1, 64, 65, 300)] == [0, 64, 64, 128, 512]
