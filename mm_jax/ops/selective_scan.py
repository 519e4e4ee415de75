"""The selective scan of Mamba-1: h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t, y_t = C_t h_t + D x_t.

A chunked scan with a hand-written backward pass: the forward pass keeps only the state at every
chunk boundary, the backward pass recomputes one chunk at a time, so memory grows with L / chunk
instead of L (state-spaces/mamba; Gu & Dao 2023, algorithm 2).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

CHUNK = 128


def selective_step(
    h: jax.Array, x: jax.Array, dt: jax.Array, a: jax.Array, b: jax.Array, c: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One token: h float32[B, D, N], x and dt [B, D], a [D, N] (negative), b and c [B, N].

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
    chunk: int = CHUNK,
) -> tuple[jax.Array, jax.Array]:
    """The whole sequence: x and dt float32[B, L, D], a [D, N], b and c [B, L, N], d [D].

    Returns y float32[B, L, D] and the last state float32[B, D, N]. Any L >= 1: the tail of the last
    chunk is padded with dt = 0, which leaves the state as it is.
    """
    length = x.shape[1]
    if h0 is None:
        h0 = jnp.zeros((x.shape[0], *a.shape), jnp.float32)
    chunk = min(chunk, length)
    padding = -length % chunk

    def pad(t):
        return jnp.pad(t, ((0, 0), (0, padding), (0, 0)))

    y, h = _scan(pad(x), pad(dt), a, pad(b), pad(c), h0, chunk)
    return y[:, :length] + x * d, h


def _chunks(t: jax.Array, chunk: int) -> jax.Array:
    """[B, L, D] -> [L / chunk, chunk, B, D]."""
    batch, length, width = t.shape
    return t.reshape(batch, length // chunk, chunk, width).transpose(1, 2, 0, 3)


def _unchunk(t: jax.Array) -> jax.Array:
    chunks, chunk, batch, width = t.shape
    return t.transpose(2, 0, 1, 3).reshape(batch, chunks * chunk, width)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _scan(x, dt, a, b, c, h0, chunk):
    return _scan_forward(x, dt, a, b, c, h0, chunk)[0]


def _scan_forward(x, dt, a, b, c, h0, chunk):
    def token(h, inputs):
        xt, dtt, bt, ct = inputs
        return selective_step(h, xt, dtt, a, bt, ct)

    def one_chunk(h, inputs):
        last, y = jax.lax.scan(token, h, inputs)
        return last, (y, h)

    inputs = tuple(_chunks(t, chunk) for t in (x, dt, b, c))
    h, (y, boundaries) = jax.lax.scan(one_chunk, h0, inputs)
    return (_unchunk(y), h), (x, dt, a, b, c, boundaries)


def _scan_backward(chunk, residuals, cotangents):
    x, dt, a, b, c, boundaries = residuals
    gy, gh = cotangents

    def recompute(h, inputs):
        xt, dtt, bt = inputs
        new = jnp.exp(dtt[..., None] * a) * h + (dtt * xt)[..., None] * bt[:, None, :]
        return new, h

    def token(carry, inputs):
        gh, ga = carry
        before, xt, dtt, bt, ct, gyt = inputs
        decay = jnp.exp(dtt[..., None] * a)
        h = decay * before + (dtt * xt)[..., None] * bt[:, None, :]
        gc = jnp.einsum("bdn,bd->bn", h, gyt)
        gh = gh + gyt[..., None] * ct[:, None, :]
        g_exponent = gh * before * decay  # with respect to dt * a
        ga = ga + jnp.einsum("bdn,bd->dn", g_exponent, dtt)
        g_input = jnp.einsum("bdn,bn->bd", gh, bt)  # with respect to dt * x
        gb = jnp.einsum("bdn,bd->bn", gh, dtt * xt)
        gdt = jnp.einsum("bdn,dn->bd", g_exponent, a) + g_input * xt
        return (gh * decay, ga), (g_input * dtt, gdt, gb, gc)

    def one_chunk(carry, inputs):
        h, xc, dtc, bc, cc, gyc = inputs
        _, before = jax.lax.scan(recompute, h, (xc, dtc, bc))
        return jax.lax.scan(token, carry, (before, xc, dtc, bc, cc, gyc), reverse=True)

    inputs = (boundaries, *(_chunks(t, chunk) for t in (x, dt, b, c, gy)))
    (gh0, ga), grads = jax.lax.scan(one_chunk, (gh, jnp.zeros_like(a)), inputs, reverse=True)
    gx, gdt, gb, gc = (_unchunk(g) for g in grads)
    return gx, gdt, ga, gb, gc, gh0


_scan.defvjp(_scan_forward, _scan_backward)
