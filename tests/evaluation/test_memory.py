"""Tests that streaming memory equals compressing the whole history again, and costs less."""

import dataclasses

import numpy as np
import pytest
from flax import nnx

from mm_jax.data.datasets.common import SampleSource
from mm_jax.data.history import MemoryBudget, history_labels
from mm_jax.generation import predictor
from mm_jax.generation.memory import ConversationMemory, MemoryWriter, memory_vectors
from mm_jax.generation.predictor import predictor_of
from mm_jax.models.abstract import init_params
from tests.conftest import tiny_config
from tests.support.runs import open_run


@pytest.fixture(scope="module")
def world(synthetic, tmp_path_factory):
    """Builds a random model whose compressor has two layers, and reads the train split."""
    config = tiny_config(synthetic.folder)
    config.model.compressor.num_hidden_layers = 2
    config.model.parts = ("compressor",)
    config.predict.batch_size = 8
    session = open_run(config, tmp_path_factory.mktemp("memory"))
    params = init_params(session.create, session.abstract, 0)
    source = SampleSource(synthetic.folder, "train")
    samples = [source[i] for i in range(len(source))]
    return session, params, samples


def writer(session, rows=8):
    return MemoryWriter(session.abstract, rows)


def random_history(rng, session, utterances):
    """Returns token ids with a `<MEM>` after every utterance, and the indices of these."""
    ids, at = [], []
    for _ in range(utterances):
        ids += rng.integers(5, 300, rng.integers(1, 9)).tolist()
        at.append(len(ids))
        ids.append(session.tokenizer.memory_id)
    return np.array(ids, np.int32), np.array(at, np.int32)


def afresh(session, params, ids, at):
    model = nnx.merge(session.abstract.graph, params)
    return np.asarray(model.mamba_compressor(ids[None], at[None]))[0]


def test_turn_after_turn_equals_the_whole(world, tmp_path):
    session, params, _ = world
    rng = np.random.default_rng(0)
    histories = [random_history(rng, session, n) for n in (7, 3, 5)]
    own = writer(session)
    memories = [own.empty()] * 3
    for turn in range(7):
        cut = []
        for ids, at in histories:
            first = at[turn - 1] + 1 if 0 < turn <= len(at) else (0 if turn == 0 else len(ids))
            last = at[turn] + 1 if turn < len(at) else len(ids)
            cut.append((ids[first:last], at[(at >= first) & (at < last)] - first))
        memories = own.extend(params, memories, [c[0] for c in cut], [c[1] for c in cut])
        if turn == 3:  # another process could continue from here
            for i, memory in enumerate(memories):
                memory.save(tmp_path / f"{i}.npz")
            own = writer(session)
            memories = [ConversationMemory.load(tmp_path / f"{i}.npz") for i in range(3)]
    for memory, (ids, at) in zip(memories, histories, strict=True):
        np.testing.assert_array_equal(memory.tokens, ids)
        np.testing.assert_allclose(memory.vectors, afresh(session, params, ids, at), atol=1e-5)


def test_a_conversation_is_read_once(world):
    session, params, _ = world
    rng = np.random.default_rng(1)
    ids, at = random_history(rng, session, 6)
    other, other_at = random_history(rng, session, 4)
    changed = ids.copy()
    changed[0] += 1  # another label in the first caption, say
    cuts = [at[0] + 1, at[2] + 1, at[2] + 1, len(ids)]
    tokens = [*(ids[:n] for n in cuts), other, changed]
    index = [*(at[at < n] for n in cuts), other_at, at]
    names = ["a"] * 4 + ["b", "a"]
    own = writer(session)
    found = memory_vectors(own, params, names, tokens, index, [len(t) for t in tokens])
    for vectors, t, i in zip(found, tokens, index, strict=True):
        np.testing.assert_allclose(vectors, afresh(session, params, t, i), atol=1e-5)
    # A history that begins otherwise than the one read before is read from its start.
    assert own.compressed == len(ids) + len(other) + len(changed)


def test_empty_turns_change_nothing(world):
    session, params, _ = world
    ids, at = random_history(np.random.default_rng(2), session, 3)
    none = np.zeros(0, np.int32)
    own = writer(session)
    (before,) = own.extend(params, [own.empty()], [ids], [at])
    (after,) = own.extend(params, [before], [none], [none])
    for name, value in vars(before).items():
        np.testing.assert_array_equal(getattr(after, name), value)


def test_resets_in_the_padding_are_none(world):
    session, params, _ = world
    mamba = nnx.merge(session.abstract.graph, params).mamba_compressor.mamba
    tokens = np.random.default_rng(3).integers(5, 300, (2, 6)).astype(np.int32)
    lengths, resets = np.array([4, 6], np.int32), np.zeros((2, 6), bool)
    resets[1, 2] = True
    _, want = mamba.extend(tokens, mamba.empty_state(2), lengths, resets)
    resets[0, 4] = True
    _, got = mamba.extend(tokens, mamba.empty_state(2), lengths, resets)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("regime", "budget"),
    [
        ("gold", MemoryBudget()),
        ("predicted", MemoryBudget()),
        ("gold", MemoryBudget(2, 3)),
        ("predicted", MemoryBudget(1, 4)),
    ],
)
def test_predictions_are_the_same_with_fewer_tokens(world, regime, budget):
    session, params, samples = world
    session = dataclasses.replace(
        session, prompter=dataclasses.replace(session.prompter, budget=budget)
    )
    plain, streaming = predictor_of(session), predictor_of(session)
    plain.memory = None
    args = (params, samples, "text", regime)
    want = plain.predict(*args, respond=False)
    got = streaming.predict(*args, respond=False)
    for a, b in zip(want, got, strict=True):
        for task, p in a.probabilities.items():
            q = b.probabilities[task]
            np.testing.assert_allclose([q[k] for k in p], list(p.values()), atol=2e-5)
    known = {s.id: p.labels for s, p in zip(samples, want, strict=True)}
    whole, once, seen = 0, 0, {}
    for sample in sorted(samples, key=lambda s: s.turn):
        labels = history_labels(sample, regime, known)
        example = session.prompter.example(sample, "text", labels, with_answer=False)
        length = len(example.history_tokens)
        whole += length
        once += length - seen.get(sample.dialogue_id, 0)
        complete = len(sample.history) // budget.utterances * budget.vectors
        seen[sample.dialogue_id] = [0, *(example.memory_index + 1)][complete]
    assert streaming.memory.compressed == once < whole


@pytest.mark.parametrize(("regime", "keeps"), [("gold", False), ("predicted", True)])
def test_states_are_kept_only_for_turns_that_follow(world, monkeypatch, regime, keeps):
    session, params, samples = world
    given, original = [], predictor.memory_vectors

    def spy(*args):
        given.append(args[-1])
        return original(*args)

    monkeypatch.setattr(predictor, "memory_vectors", spy)
    predictor_of(session).predict(params, samples, "text", regime, respond=False)
    assert given
    assert all((kept is not None) is keeps for kept in given)
