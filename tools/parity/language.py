"""Checks the compressor, the language model and the losses against golden values."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from mm_jax.models.compressor import Compressor
from mm_jax.models.decoder import Decoder
from mm_jax.models.decoder_config import DecoderConfig
from mm_jax.models.mamba import Mamba, MambaConfig, MambaState
from mm_jax.ops.log_probs import token_log_probs
from mm_jax.weights import keymap
from tools.parity.compare import (
    EXACT,
    LOGITS,
    LOSS,
    MODULE,
    Bound,
    Component,
    Result,
    compare,
    gradient_results,
    gradients,
    run,
)


def check_mamba(c: Component) -> Iterator[Result]:
    config = MambaConfig.from_hf_config(c.config["model"])
    model = c.model(lambda r: Mamba(config, rngs=r), keymap.MAMBA)
    for match in c.cases(r"(L\d+)_input_ids"):
        ids = c[match[0]]

        def layers(m, ids):
            return m.extend(ids, m.empty_state(ids.shape[0]), with_layers=True)

        hidden, _, outputs = run(model, layers, ids)
        name = f"{match[1]}_last_hidden_state"
        yield compare(name, hidden, c[name], MODULE)
        for tap in c.cases(match[1] + r"_hidden_states_(\d+)"):
            i = int(tap[1])
            got = hidden if i == config.num_hidden_layers else outputs[i]
            yield compare(tap[0], got, c[tap[0]], MODULE)
    if "grad_input_ids" in c.io:
        loss, grads = gradients(
            model,
            keymap.MAMBA,
            lambda m, x, g: jnp.sum(m(x) * g),
            c["grad_input_ids"],
            c["grad_cotangent"],
        )
        yield compare("grad_loss", loss, c["grad_loss"], Bound(1e-4, 2e-5))
        yield from gradient_results("", c, grads)
    if "step_input_ids" in c.io:
        yield from mamba_steps(c, model)


def mamba_steps(c: Component, model) -> Iterator[Result]:
    ids, prefix = c["step_input_ids"], c.config["prefix_length"]
    full = run(model, lambda m, x: m(x), ids)
    yield compare("step_full_last_hidden_state", full, c["step_full_last_hidden_state"], MODULE)

    def start(m, x):
        return m.extend(x, m.empty_state(x.shape[0]))

    def states(name: str, state: MambaState) -> Iterator[Result]:
        got = np.asarray(state.conv).transpose(0, 1, 3, 2)
        yield compare(f"step_{name}_conv_states", got, c[f"step_{name}_conv_states"], MODULE)
        yield compare(f"step_{name}_ssm_states", state.ssm, c[f"step_{name}_ssm_states"], MODULE)

    hidden, state = run(model, start, ids[:, :prefix])
    yield compare(
        "step_prefix_last_hidden_state", hidden, c["step_prefix_last_hidden_state"], MODULE
    )
    yield from states("prefix", state)
    steps = []
    for t in range(prefix, ids.shape[1]):
        hidden, state = run(model, lambda m, x, s: m.extend(x, s), ids[:, t : t + 1], state)
        steps.append(np.asarray(hidden))
    want = c["step_decode_last_hidden_state"]
    yield compare("step_decode_last_hidden_state", np.concatenate(steps, axis=1), want, MODULE)
    yield from states("final", state)


def memory_positions(ids: np.ndarray, memory_id: int) -> np.ndarray:
    """Finds `<MEM>` in every row: positions int32[B, U], padded with 0 to the largest count."""
    rows = [np.flatnonzero(row == memory_id) for row in ids]
    width = max((len(r) for r in rows), default=0)
    return np.stack([np.pad(r, (0, width - len(r))) for r in rows]).astype(np.int32)


def check_compressor(c: Component) -> Iterator[Result]:
    mamba = MambaConfig.from_hf_config(
        {**c.config["mamba"], "vocab_size": c.config["tokenizer_len"]}
    )
    width, memory_id = c.config["llm_input_size"], c.config["mem_token_id"]
    model = c.model(lambda r: Compressor(mamba, width, rngs=r), keymap.COMPRESSOR)
    ragged = []
    for match in c.cases(r"(.+)_memory"):
        if match[1] == "grad":
            continue
        ids = c[f"{match[1]}_input_ids"]
        got = run(model, lambda m, x, p: m(x, p), ids, memory_positions(ids, memory_id))
        yield compare(match[0], got, c[match[0]], MODULE)
        if match[1].startswith("ragged"):
            ragged.append((match[1], ids, c[match[0]]))
    if ragged:  # the same histories in one batch, padded on the right
        longest = max(ids.shape[1] for _, ids, _ in ragged)
        ids = np.concatenate([np.pad(i, ((0, 0), (0, longest - i.shape[1]))) for _, i, _ in ragged])
        got = run(model, lambda m, x, p: m(x, p), ids, memory_positions(ids, memory_id))
        for row, (case, _, want) in zip(np.asarray(got), ragged, strict=True):
            yield compare(f"{case}_batched", row[None, : want.shape[1]], want, MODULE)
    if "grad_input_ids" in c.io:
        ids = c["grad_input_ids"]
        loss, grads = gradients(
            model,
            keymap.COMPRESSOR,
            lambda m, x, p, g: jnp.sum(m(x, p) * g),
            ids,
            memory_positions(ids, memory_id),
            c["grad_cotangent"],
        )
        yield compare("grad_loss", loss, c["grad_loss"], Bound(1e-4, 2e-5))
        yield from gradient_results("", c, grads)


def next_token_loss(hidden, kernel, labels) -> jax.Array:
    """Computes the mean cross-entropy of labels[t + 1] at position t, without labels of -100."""
    targets = labels[:, 1:]
    counted = targets != -100
    logps, *_ = token_log_probs(hidden[:, :-1], kernel, jnp.where(counted, targets, 0), chunk=8)
    return -jnp.sum(jnp.where(counted, logps, 0)) / jnp.sum(counted)


def greedy(m: Decoder, embeds, mask, steps: int):
    """Decodes greedily with the cache; returns tokens [B, steps] and logits [B, steps, V].

    With padding on the left, the last position's logits are those of the next token.
    """
    batch, length, _ = embeds.shape
    cache = m.empty_cache(batch, length + steps)
    hidden, cache = m.extend(embeds, mask, cache, 0)
    logits = m.logits(hidden[:, -1])

    def step(carry, t):
        logits, cache = carry
        token = jnp.argmax(logits, axis=-1)
        hidden, cache = m.extend(
            m.embed(token[:, None]), jnp.ones((batch, 1), bool), cache, length + t
        )
        return (m.logits(hidden[:, 0]), cache), (token, logits)

    _, (tokens, all_logits) = jax.lax.scan(step, (logits, cache), jnp.arange(steps))
    return tokens.T, all_logits.swapaxes(0, 1)


def check_qwen2(c: Component) -> Iterator[Result]:
    for tag, tied in (("untied", False), ("tied", True)):
        if f"{tag}_right_logits" not in c.io:
            continue
        config = DecoderConfig.from_hf_config({**c.config["model"], "tie_word_embeddings": tied})
        table = {k: v for k, v in keymap.DECODER.items() if not (tied and k == "lm_head")}
        model = c.model(lambda r, cfg=config: Decoder(cfg, rngs=r), table, f"weights_{tag}")

        for side in ("right", "left"):
            ids, mask = c[f"{side}_input_ids"], c[f"{side}_attention_mask"].astype(bool)

            def layers(m, ids, mask, right_padded):
                x = m.embed(ids)
                hidden, outputs = m(x, mask, right_padded=right_padded, with_layers=True)
                return m.logits(hidden), x, outputs, hidden

            logits, x, outputs, hidden = run(model, layers, ids, mask, right_padded=side == "right")
            name = f"{tag}_{side}_logits"
            yield compare(name, logits, c[name], LOGITS, mask)
            for tap in c.cases(f"{tag}_{side}_hidden_states_" + r"(\d+)"):
                i = int(tap[1])
                last = i == config.num_hidden_layers
                got = x if i == 0 else hidden if last else outputs[i - 1]
                yield compare(tap[0], got, c[tap[0]], MODULE, mask)
        if f"{tag}_generated" in c.io:
            steps = c[f"{tag}_generated"].shape[1]

            def generated(m, ids, mask, steps):
                return greedy(m, m.embed(ids), mask, steps)

            mask = c["left_attention_mask"].astype(bool)
            tokens, logits = run(model, generated, c["left_input_ids"], mask, steps=steps)
            yield compare(f"{tag}_generated", tokens, c[f"{tag}_generated"], EXACT)
            name = f"{tag}_generated_logits"
            yield compare(name, logits, c[name], LOGITS)
        if f"{tag}_loss" in c.io:

            def loss(m, ids, mask, labels):
                return next_token_loss(m(m.embed(ids), mask), m.head_kernel(), labels)

            mask = c["right_attention_mask"].astype(bool)
            value, grads = gradients(model, table, loss, c["right_input_ids"], mask, c["labels"])
            yield compare(f"{tag}_loss", value, c[f"{tag}_loss"], LOSS)
            yield from gradient_results(f"{tag}_", c, grads)


def check_losses(c: Component) -> Iterator[Result]:
    """Checks the log-probabilities."""
    logits = c["logps/logits"] / c.config["logps"]["temperature"]
    logps, *_ = token_log_probs(
        jnp.asarray(logits), jnp.eye(logits.shape[-1]), jnp.asarray(c["logps/ids"]), chunk=4
    )
    want = c["logps/selective_log_softmax"]
    yield compare("logps/selective_log_softmax", logps, want, MODULE)
