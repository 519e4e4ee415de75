import collections
import dataclasses

import numpy as np
import pytest

from mm_jax.config.load import resolve
from mm_jax.config.schema import Data
from mm_jax.config.stage import Stage
from mm_jax.data import tokenizer
from mm_jax.data.batch import lengths_of
from mm_jax.data.datasets.common import SampleSource
from mm_jax.data.labels import built_in
from mm_jax.data.pipeline import (
    BatchSchedule,
    Loader,
    ModalityChoice,
    Recipe,
    WorkerError,
    list_items,
    train_iterator,
)
from mm_jax.data.prompts import Prompter, SpanLengths
from mm_jax.data.shapes import choose, holds
from tests.support.probe import Numbered, Probe


@pytest.fixture(scope="module")
def parts(synthetic):
    texts = [s.client_text for s in SampleSource(synthetic.folder, "train", light=True)]
    prompter = Prompter(
        tokenizer.train(texts, 320), SpanLengths(4), built_in("mesc"), template="short"
    )
    task = Recipe(modality=ModalityChoice((0.3, 0.2, 0.5), 0.25), label_dropout=0.3)
    light = SampleSource(synthetic.folder, "train", light=True)
    items, refused = list_items(light, task, prompter)
    assert not refused
    assert len(items) == len(light)
    return SampleSource(synthetic.folder, "train"), task, prompter, items


def batches(parts, start, count, hosts=1, host=0, seed=3, threads=2, processes=0):
    source, task, prompter, items = parts
    plan = BatchSchedule(items, task, 4, seed, start + count, shapes_of(items))
    loader = Loader(source, task, prompter, host, hosts)
    return list(train_iterator(plan, loader, start, readers(threads, processes)))


def shapes_of(items, count=4):
    return choose([i.lengths for i in items], count, lambda s: s @ np.array([8, 20, 2, 1, 1.0]))


def readers(threads, processes, prefetch=2):
    return Data(reader_threads=threads, reader_processes=processes, prefetch=prefetch)


def same(a, b):
    assert [ids for ids, _ in a] == [ids for ids, _ in b]
    for (_, x), (_, y) in zip(a, b, strict=True):
        for left, right in zip(x, y, strict=True):
            np.testing.assert_array_equal(left, right)


def test_deterministic_in_seed_whatever_the_threads(parts):
    same(batches(parts, 0, 5), batches(parts, 0, 5, threads=1))
    ids = [ids for ids, _ in batches(parts, 0, 5)]
    assert ids != [ids for ids, _ in batches(parts, 0, 5, seed=4)]


def test_resuming_continues_exactly(parts):
    same(batches(parts, 0, 6)[4:], batches(parts, 4, 2))


def test_hosts_share_a_batch_and_its_shapes(parts):
    whole = batches(parts, 0, 4)
    halves = [batches(parts, 0, 4, hosts=2, host=h) for h in (0, 1)]
    for (ids, batch), (ids0, b0), (ids1, b1) in zip(whole, *halves, strict=True):
        assert ids == ids0 + ids1
        for full, left, right in zip(batch, b0, b1, strict=True):
            assert left.shape == right.shape
            np.testing.assert_array_equal(full, np.concatenate([left, right]))


def test_epochs_cover_the_items_in_new_orders(parts):
    _, task, _, items = parts
    plan = BatchSchedule(items, task, 4, 0, 10**6, shapes_of(items))
    n = plan.steps_per_epoch
    first, second = (
        [i.record for s in range(e * n, (e + 1) * n) for i in plan[s].items] for e in (0, 1)
    )
    assert len(set(first)) == len(first) == n * 4
    assert first != second


def test_rows_of_a_batch_share_their_padded_lengths(parts):
    """Checks that grouped batches need little padding, and random ones far more."""
    _, task, _, items = parts
    shapes = shapes_of(items)

    def padded_tokens(grouped):
        plan = BatchSchedule(items, task, 4, 0, 1, shapes, grouped)
        rows = [plan[s] for s in range(plan.steps_per_epoch)]
        assert all(holds(r.shape, i.lengths) for r in rows for i in r.items)
        assert {r.shape for r in rows} <= set(shapes.sizes)
        return sum(4 * r.shape.tokens for r in rows)

    alone = sum(shapes.holding(i.lengths).tokens for i in items)
    random_order = padded_tokens(False)
    assert padded_tokens(True) < alone + 0.5 * (random_order - alone)


def test_every_row_is_in_an_epoch_whatever_the_shapes(parts):
    _, task, _, items = parts
    for count in (1, 2, 5):
        plan = BatchSchedule(items, task, 4, 0, 10**6, shapes_of(items, count))
        n = plan.steps_per_epoch
        assert n == len(items) // 4
        used = [[i.id for s in range(e * n, (e + 1) * n) for i in plan[s].items] for e in range(40)]
        assert all(len(set(ids)) == len(ids) == 4 * n for ids in used)
        # None is always left out, the longest neither.
        assert {i for ids in used for i in ids} == {item.id for item in items}


def test_lengths_hold_rows_whose_labels_are_hidden(parts, synthetic):
    _, task, prompter, _ = parts
    limited = dataclasses.replace(
        prompter, parts=("vision", "audio"), history="text", history_tokens=90
    )
    light, longer = SampleSource(synthetic.folder, "train", light=True), 0
    for item in list_items(light, task, limited)[0]:
        shown, hidden = (
            lengths_of(task.build(limited, light[item.record], 0, "av", hide=hide))
            for hide in (False, True)
        )
        assert holds(item.lengths, shown)
        assert holds(item.lengths, hidden)
        longer += hidden.tokens > shown.tokens
    assert longer


def test_modality_shares(parts):
    _, task, _, items = parts
    plan = BatchSchedule(items, task, 4, 0, 2000, shapes_of(items))
    counts = collections.Counter(m for s in range(1000) for m in plan[s].modalities)
    share = {m: counts[m] / 4000 for m in ("text", "a", "v", "av")}
    expected = {"text": 0.25, "a": 0.75 * 0.3, "v": 0.75 * 0.2, "av": 0.75 * 0.5}
    for m, p in expected.items():
        assert abs(share[m] - p) < 0.03, (m, share[m])
    hidden = np.mean([h for s in range(1000) for h in plan[s].hidden])
    assert abs(hidden - 0.3) < 0.03


def test_compressor_units(parts, synthetic):
    _, _, prompter, _ = parts
    light = SampleSource(synthetic.folder, "train", light=True)
    conversations, _ = list_items(light, Recipe(unit="history"), prompter)
    utterances, _ = list_items(light, Recipe(unit="history", utterances=1), prompter)
    longest = collections.defaultdict(int)
    for s in light:
        longest[s.dialogue_id] = max(longest[s.dialogue_id], len(s.history))
    assert len(conversations) == sum(n > 0 for n in longest.values())
    assert len(utterances) == sum(longest.values())
    pairs = Recipe(unit="history", utterances=2)
    parted, _ = list_items(light, pairs, prompter)
    assert len(parted) == sum(-(-n // 2) for n in longest.values())
    last = max(parted, key=lambda item: item.first)
    whole = light[last.record].history
    for first in (0, last.first):
        part = pairs.build(prompter, light[last.record], first, "text", hide=False)
        ids = part.tokens[part.loss_weights > 0]
        shown = prompter.tokenizer.decode(ids).split("\n")
        assert len(shown) == len(whole[first : first + 2])
        assert all(u.text in line for u, line in zip(whole[first:], shown, strict=False))


def test_bad_choices_are_refused(parts, config):
    _, task, _, items = parts
    with pytest.raises(ValueError, match=r"\[p_a, p_v, p_av\]"):
        Stage(modality_probs=(0.5, 0.5, 0.5)).check_used()
    with pytest.raises(ValueError, match="batch_size: expected at most"):
        BatchSchedule(items, task, 10**4, 0, 1, shapes_of(items))
    config.stage.sft.modality_probs = (1.0, 1.0, 0.0)
    with pytest.raises(ValueError, match=r"stage\.sft\.modality_probs: expected \[p_a"):
        resolve(config)


def test_processes_load_what_threads_do(parts):
    same(batches(parts, 2, 5), batches(parts, 2, 5, processes=2))


def test_workers_never_import_jax_and_a_dead_one_is_an_error(parts):
    source, task, prompter, items = parts
    plan = Numbered(BatchSchedule(items, task, 4, 0, 8, shapes_of(items)))
    loader = Loader(source, task, prompter)
    seen = next(train_iterator(plan, Probe(loader), 0, readers(1, 1, prefetch=1)))
    assert "tensorflow_datasets" in seen
    assert not seen & {"jax", "jaxlib", "torch", "tensorflow"}
    loaded = []
    with pytest.raises(WorkerError, match="one of 2 loader processes died"):
        loaded.extend(train_iterator(plan, Probe(loader, dies_at=5), 0, readers(1, 2)))
    assert len(loaded) < 6
