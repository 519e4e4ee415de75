"""Tests that reconstructions are what plain greedy decoding of every batch gives."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mm_jax.data.datasets.common import SampleSource
from mm_jax.generation import sampler
from mm_jax.generation.reconstruction import Reconstructor, prompts_alone
from mm_jax.models.abstract import init_params
from mm_jax.models.sharding import put_whole_batch
from mm_jax.training.runner import stage_data
from tests.support.runs import open_run


def test_the_engine_writes_what_plain_decoding_does(config, tmp_path):
    config.stages = ("utterances",)
    config.stage.utterances.update(batch_size=8, steps=3)
    run = open_run(config, tmp_path)
    data = stage_data(run, "utterances", SampleSource(config.data.folder, "train", light=True))
    batches = [(data.loader(data.schedule[step])[1], real) for step, real in ((0, 8), (1, 3))]
    params = init_params(run.create, run.abstract, 0)
    found = Reconstructor(run.abstract, run.tokenizer).texts(params, batches)
    assert len(found) == 11
    prompts = [prompts_alone(batch, run.tokenizer.pad_id) for batch, _ in batches]
    longest = max(length for _, length in prompts)

    @jax.jit
    def plain(params, batch):
        model = nnx.merge(run.abstract.graph, params)
        return sampler.generate(
            model.language_model,
            sampler.prefill(model, batch),
            sampler.row_keys(jax.random.key(0), jnp.zeros((len(batch.tokens), 1), jnp.uint32)),
            stop_ids=run.tokenizer.stop_ids,
            pad_id=run.tokenizer.pad_id,
            max_new_tokens=longest,
        )

    expected = []
    for (batch, real), (prompt, _) in zip(batches, prompts, strict=True):
        with jax.set_mesh(run.abstract.mesh):
            drawn = plain(params, put_whole_batch(prompt, run.abstract.mesh))
        for row in range(real):
            target = batch.tokens[row][batch.loss_weights[row] > 0]
            text = run.tokenizer.decode(np.asarray(drawn.tokens)[row, 0])
            expected.append((run.tokenizer.decode(target), text))
    assert found == expected
    assert len({text for _, text in found}) > 1
