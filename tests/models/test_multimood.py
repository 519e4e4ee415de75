"""Tests the whole network on real batches: modality subsets, padding, history, decoding."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mm_jax.data.batch import collate
from mm_jax.data.datasets.common import SampleSource
from mm_jax.data.history import history_labels
from mm_jax.generation import sampler
from mm_jax.generation.predictor import label_table
from mm_jax.models.abstract import init_params
from mm_jax.models.decoder import Decoder
from mm_jax.models.decoder_config import DecoderConfig
from mm_jax.models.layers import UNROLLED
from mm_jax.run import build
from mm_jax.run.build import Run
from tests.conftest import tiny_config
from tests.support.runs import open_run, room


@dataclasses.dataclass
class World:
    session: Run
    params: nnx.State
    samples: list

    def example(self, sample, modality="av", answer=True, regime="gold"):
        labels = history_labels(sample, regime)
        return self.session.prompter.example(sample, modality, labels, with_answer=answer)

    def batch(self, examples, *sizes):
        return collate(examples, self.session.tokenizer.pad_id, room(examples, *sizes))

    def model(self, params):
        return nnx.merge(self.session.abstract.graph, params)


@pytest.fixture(scope="module")
def world(synthetic, tmp_path_factory):
    config = tiny_config(synthetic.folder)
    config.mesh.update(data=8)
    session = open_run(config, pathlib.Path(tmp_path_factory.mktemp("run")))
    params = init_params(session.create, session.abstract, 0)
    # Larger weights, so that every input matters in the untrained model; a compressor with larger
    # ones would forget.
    flat = [
        (path, v if path[0] == "mamba_compressor" or v.ndim < 2 else v.replace(v[...] * 1.5))
        for path, v in nnx.to_flat_state(params)
    ]
    params = nnx.from_flat_state(flat)
    samples = [s for s in SampleSource(synthetic.folder, "train") if len(s.history) >= 3]
    return World(session, params, samples)


@pytest.fixture(scope="module")
def logits(world):
    def run(params, batch):
        m = world.model(params)
        return m.language_model.logits(m(batch))

    jitted = jax.jit(run)
    return lambda batch: np.asarray(jitted(world.params, batch))


def test_random_weights_keep_the_input_in_the_residual_stream(world):
    """Checks that layers of a new, narrow model do not drown their input, and that memory vectors
    are as large as embeddings; otherwise it learns nothing for hundreds of steps."""

    @jax.jit
    def streams(params, batch):
        model = world.model(params)
        x = model.embed(batch)
        memory = model.mamba_compressor(batch.history_tokens, batch.memory_index)
        _, outputs = model.language_model(x, batch.mask, with_layers=True)
        return model.language_model.embed(batch.tokens), memory, x, outputs[-1]

    sample = world.samples[0]
    example = world.example(sample, "text")
    params = init_params(world.session.create, world.session.abstract, 1)
    tokens, memory, x, out = map(np.asarray, streams(params, world.batch([example])))
    size = lambda a: np.sqrt(np.mean(np.square(a)))  # noqa: E731
    assert 0.5 < size(memory[0, : len(sample.history)]) / size(tokens[0]) < 2
    x, out = x[0, : len(example.tokens)], out[0, : len(example.tokens)]
    cosine = np.sum(x * out, -1) / (np.linalg.norm(x, axis=-1) * np.linalg.norm(out, axis=-1))
    assert np.mean(cosine) > 0.2


def test_every_subset_of_modalities_gives_other_logits(world, logits):
    sample, last = world.samples[0], []
    for modality in ("text", "a", "v", "av"):
        example = world.example(sample, modality)
        out = logits(world.batch([example]))
        assert np.isfinite(out).all()
        last.append(out[0, len(example.tokens) - 1])
    for i in range(4):
        for j in range(i):
            assert np.abs(last[i] - last[j]).max() > 1e-3


def test_batched_and_padded_equals_single(world, logits):
    examples = [
        world.example(s, m) for s, m in zip(world.samples, ("av", "a", "text", "v"), strict=False)
    ]
    together = logits(world.batch(examples))
    for row, example in enumerate(examples):
        alone = logits(world.batch([example], len(example.tokens), 208, 320, 14))
        n = len(example.tokens)
        np.testing.assert_allclose(together[row, :n], alone[0, :n], atol=2e-4, rtol=1e-3)


def test_changing_the_history_changes_the_logits(world, logits):
    """Checks that the memory reaches the LLM; in the released code it never does."""
    sample = world.samples[0]
    before = world.example(sample)
    changed = dataclasses.replace(sample.history[0], text="Quite another sentence was said.")
    other = world.example(dataclasses.replace(sample, history=(changed, *sample.history[1:])))
    np.testing.assert_array_equal(before.tokens, other.tokens)
    # After the memory: attention must bring it there.
    places = before.tokens == world.session.tokenizer.history_id
    after = slice(int(np.flatnonzero(places)[-1]) + 1, len(before.tokens))
    a, b = (logits(world.batch([e]))[0, after] for e in (before, other))
    assert np.abs(a - b).max() > 1e-2
    hidden = world.example(sample, regime="none")
    c = logits(world.batch([hidden]))[0, after]
    assert np.abs(a - c).max() > 1e-2


def test_label_scores_equal_full_forward_passes(world, logits):
    """Compares log p(label | prompt, line start) from the cache with one pass over the sequence."""
    prompter = world.session.prompter
    examples = [world.example(s, "av", answer=False) for s in world.samples[:2]]
    lead = prompter.lead_ids("Client's emotion:", first=True)
    table, lengths = label_table(prompter, "client_emotion")

    def scores(params, batch):
        m = world.model(params)
        at = sampler.prefill(m, batch, len(lead) + table.shape[1])
        tokens = jnp.broadcast_to(jnp.array(lead), (2, len(lead)))
        at = sampler.force(m.language_model, at, tokens, jnp.ones(tokens.shape, bool))
        return sampler.score_labels(m.language_model, at, jnp.asarray(table), jnp.asarray(lengths))

    got = np.asarray(jax.jit(scores)(world.params, world.batch(examples)))
    for label in (0, 3, 6):
        ids = table[label, : lengths[label]]
        full = [
            dataclasses.replace(
                e,
                tokens=np.concatenate([e.tokens, lead, ids]).astype(np.int32),
                loss_weights=np.zeros(len(e.tokens) + len(lead) + len(ids), np.float32),
            )
            for e in examples
        ]
        logp = np.asarray(jax.nn.log_softmax(logits(world.batch(full))))
        for row, e in enumerate(full):
            start = len(e.tokens) - len(ids)
            want = sum(logp[row, start - 1 + i, t] for i, t in enumerate(ids))
            assert abs(got[row, label] - want) < 2e-4


def test_token_dropout_blanks_the_prompt_and_never_the_target(world):
    one = world.batch([world.example(world.samples[0])])
    blank = np.where(one.loss_weights > 0, one.tokens, 7)
    other = one._replace(tokens=blank.astype(np.int32))  # another prompt, the same answer

    @jax.jit
    def hidden(params, batch, key, rate_is_one):
        m = world.model(params)
        runs = [m(batch, dropout_key=key, token_dropout=rate) for rate in (0.5, 1.0)]
        return jnp.where(rate_is_one, runs[1], runs[0])

    target = one.loss_weights > 0
    keys = jax.random.key(0), jax.random.key(1)
    half = [np.asarray(hidden(world.params, one, k, False))[target] for k in keys]
    assert np.abs(half[0] - half[1]).max() > 1e-3
    whole = [np.asarray(hidden(world.params, b, keys[0], True))[target] for b in (one, other)]
    np.testing.assert_array_equal(whole[0], whole[1])
    assert np.abs(np.diff(whole[0], axis=0)).max() > 1e-3  # the targets are still there


def test_generation_stops_at_the_end_token_and_respects_seeds(world):
    examples = [world.example(s, "text", answer=False) for s in world.samples[:2]]
    batch = world.batch(examples)

    @functools.partial(jax.jit, static_argnums=(3, 4))
    def run(params, batch, seeds, temperature, stop_ids=()):
        m = world.model(params)
        keys = sampler.row_keys(jax.random.key(0), jnp.asarray(seeds, jnp.uint32))
        return sampler.generate(
            m.language_model,
            sampler.prefill(m, batch),
            keys,
            stop_ids=stop_ids,
            pad_id=0,
            max_new_tokens=8,
            temperature=temperature,
        )

    greedy = run(world.params, batch, [[0, 1], [2, 3]], 0.0)
    np.testing.assert_array_equal(greedy.tokens[:, 0], greedy.tokens[:, 1])
    hot = run(world.params, batch, [[0, 1], [2, 3]], 3.0)
    swapped = run(world.params, batch, [[1, 0], [2, 9]], 3.0)  # seeds decide
    np.testing.assert_array_equal(hot.tokens[0], swapped.tokens[0, ::-1])
    np.testing.assert_array_equal(hot.tokens[1, 0], swapped.tokens[1, 0])
    assert (hot.tokens[0, 0] != hot.tokens[0, 1]).any()
    assert (hot.tokens[1, 1] != swapped.tokens[1, 1]).any()
    row = np.asarray(greedy.tokens[0, 0]).tolist()
    stops = (row[2], 399)
    at = row.index(row[2])
    stopped = run(world.params, batch, [[0, 1], [2, 3]], 0.0, stops)
    assert bool(stopped.ended[0, 0])
    assert int(stopped.lengths[0, 0]) == at + 1
    assert np.asarray(stopped.tokens[0, 0]).tolist() == row[: at + 1] + [0] * (7 - at)
    np.testing.assert_array_equal(stopped.logps[0, 0, at + 1 :], 0.0)


def test_parts_that_do_not_exist_are_refused(world):
    config = dataclasses.replace(world.session.model_config, vision=None)
    create = build.create_model(world.session.config, config)
    graph, state = nnx.split(nnx.eval_shape(lambda: create(nnx.Rngs(0))))
    batch = world.batch([world.example(world.samples[0], "v")])
    with pytest.raises(ValueError, match="has frames, but the model has no vision part"):
        jax.eval_shape(lambda s, b: nnx.merge(graph, s)(b), state, batch)


@pytest.mark.parametrize("layers", [UNROLLED, UNROLLED + 1])
def test_recomputed_layers_are_kept_apart_where_they_are_unrolled(layers):
    """Without barriers XLA would merge what is recomputed with what was computed, and keep it; in
    a loop it cannot, and barriers would only hinder it."""
    config = DecoderConfig(
        **dict.fromkeys(("hidden_size", "intermediate_size", "head_dim", "vocab_size"), 8),
        **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), 1),
        num_hidden_layers=layers,
    )
    create = lambda: Decoder(config, rngs=nnx.Rngs(0), remat="full")  # noqa: E731
    graph, state = nnx.split(nnx.eval_shape(create))

    def loss(state, x):
        model = nnx.merge(graph, state)
        return model(model.embed(x), x >= 0).sum()

    x = jax.ShapeDtypeStruct((1, 4), np.int32)
    lowered = jax.jit(jax.grad(loss)).lower(state, x).as_text()
    assert ("optimization_barrier" in lowered) == (layers <= UNROLLED)
