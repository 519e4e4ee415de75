"""The language model's head: logits, and token log-probabilities without a [B, T, V] array."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec as P

from mm_jax.ops.attention import NEVER
from mm_jax.ops.partition import BATCH_AXES, batch_ways
from mm_jax.ops.products import product


def project_logits(hidden: jax.Array, kernel: jax.Array, padding: int) -> jax.Array:
    """Computes logits float32[..., V] from [..., D] and [D, V]; the last `padding` get NEVER."""
    # In float32 from the product on: losses and sampling exponentiate logits.
    logits = jnp.dot(hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)
    if not padding:
        return logits
    return jnp.where(jnp.arange(kernel.shape[1]) < kernel.shape[1] - padding, logits, NEVER)


class _How(NamedTuple):
    """Holds what is static: temperature, positions of a row at a time, and the number of tokens
    (columns of the kernel after them are padding)."""

    temperature: float
    chunk: int
    tokens: int


class TokenLogProbs(NamedTuple):
    """Each target's log-probability, the likeliest token int32, and the entropy in nats."""

    logps: jax.Array
    best: jax.Array
    entropy: jax.Array


NO_TOKEN = 2**31 - 1
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
    how = _How(float(temperature), chunk, kernel.shape[1] - vocab_padding)
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
def _log_probs(hidden, kernel, targets, chunks: jax.Array, how: _How) -> TokenLogProbs:
    """Computes `token_log_probs` of the first `chunks` chunks, zeros after them."""
    return _log_probs_and_totals(hidden, kernel, targets, chunks, how)[0]


def _log_probs_and_totals(hidden, kernel, targets, chunks, how) -> tuple[TokenLogProbs, jax.Array]:
    """Returns the results and the logsumexp of every position's logits, float32[B, T]."""

    def run(columns, hidden, kernel, targets, chunks):
        states, ids = _chunks(hidden, how.chunk), _chunks(targets, how.chunk)

        def one(i, found):
            logits = columns.logits(states[i], kernel, how)
            top = columns.max(jnp.max(logits, axis=-1))
            below = logits - top[..., None]
            total, weighted, picked = columns.sum(
                jnp.sum(jnp.exp(below), axis=-1),
                jnp.sum(jnp.exp(below) * below, axis=-1),
                columns.pick(logits, ids[i]),
            )
            # No finite loss for a target that is no token.
            picked = jnp.where((ids[i] >= 0) & (ids[i] < how.tokens), picked, jnp.nan)
            logsumexp = top + jnp.log(total)
            entropy = jnp.log(total) - weighted / total
            best = columns.best(logits, top)
            new = TokenLogProbs(picked - logsumexp, best, entropy), logsumexp
            return jax.tree.map(lambda old, x: old.at[i].set(x.astype(old.dtype)), found, new)

        zeros = jnp.zeros(ids.shape, jnp.float32)
        nothing = TokenLogProbs(zeros, jnp.zeros(ids.shape, jnp.int32), zeros), zeros
        found = _repeat(chunks, len(ids), one, nothing)
        return jax.tree.map(lambda x: _joined(x, hidden.shape[1]), found)

    rows = TokenLogProbs(*[_ROWS] * 3), _ROWS
    return _on_every_device(run, (_ROWS, _KERNEL, _ROWS, _ONE), rows)(
        hidden, kernel.astype(hidden.dtype), targets, chunks
    )


def _log_probs_forward(hidden, kernel, targets, chunks, how):
    trained = kernel.perturbed  # a frozen head, such as LoRA's, needs no gradient
    hidden, kernel, targets, chunks = hidden.value, kernel.value, targets.value, chunks.value
    found, totals = _log_probs_and_totals(hidden, kernel, targets, chunks, how)
    return found, (hidden, kernel, targets, totals, chunks, () if trained else None)


def _log_probs_backward(how, saved, cotangents):
    """Recomputes the logits chunk by chunk; their gradient is (one-hot - softmax) / temperature
    times that of the log-probability, in the precision of `hidden`."""
    hidden, kernel, targets, totals, chunks, trained = saved
    weights = cotangents.logps
    if isinstance(weights, SymbolicZero):
        weights = jnp.zeros(weights.shape, weights.dtype)

    def run(columns, hidden, kernel, targets, totals, weights, chunks):
        xs = tuple(_chunks(x, how.chunk) for x in (hidden, targets, totals, weights))

        def one(i, found):
            d_kernel, d_hidden = found
            h, ids, total, weight = (x[i] for x in xs)
            likelihoods = jnp.exp(columns.logits(h, kernel, how) - total[..., None])
            hot = jnp.arange(kernel.shape[1]) == columns.place(ids, kernel.shape[1])[..., None]
            d_logits = (hot - likelihoods) * (weight / how.temperature)[..., None]
            # Rounded to the compute type, so that both products below run in it.
            d_logits = d_logits.astype(h.dtype).reshape(-1, kernel.shape[1])
            d_h = product(d_logits, kernel.T).reshape(h.shape)
            if trained is not None:
                flat = h.reshape(-1, h.shape[-1])  # in float32: every chunk adds to the same sum
                d_kernel += jnp.dot(flat.T, d_logits, preferred_element_type=jnp.float32)
            return d_kernel, d_hidden.at[i].set(d_h)

        d_kernel = None if trained is None else jnp.zeros(kernel.shape, jnp.float32)
        nothing = d_kernel, jnp.zeros_like(xs[0])
        d_kernel, d_hidden = _repeat(chunks, len(xs[0]), one, nothing)
        (d_hidden,) = columns.sum(_joined(d_hidden, hidden.shape[1]))
        return d_hidden, columns.sum_rows(d_kernel)

    d_kernel = None if trained is None else _SUMMED
    d_hidden, d_kernel = _on_every_device(
        run, (_ROWS, _KERNEL, _ROWS, _ROWS, _ROWS, _ONE), (_ROWS, d_kernel)
    )(hidden, kernel.astype(hidden.dtype), targets, totals, weights, chunks)
    if d_kernel is not None:
        d_kernel = d_kernel.astype(kernel.dtype)
    return d_hidden, d_kernel, None, None


_log_probs.defvjp(_log_probs_forward, _log_probs_backward, symbolic_zeros=True)


# ---- the head on a mesh -------------------------------------------------------------------------

# XLA, left to itself, gathers the kernel and reduces its gradient anew in every chunk. Here every
# device gathers its columns once, works on its own rows, and gradients are added up at the end.
_ROWS, _KERNEL, _SUMMED, _ONE = "rows", "kernel", "gradient of the kernel", "whole"


class _Columns:
    """The columns of the kernel that this device holds, all of them without a mesh: the vocabulary
    is split over `axis` (None: it is not), and rows over `batch` axes."""

    def __init__(self, axis: str | None = None, batch: tuple[str, ...] = ()):
        self.axis, self.batch = axis, batch

    def place(self, ids: jax.Array | int, width: int) -> jax.Array:
        """Returns where token ids stand among the device's `width` columns: outside of [0, width)
        for those of other devices."""
        return ids - jax.lax.axis_index(self.axis) * width if self.axis else ids

    def logits(self, states: jax.Array, kernel: jax.Array, how: _How) -> jax.Array:
        logits = jnp.dot(states, kernel, preferred_element_type=jnp.float32)
        width = kernel.shape[1]
        real = jnp.arange(width) < self.place(how.tokens, width)
        return jnp.where(real, logits, NEVER) / how.temperature

    def pick(self, logits: jax.Array, ids: jax.Array) -> jax.Array:
        """Returns the logits of the ids that this device holds, 0 for others."""
        width = logits.shape[-1]
        at = self.place(ids, width)[..., None]
        held = jnp.take_along_axis(logits, jnp.clip(at, 0, width - 1), axis=-1)
        return jnp.where((at >= 0) & (at < width), held, 0.0)[..., 0]

    def max(self, x: jax.Array) -> jax.Array:
        return jax.lax.pmax(x, self.axis) if self.axis else x

    def sum(self, *xs: jax.Array) -> tuple[jax.Array, ...]:
        return jax.lax.psum(xs, self.axis) if self.axis else xs

    def best(self, logits: jax.Array, top: jax.Array) -> jax.Array:
        """Returns the first token whose logit is the `top` of all devices."""
        best = jnp.argmax(logits, axis=-1)
        if not self.axis:
            return best
        ids = best + jax.lax.axis_index(self.axis) * logits.shape[-1]
        return jax.lax.pmin(jnp.where(jnp.max(logits, axis=-1) == top, ids, NO_TOKEN), self.axis)

    def sum_rows(self, x: jax.Array | None) -> jax.Array | None:
        """Adds up the gradient of the kernel over the rows' devices."""
        if x is None or not self.batch:
            return x
        *others, scattered = self.batch
        if x.shape[0] % jax.lax.axis_size(scattered) == 0:
            x = jax.lax.psum_scatter(x, scattered, scatter_dimension=0, tiled=True)
        else:
            others = self.batch
        return jax.lax.psum(x, tuple(others))


def _on_every_device(run, inputs: tuple[str, ...], outputs):
    """Returns run(columns, *inputs) on each device's rows and columns; on whole arrays without a
    mesh, or where its batch axes do not divide the rows."""

    def call(*arrays):
        mesh = jax.sharding.get_abstract_mesh()
        kernel = arrays[inputs.index(_KERNEL)]
        if mesh.empty or mesh.size == 1 or arrays[0].shape[0] % batch_ways():
            return run(_Columns(), *arrays)
        axis = "tensor" if kernel.shape[1] % mesh.shape["tensor"] == 0 else None
        scattered = BATCH_AXES[-1] if kernel.shape[0] % mesh.shape[BATCH_AXES[-1]] == 0 else None
        specs = {
            _ROWS: P(BATCH_AXES),
            _KERNEL: P(None, axis),
            _SUMMED: P(scattered, axis),
            _ONE: P(),
        }
        return jax.shard_map(
            functools.partial(run, _Columns(axis, BATCH_AXES)),
            mesh=mesh,
            in_specs=tuple(specs[name] for name in inputs),
            out_specs=jax.tree.map(lambda name: specs[name], outputs),
            check_vma=False,
        )(*arrays)

    return call


def _repeat(count: jax.Array, most: int, body, carry):
    """Runs carry = body(i, carry) for i < count <= most."""
    # Like fori_loop, and the loop's condition tells `most` (for mm_jax.training.traffic).
    _, carry = jax.lax.while_loop(
        lambda at: (at[0] < count) & (at[0] < most),
        lambda at: (at[0] + 1, body(*at)),
        (jnp.int32(0), carry),
    )
    return carry


def _chunks(x: jax.Array, chunk: int) -> jax.Array:
    """Cuts [B, T, ...] into [T // chunk, B, chunk, ...], with T padded to whole chunks."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % chunk)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(len(x), -1, chunk, *x.shape[2:]), 1, 0)


def _joined(x: jax.Array, length: int) -> jax.Array:
    """Undoes `_chunks`: [C, B, chunk, ...] to [B, length, ...]."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(len(x), -1, *x.shape[3:])[:, :length]
