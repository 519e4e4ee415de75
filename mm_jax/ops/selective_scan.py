"""The selective scan of Mamba-1: h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t, y_t = C_t h_t + D x_t.

(state-spaces/mamba; Gu & Dao 2023, algorithm 2.) The backward pass is written by hand: the forward
pass keeps the states at chunk boundaries only, and the backward pass recomputes one chunk at a
time, so that stored states grow with L / chunk instead of L.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from mm_jax.ops import selective_scan_kernel as kernel
from mm_jax.ops.partition import BATCH_AXES

CHUNK = 64
IMPLEMENTATIONS = ("auto", "chunked", "pallas", "sequential")


def selective_step(
    h: jax.Array, x: jax.Array, dt: jax.Array, a: jax.Array, b: jax.Array, c: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Advances by one token: h float32[B, D, N], x and dt [B, D], a [D, N] (negative), b, c [B, N].

    Returns the new state and y [B, D] without the skip term.
    """
    h = jnp.exp(dt[..., None] * a) * h + (dt * x)[..., None] * b[:, None, :]
    return h, jnp.einsum("bdn,bn->bd", h, c)


def selective_scan(
    x: jax.Array,
    dt: jax.Array,
    a: jax.Array,
    b: jax.Array,
    c: jax.Array,
    d: jax.Array,
    h0: jax.Array | None = None,
    resets: jax.Array | None = None,
    *,
    implementation: str = "auto",
    chunk: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Scans a sequence: x and dt float32[B, L, D], a [D, N], b and c [B, L, N], d [D]; L >= 1.

    h0 float32[B, D, N] is the state before the first token (default: zeros). resets bool[B, L] is
    True at the first token of a segment, before which the state becomes zero, so that several
    sequences can share a row. dt = 0 leaves the state unchanged. Returns y float32[B, L, D] and the
    last state float32[B, D, N].

    implementation: "chunked" (XLA), "pallas" (a GPU kernel; interpreted on other devices, for
    tests), "sequential" (the plain recurrence, the reference, differentiated by JAX), or "auto":
    the kernel on a GPU, else chunked. `chunk`: tokens per state that is kept for the backward pass,
    which recomputes the others (default: 64, in the kernel 16).
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"selective_scan: expected one of {IMPLEMENTATIONS}, got {implementation!r}"
        )
    if implementation == "auto":
        implementation = "pallas" if jax.default_backend() == "gpu" else "chunked"
    if h0 is None:
        h0 = jnp.zeros((x.shape[0], *a.shape), jnp.float32)
    keep = None if resets is None else 1.0 - resets.astype(jnp.float32)
    if implementation == "sequential":
        y, h = _sequential(x, dt, a, b, c, keep, h0)
        return y + x * d, h
    chunk = chunk or (kernel.CHUNK if implementation == "pallas" else CHUNK)
    run = functools.partial(_padded, chunk=chunk, implementation=implementation)
    mesh = jax.sharding.get_abstract_mesh()
    if implementation == "pallas" and not mesh.empty and mesh.size > 1:
        run = _on_every_device(run, mesh, x.shape[0], x.shape[2], keep is not None)
    return run(x, dt, a, b, c, d, keep, h0)


def _on_every_device(run, mesh, batch: int, width: int, with_keep: bool):
    """Runs `run` on each device's rows and channels, because XLA cannot split a kernel."""
    rows = BATCH_AXES if batch % math.prod(mesh.shape[i] for i in BATCH_AXES) == 0 else None
    channels = "tensor" if width % mesh.shape["tensor"] == 0 else None
    sequence, state = P(rows, None, channels), P(rows, channels, None)
    shared = P(rows, None, None)
    keep = P(rows, None) if with_keep else None
    specs = (sequence, sequence, P(channels, None), shared, shared, P(channels), keep, state)
    return jax.shard_map(
        run, mesh=mesh, in_specs=specs, out_specs=(sequence, state), check_vma=False
    )


def _padded(x, dt, a, b, c, d, keep, h0, *, chunk, implementation):
    """Pads every size to what the implementation needs, scans, and cuts the padding off."""
    batch, length, width = x.shape
    chunk = min(chunk, length)
    times, narrow, less = chunk, 0, 0
    if implementation == "pallas":
        keep = jnp.ones(x.shape[:2], jnp.float32) if keep is None else keep
        times = chunk * kernel.segments(batch, length, width)
        narrow = -width % min(kernel.BLOCK, _power_of_two(width))
        less = _power_of_two(a.shape[1]) - a.shape[1]
    short = -length % times

    def pad(t, channels=0, states=0):  # also dt, with 0, which leaves the state unchanged
        return jnp.pad(t, ((0, 0), (0, short), (0, channels + states)))

    y, h = _scan(
        pad(x, narrow),
        pad(dt, narrow),
        jnp.pad(a, ((0, narrow), (0, less))),
        pad(b, states=less),
        pad(c, states=less),
        jnp.pad(d, (0, narrow)),
        keep if keep is None else jnp.pad(keep, ((0, 0), (0, short)), constant_values=1.0),
        jnp.pad(h0, ((0, 0), (0, narrow), (0, less))),
        chunk,
        implementation,
    )
    return y[:, :length, :width], h[:, :width, : a.shape[1]]


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _sequential(x, dt, a, b, c, keep, h0):
    def token(h, inputs):
        xt, dtt, bt, ct, keept = inputs
        h = h if keept is None else h * keept[:, None, None]
        return selective_step(h, xt, dtt, a, bt, ct)

    first = lambda t: None if t is None else jnp.moveaxis(t, 1, 0)  # noqa: E731
    h, y = jax.lax.scan(token, h0, tuple(map(first, (x, dt, b, c, keep))))
    return jnp.moveaxis(y, 0, 1), h


def _chunks(t: jax.Array | None, chunk: int) -> jax.Array | None:
    """Cuts [B, L, ...] into [L / chunk, chunk, B, ...]."""
    if t is None:
        return None
    batch, length, *rest = t.shape
    return jnp.moveaxis(t.reshape(batch, length // chunk, chunk, *rest), 0, 2)


def _unchunk(t: jax.Array) -> jax.Array:
    chunks, chunk, batch, width = t.shape
    return t.transpose(2, 0, 1, 3).reshape(batch, chunks * chunk, width)


@functools.partial(jax.custom_vjp, nondiff_argnums=(8, 9))
def _scan(x, dt, a, b, c, d, keep, h0, chunk, implementation):
    if implementation == "pallas":
        interpret = jax.default_backend() != "gpu"
        return kernel.forward(x, dt, a, b, c, d, keep, h0, chunk, interpret, store=False)
    return _scan_forward(x, dt, a, b, c, d, keep, h0, chunk, implementation)[0]


def _scan_forward(x, dt, a, b, c, d, keep, h0, chunk, implementation):
    if implementation == "pallas":
        interpret = jax.default_backend() != "gpu"
        y, h, boundaries = kernel.forward(x, dt, a, b, c, d, keep, h0, chunk, interpret)
        return (y, h), (x, dt, a, b, c, d, keep, boundaries)

    def token(h, inputs):
        decay, u, bt, ct = inputs
        h = decay * h + u[:, None] * bt[..., None]
        return h, jnp.einsum("bnd,bn->bd", h, ct)

    def one_chunk(h, inputs):
        xc, dtc, bc, cc, keepc = inputs
        last, y = jax.lax.scan(token, h, (_decays(dtc, a, keepc), dtc * xc, bc, cc))
        return last, (y, h)

    inputs = tuple(_chunks(t, chunk) for t in (x, dt, b, c, keep))
    h, (y, boundaries) = jax.lax.scan(one_chunk, h0.swapaxes(1, 2), inputs)
    return (_unchunk(y) + x * d, h.swapaxes(1, 2)), (x, dt, a, b, c, d, keep, boundaries)


def _decays(dt: jax.Array, a: jax.Array, keep: jax.Array | None) -> jax.Array:
    """Computes the factors by which a chunk's states decay, [chunk, B, N, D], all at once.

    XLA computes exponentials several times faster here than token by token inside the loop. The
    channels come last, as in all states of the chunked scan: with the 16 states last, XLA's loops
    take twice the time.
    """
    decays = jnp.exp(dt[:, :, None] * a.T)
    decays = decays if keep is None else decays * keep[..., None, None]
    # Keeps XLA from fusing the exponentials back into the loop.
    return jax.lax.optimization_barrier(decays)


def _scan_backward(chunk, implementation, residuals, cotangents):
    x, dt, a, b, c, d, keep, boundaries = residuals
    gy, gh = cotangents
    # `keep` comes from booleans, so nothing reads its gradient; custom_vjp wants one all the same.
    no_gradient = None if keep is None else jnp.zeros_like(keep)
    if implementation == "pallas":
        interpret = jax.default_backend() != "gpu"
        *grads, gh0 = kernel.backward(x, dt, a, b, c, d, keep, boundaries, gy, gh, chunk, interpret)
        return *grads, no_gradient, gh0

    def recompute(h, inputs):
        decay, u, bt, gyt = inputs
        new = decay * h + u[:, None] * bt[..., None]
        return new, (h, jnp.einsum("bnd,bd->bn", new, gyt))

    def token(carry, inputs):
        gh, ga = carry
        decay, before, u, dtt, bt, ct, gyt = inputs
        gh = gh + gyt[:, None] * ct[..., None]
        g_input = jnp.einsum("bnd,bn->bd", gh, bt)  # with respect to dt * x
        gb = jnp.einsum("bnd,bd->bn", gh, u)
        gh = gh * decay
        g_exponent = gh * before  # with respect to dt * a; 0 across a reset, as the decay is
        ga = ga + g_exponent * dtt[:, None]
        # A sum of slices: XLA's reduction takes several times as long here.
        g_decay = sum(g_exponent[:, n] * a[:, n] for n in range(a.shape[1]))
        return (gh, ga), (g_input, g_decay, gb)

    def one_chunk(carry, inputs):
        h, xc, dtc, bc, cc, keepc, gyc = inputs
        decays, u = _decays(dtc, a, keepc), dtc * xc
        _, (before, gc) = jax.lax.scan(recompute, h, (decays, u, bc, gyc))
        carry, grads = jax.lax.scan(
            token, carry, (decays, before, u, dtc, bc, cc, gyc), reverse=True
        )
        return carry, (*grads, gc)

    # Backwards over the chunks: each one's states are recomputed from its boundary, then used.
    inputs = (boundaries, *(_chunks(t, chunk) for t in (x, dt, b, c, keep, gy)))
    gh = gh.swapaxes(1, 2)
    (gh0, ga), grads = jax.lax.scan(one_chunk, (gh, jnp.zeros_like(gh)), inputs, reverse=True)
    g_input, g_decay, gb, gc = (_unchunk(g) for g in grads)
    gd = jnp.sum(gy * x, axis=(0, 1))
    return (
        g_input * dt + gy * d,
        g_decay + g_input * x,
        jnp.sum(ga, axis=0).T,
        gb,
        gc,
        gd,
        no_gradient,
        gh0.swapaxes(1, 2),
    )


_scan.defvjp(_scan_forward, _scan_backward)


def causal_conv(
    x: jax.Array,
    weights: jax.Array,
    bias: jax.Array | None,
    state: jax.Array,
    lengths: jax.Array | None = None,
    resets: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Computes a depthwise causal convolution, y_t = sum_j weights_j x_{t - K + 1 + j}, with state.

    x [B, L, D], weights [K, D], bias [D]; state [B, K, D] holds the inputs before x, oldest first.
    lengths int32[B] counts a row's real tokens (default: all); resets as in `selective_scan`:
    nothing is seen across them. Returns y [B, L, D] and the state after the last real token.
    """
    taps, length = weights.shape[0], x.shape[1]
    whole = jnp.concatenate([state.astype(x.dtype), x], axis=1)  # x_t is at t + K
    if resets is not None:
        segment = jnp.cumsum(resets, axis=1)
        segments = jnp.pad(segment, ((0, 0), (taps, 0)))  # the state belongs to segment 0
    # Broadcast by hand, so that gradients are summed over rows and tokens at once: with one row JAX
    # sums over tokens alone, and YNNPACK takes 15 to 45 times as long for [1, L, D] -> [1, D].
    y = 0
    for j in range(taps):
        first = j + 1
        part = whole[:, first : first + length]
        if resets is not None and j < taps - 1:
            same = segments[:, first : first + length] == segment
            part = jnp.where(same[..., None], part, 0)
        y = y + part * jnp.broadcast_to(weights[j], part.shape)
    if lengths is None:
        new = whole[:, length:]
    else:
        at = lengths[:, None] + jnp.arange(taps)
        new = jnp.take_along_axis(whole, at[..., None], axis=1)
    if resets is not None:
        index = (jnp.full(x.shape[:1], length) if lengths is None else lengths)[:, None]
        own = jnp.take_along_axis(segments, index + jnp.arange(taps), axis=1)
        last = jnp.take_along_axis(segments, index + taps - 1, axis=1)
        new = jnp.where((own == last)[..., None], new, 0)
    y = y if bias is None else y + jnp.broadcast_to(bias, y.shape)
    return y, new.astype(state.dtype)
