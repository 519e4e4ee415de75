"""Runs AdamW steps of the 12M Qwen2 (batch 4 x 512, float32, clipped at 1.0), ours with metrics."""

from __future__ import annotations

from tools.benchmarks.common import our_model, text_batch, tokens, torch_model

PEER = "transformers + torch AdamW, 2 threads"
TRAINING = True
STEPS = 3
SHAPE = dict(batch=4, length=512)


def ours():
    import jax

    from mm_jax.config.stage import Stage
    from mm_jax.models.abstract import init_params
    from mm_jax.models.sharding import put_batch
    from mm_jax.training.state import StageModel, TrainState
    from mm_jax.training.supervised import make_train_step

    abstract, create = our_model()
    stage = Stage(trainable=("language_model",), learning_rate=1e-4, weight_decay=0.01)
    model = StageModel(abstract, stage, 1000, "float32")
    state = model.start(init_params(create, abstract, 0), 0)
    train_step = make_train_step(model, 0)
    batch = put_batch(
        text_batch(tokens(SHAPE["batch"], SHAPE["length"]), targets=True), abstract.mesh
    )

    def run() -> dict:
        nonlocal state
        for _ in range(STEPS):
            with jax.set_mesh(abstract.mesh):
                new, metrics = train_step(*state, batch)
            state = TrainState(*new, state.frozen)
        return {"loss": float(jax.device_get(metrics["loss"]))}

    return run


def peer():
    import torch

    model = torch_model().train()
    model.config.use_cache = False
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01)
    ids = torch.as_tensor(tokens(SHAPE["batch"], SHAPE["length"]))

    def run() -> dict:
        for _ in range(STEPS):
            loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        return {"loss": float(loss.detach())}

    return run
