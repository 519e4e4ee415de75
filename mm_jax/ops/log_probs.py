"""The language model's head: logits, and token log-probabilities without a [B, T, V] array."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from mm_jax.ops.attention import NEVER
from mm_jax.ops.partition import batch_ways, rows_apart


def project_logits(hidden: jax.Array, kernel: jax.Array, padding: int) -> jax.Array:
    """Computes logits float32[..., V] from [..., D] and [D, V]; the last `padding` get NEVER."""
    # In float32 from the product on: losses and sampling exponentiate logits.
    logits = jnp.dot(hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)
    if not padding:
        return logits
    return jnp.where(jnp.arange(kernel.shape[1]) < kernel.shape[1] - padding, logits, NEVER)


class TokenLogProbs(NamedTuple):
    """Each target's log-probability, the likeliest token int32, and the entropy in nats."""

    logps: jax.Array
    best: jax.Array
    entropy: jax.Array


# Positions whose logits are held at a time. With 256, reading the head's weights bound a GPU.
HEAD_TOKENS = 1024


def token_log_probs(
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    temperature: float = 1.0,
    chunk: int | None = None,
    vocab_padding: int = 0,
    counted: jax.Array | None = None,
) -> TokenLogProbs:
    """Computes log-probabilities of `targets` at a temperature, in chunks over time.

    hidden [B, T, D] predicts targets int32[B, T] at the same positions; the last `vocab_padding`
    columns of kernel [D, V] are no tokens. Results are [B, T]; a [B, T, V] array is never held,
    forward or backward. `chunk`: positions of every row at a time (default: HEAD_TOKENS positions
    per device in all, a quarter of them with `counted`). The entropy has no gradient.

    `counted` bool[B, T]: the positions that matter, such as those of the answers. Others get
    zeros, and most of them cost nothing: each row's counted positions are moved to its front, and
    chunks after the longest row's last are not computed.
    """
    batch, length, _ = hidden.shape
    # Answers are short: a chunk of them is smaller, so that little beyond them is computed.
    held = (HEAD_TOKENS if counted is None else HEAD_TOKENS // 4) * batch_ways()
    chunk = min(chunk or max(1, held // batch), length)
    how = (float(temperature), chunk, vocab_padding)
    if counted is None:
        return _log_probs(hidden, kernel, targets, jnp.int32(-(-length // chunk)), how)
    order = jnp.argsort(~counted, axis=1, stable=True)
    longest = jnp.max(jnp.sum(counted, axis=1, dtype=jnp.int32))
    front = jnp.take_along_axis(hidden, order[..., None], axis=1)
    targets = jnp.take_along_axis(targets, order, axis=1)
    found = _log_probs(front, kernel, targets, -(-longest // chunk), how)
    back = jnp.argsort(order, axis=1)

    def placed(x: jax.Array) -> jax.Array:
        return jnp.where(counted, jnp.take_along_axis(x, back, axis=1), 0)

    return jax.tree.map(placed, found)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _log_probs(
    hidden, kernel, targets, chunks: jax.Array, how: tuple[float, int, int]
) -> TokenLogProbs:
    """Computes `token_log_probs` of the first `chunks` chunks, zeros after them; `how` is
    (temperature, chunk, vocabulary padding)."""
    return _log_probs_and_totals(hidden, kernel, targets, chunks, how)[0]


def _log_probs_and_totals(hidden, kernel, targets, chunks, how) -> tuple[TokenLogProbs, jax.Array]:
    """Returns the results and the logsumexp of every position's logits, float32[B, T]."""
    temperature, chunk, vocab_padding = how
    states, ids = _chunks(hidden, chunk), _chunks(targets, chunk)

    def one(i, found):
        logits = project_logits(rows_apart(states[i]), kernel, vocab_padding) / temperature
        picked = jnp.take_along_axis(logits, ids[i][..., None], axis=-1)[..., 0]
        total = jax.nn.logsumexp(logits, axis=-1)
        entropy = total - jnp.sum(jax.nn.softmax(logits) * logits, axis=-1)
        new = TokenLogProbs(picked - total, jnp.argmax(logits, axis=-1), entropy), total
        return jax.tree.map(lambda old, x: old.at[i].set(x.astype(old.dtype)), found, new)

    zeros = jnp.zeros(ids.shape, jnp.float32)
    nothing = TokenLogProbs(zeros, jnp.zeros(ids.shape, jnp.int32), zeros), zeros
    found = jax.lax.fori_loop(0, chunks, one, nothing)
    return jax.tree.map(lambda x: _joined(x, hidden.shape[1]), found)


def _log_probs_forward(hidden, kernel, targets, chunks, how):
    trained = kernel.perturbed  # a frozen head, such as LoRA's, needs no gradient
    hidden, kernel, targets, chunks = hidden.value, kernel.value, targets.value, chunks.value
    found, totals = _log_probs_and_totals(hidden, kernel, targets, chunks, how)
    return found, (hidden, kernel, targets, totals, chunks, () if trained else None)


def _log_probs_backward(how, saved, cotangents):
    """Recomputes the logits chunk by chunk; their gradient is (one-hot - softmax) / temperature
    times that of the log-probability, in the precision of `hidden`."""
    temperature, chunk, vocab_padding = how
    hidden, kernel, targets, totals, chunks, trained = saved
    weights = cotangents.logps
    if isinstance(weights, SymbolicZero):
        weights = jnp.zeros(weights.shape, weights.dtype)
    xs = tuple(_chunks(x, chunk) for x in (hidden, targets, totals, weights))

    def one(i, found):
        d_kernel, d_hidden = found
        h, ids, total, weight = (x[i] for x in xs)
        h = rows_apart(h)
        logits = project_logits(h, kernel, vocab_padding) / temperature
        hot = jnp.arange(kernel.shape[1]) == ids[..., None]
        d_logits = (hot - jnp.exp(logits - total[..., None])) * (weight / temperature)[..., None]
        # Rounded to the compute type, so that both products below run in it.
        d_logits = d_logits.astype(h.dtype).reshape(-1, kernel.shape[1])
        d_h = jnp.dot(d_logits, kernel.astype(h.dtype).T).reshape(h.shape)
        if trained is not None:
            flat = h.reshape(-1, h.shape[-1])  # in float32, as every chunk adds to the same sum
            d_kernel += jnp.dot(flat.T, d_logits, preferred_element_type=jnp.float32)
        return d_kernel, d_hidden.at[i].set(d_h)

    d_kernel = None if trained is None else jnp.zeros(kernel.shape, jnp.float32)
    d_kernel, d_hidden = jax.lax.fori_loop(0, chunks, one, (d_kernel, jnp.zeros_like(xs[0])))
    if d_kernel is not None:
        d_kernel = d_kernel.astype(kernel.dtype)
    return _joined(d_hidden, hidden.shape[1]), d_kernel, None, None


_log_probs.defvjp(_log_probs_forward, _log_probs_backward, symbolic_zeros=True)


def _chunks(x: jax.Array, chunk: int) -> jax.Array:
    """Cuts [B, T, ...] into [T // chunk, B, chunk, ...], with T padded to whole chunks."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % chunk)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(len(x), -1, chunk, *x.shape[2:]), 1, 0)


def _joined(x: jax.Array, length: int) -> jax.Array:
    """Undoes `_chunks`: [C, B, chunk, ...] to [B, length, ...]."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(len(x), -1, *x.shape[3:])[:, :length]
