"""Answers 256 prompts of 32 to 256 tokens with replies as long as MESC's, in 16 slots, nucleus 0.9.

Ends are forced, so that both sides decode the same tokens. Ours: the engine. The peer:
transformers' `generate` on batches of 16 sorted by length, or its continuous batching. All prompts
are there at the start; times to the first token count from there.
"""

from __future__ import annotations

import itertools
import statistics
import time

from tools.benchmarks.common import SIZE, our_model, torch_model

PEER = "transformers, torch with 2 threads"
TRAINING = False
STEPS = 1
SHAPE = dict(prompts=256, slots=16, longest_prompt=256, longest_reply=128, top_p=0.9)
# Tokens of MESC's replies with their end, cut at 128, in Qwen2's tokenizer: shares and quantiles.
SHARES = (0, 0.1, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1)
QUANTILES = (2, 5, 7, 10, 12, 14, 18, 24, 38, 54, 102, 128)


def work():
    """Draws the prompts' tokens and the replies' lengths, the same for both sides."""
    import numpy as np

    rng = np.random.default_rng(0)
    lengths = rng.integers(32, SHAPE["longest_prompt"] + 1, SHAPE["prompts"])
    prompts = [rng.integers(10, SIZE["vocab_size"], n) for n in lengths]
    replies = np.interp(rng.random(SHAPE["prompts"]), SHARES, QUANTILES).round().astype(int)
    return prompts, replies


def summary(first: list[float], between: list[float], tokens: int) -> dict:
    return {
        "tokens": tokens,
        "first_token_median": statistics.median(first),
        "between_tokens_median": statistics.median(between),
    }


def ours(peer: str):
    import jax
    import numpy as np
    from flax import nnx

    from mm_jax.generation import sampler
    from mm_jax.generation.engine import Engine, Request
    from mm_jax.generation.slots import Drawing
    from mm_jax.models.abstract import adapt_params, adapted_model, init_params
    from mm_jax.models.sharding import put_batch
    from mm_jax.rl import policy
    from tools.benchmarks.common import text_batch

    abstract, create = our_model()
    sampling = adapted_model(abstract, policy.layers_apart)
    params = adapt_params(
        abstract, sampling, policy.layers_apart, init_params(create, abstract, 0), 0, False
    )
    prompts, replies = work()
    rows, shapes = SHAPE["slots"], range(32, SHAPE["longest_prompt"] + 1, 32)
    drawing = Drawing((), 0, SHAPE["longest_reply"], temperature=1.0, top_p=SHAPE["top_p"])
    engine = Engine(
        lambda params: nnx.merge(sampling.graph, params).language_model,
        abstract.mesh,
        drawing,
        slots=rows,
        kv_heads=SIZE["num_key_value_heads"],
    )

    @jax.jit
    def read(params, batch):
        return sampler.prefill(nnx.merge(sampling.graph, params), batch)

    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))

    def blocks():
        for start in range(0, len(order), rows):
            index = order[start : start + rows]
            length = next(n for n in shapes if n >= len(prompts[index[-1]]))
            ids = np.zeros((rows, length), np.int64)
            for row, i in enumerate(index):
                ids[row, : len(prompts[i])] = prompts[i]
            real = np.array([len(prompts[i]) for i in index])[:, None]
            batch = text_batch(ids, targets=False)._replace(mask=np.arange(length) < real)
            with jax.set_mesh(abstract.mesh):
                at = read(params, put_batch(batch, abstract.mesh))
            yield at, [Request(i, [i], int(replies[i])) for i in index]

    def run() -> dict:
        began, first, newest, between, count = time.perf_counter(), {}, {}, [], 0
        for progress in itertools.chain.from_iterable(engine.run(params, blocks())):
            now, new = time.perf_counter(), len(progress.tokens[0])
            if progress.name in newest and new:
                between.append((now - newest[progress.name]) / new)
            first.setdefault(progress.name, now - began)
            newest[progress.name] = now
            count += new
        return summary(list(first.values()), between, count)

    return run


def peer(peer: str):
    return {"static": static, "continuous": continuous}[peer]()


def static():
    import torch
    from transformers import StoppingCriteria

    model = torch_model().eval()
    prompts, replies = work()
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))

    class Ends(StoppingCriteria):
        """Ends every row at its own length, and takes the time of every token."""

        def __init__(self, prompt: int, limits: torch.Tensor):
            self.prompt, self.limits, self.times = prompt, limits, []

        def __call__(self, input_ids, scores, **kwargs):
            self.times.append(time.perf_counter())
            return input_ids.shape[1] - self.prompt >= self.limits

    def run() -> dict:
        began, first, between = time.perf_counter(), [], []
        for start in range(0, len(order), SHAPE["slots"]):
            index = order[start : start + SHAPE["slots"]]
            length = len(prompts[index[-1]])
            ids = torch.zeros((len(index), length), dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(index):  # padded on the left
                ids[row, length - len(prompts[i]) :] = torch.as_tensor(prompts[i])
                mask[row, length - len(prompts[i]) :] = 1
            ends = Ends(length, torch.as_tensor(replies[index]))
            with torch.inference_mode():
                model.generate(
                    ids,
                    attention_mask=mask,
                    do_sample=True,
                    top_p=SHAPE["top_p"],
                    top_k=0,
                    temperature=1.0,
                    max_new_tokens=SHAPE["longest_reply"],
                    stopping_criteria=[ends],
                    eos_token_id=None,
                    pad_token_id=0,
                )
            first += [ends.times[0] - began] * len(index)
            between += [b - a for a, b in itertools.pairwise(ends.times)]
        return summary(first, between, int(replies.sum()))

    return run


def continuous():
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model = torch_model().eval()
    prompts, replies = work()
    config = GenerationConfig(
        do_sample=True, top_p=SHAPE["top_p"], top_k=0, temperature=1.0, eos_token_id=-1,
        pad_token_id=0, max_new_tokens=SHAPE["longest_reply"], use_cuda_graph=False,
    )  # fmt: skip
    blocks = dict(page_size=32, num_blocks=SHAPE["slots"] * 24, max_batch_tokens=512)
    blocks |= dict(max_requests_per_batch=SHAPE["slots"], allow_block_sharing=False)
    batching = ContinuousBatchingConfig(**blocks)

    def run() -> dict:
        began, first, between, count = time.perf_counter(), [], [], 0
        with model.continuous_batching_context_manager(  # its thread needs no gradients
            generation_config=config, continuous_batching_config=batching, block=True
        ) as manager:
            for ids, most in zip(prompts, replies, strict=True):
                manager.add_request(ids.tolist(), max_new_tokens=int(most), record_timestamps=True)
            found = 0
            while found < len(prompts):
                result = manager.get_result(timeout=1)
                if result is None and not manager.is_running():
                    raise RuntimeError("transformers' continuous batching ended early")
                if result is not None and result.is_finished():
                    if result.error:
                        raise RuntimeError(result.error)
                    found += 1
                    count += len(result.generated_tokens)
                    times = result.timestamps
                    first.append(times[0] - began)
                    between += [b - a for a, b in itertools.pairwise(times)]
        return summary(first, between, count)

    return run
