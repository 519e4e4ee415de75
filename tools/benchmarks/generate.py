"""Samples 128 new tokens for each of 16 prompts of 128 tokens (no stop token), nucleus 0.9."""

from __future__ import annotations

from tools.benchmarks.common import our_model, text_batch, tokens, torch_model

PEER = "transformers generate, torch with 2 threads"
TRAINING = False
STEPS = 1
SHAPE = dict(batch=16, prompt=128, new=128, top_p=0.9)


def ours():
    import jax
    import numpy as np
    from flax import nnx

    from mm_jax.generation import sampler
    from mm_jax.models.abstract import adapt_params, adapted_model, init_params
    from mm_jax.models.sharding import put_batch
    from mm_jax.rl import policy

    abstract, create = our_model()
    sampling = adapted_model(abstract, policy.layers_apart)
    params = adapt_params(
        abstract, sampling, policy.layers_apart, init_params(create, abstract, 0), 0, False
    )
    batch = text_batch(tokens(SHAPE["batch"], SHAPE["prompt"]), targets=False)
    seeds = np.arange(SHAPE["batch"], dtype=np.uint32)[:, None]

    @jax.jit
    def generate(params, batch, seeds):
        model = nnx.merge(sampling.graph, params)
        samples = sampler.generate(
            model.language_model,
            sampler.prefill(model, batch, features=model.features(batch)),
            sampler.row_keys(jax.random.key(0), seeds),
            stop_ids=(),
            pad_id=0,
            max_new_tokens=SHAPE["new"],
            temperature=1.0,
            top_p=SHAPE["top_p"],
        )
        return samples.lengths

    def run() -> dict:
        with jax.set_mesh(abstract.mesh):
            lengths = generate(params, put_batch(batch, abstract.mesh), seeds)
        return {"tokens": int(np.sum(jax.device_get(lengths)))}

    return run


def peer():
    import torch

    model = torch_model().eval()
    ids = torch.as_tensor(tokens(SHAPE["batch"], SHAPE["prompt"]))

    def run() -> dict:
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                top_p=SHAPE["top_p"],
                top_k=0,
                temperature=1.0,
                max_new_tokens=SHAPE["new"],
                min_new_tokens=SHAPE["new"],
                eos_token_id=None,
                pad_token_id=0,
            )
        return {"tokens": int((out.shape[1] - ids.shape[1]) * out.shape[0])}

    return run
