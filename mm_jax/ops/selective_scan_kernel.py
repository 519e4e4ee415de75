"""GPU kernels of the selective scan (Pallas, Triton backend), forward and backward.

A program has one row of the batch and BLOCK channels; it keeps their state [BLOCK, N] in registers
and walks along the sequence, so that x, dt, B, C and y pass through memory once. The forward pass
stores the state at every chunk boundary; the backward pass walks the chunks from the last to the
first, computes a chunk's states again into a scratch buffer, and goes back through them.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

BLOCK = 64  # channels of a program


def _specs(length: int, block: int, states: int):
    """Block specifications by name, for a grid (batch, channel blocks)."""
    return {
        "channels": pl.BlockSpec((1, length, block), lambda i, j: (i, 0, j)),
        "states": pl.BlockSpec((1, length, states), lambda i, j: (i, 0, 0)),
        "tokens": pl.BlockSpec((1, length), lambda i, j: (i, 0)),
        "a": pl.BlockSpec((block, states), lambda i, j: (j, 0)),
        "h": pl.BlockSpec((1, block, states), lambda i, j: (i, j, 0)),
    }


def _forward_kernel(
    x_ref, dt_ref, a_ref, b_ref, c_ref, keep_ref, h0_ref, y_ref, boundaries_ref, h_ref, *, chunk
):
    a = a_ref[...]

    def one_chunk(i, h):
        boundaries_ref[0, i] = h

        def token(t, h):
            dt, x = dt_ref[0, t], x_ref[0, t]
            h = jnp.exp(dt[:, None] * a) * (h * keep_ref[0, t]) + (dt * x)[:, None] * b_ref[0, t]
            y_ref[0, t] = jnp.sum(h * c_ref[0, t], axis=1)
            return h

        return jax.lax.fori_loop(i * chunk, (i + 1) * chunk, token, h)

    h_ref[0] = jax.lax.fori_loop(0, x_ref.shape[1] // chunk, one_chunk, h0_ref[0])


def forward(x, dt, a, b, c, keep, h0, chunk: int, interpret: bool):
    """y [B, L, D], states at the chunks' beginnings [B, L / chunk, D, N], last state [B, D, N].

    L is a multiple of `chunk`, D of BLOCK (or below it) and both D and N are powers of 2 there.
    """
    batch, length, width = x.shape
    states, block = a.shape[1], min(BLOCK, width)
    specs = _specs(length, block, states)
    chunks = length // chunk
    return pl.pallas_call(
        functools.partial(_forward_kernel, chunk=chunk),
        out_shape=(
            jax.ShapeDtypeStruct(x.shape, jnp.float32),
            jax.ShapeDtypeStruct((batch, chunks, width, states), jnp.float32),
            jax.ShapeDtypeStruct(h0.shape, jnp.float32),
        ),
        grid=(batch, width // block),
        in_specs=[
            specs[n] for n in ("channels", "channels", "a", "states", "states", "tokens", "h")
        ],
        out_specs=(
            specs["channels"],
            pl.BlockSpec((1, chunks, block, states), lambda i, j: (i, 0, j, 0)),
            specs["h"],
        ),
        compiler_params=None if interpret else triton.CompilerParams(num_warps=4),
        interpret=interpret,
    )(x, dt, a, b, c, keep, h0)


def _backward_kernel(
    x_ref, dt_ref, a_ref, b_ref, c_ref, keep_ref, boundaries_ref, gy_ref, gh_ref,
    gx_ref, gdt_ref, ga_ref, gb_ref, gc_ref, gh0_ref, before_ref,
    *, chunk, interpret,
):  # fmt: skip
    a = a_ref[...]
    chunks = x_ref.shape[1] // chunk

    def one_chunk(i, carry):
        i = chunks - 1 - i
        first = i * chunk

        def recompute(t, h):
            dt, x = dt_ref[0, first + t], x_ref[0, first + t]
            h = h * keep_ref[0, first + t]
            before_ref[0, t] = h
            return jnp.exp(dt[:, None] * a) * h + (dt * x)[:, None] * b_ref[0, first + t]

        jax.lax.fori_loop(0, chunk, recompute, boundaries_ref[0, i])
        if not interpret:
            triton.debug_barrier()  # the loop below reads what the one above has written

        def token(t, carry):
            gh, ga = carry
            t = chunk - 1 - t
            at = first + t
            dt, x, gy = dt_ref[0, at], x_ref[0, at], gy_ref[0, at]
            b, before = b_ref[0, at], before_ref[0, t]
            decay = jnp.exp(dt[:, None] * a)
            h = decay * before + (dt * x)[:, None] * b
            gc_ref[0, 0, at] = jnp.sum(h * gy[:, None], axis=0)
            gh = gh + gy[:, None] * c_ref[0, at]
            g_exponent = gh * before * decay
            ga = ga + g_exponent * dt[:, None]
            g_input = jnp.sum(gh * b, axis=1)
            gb_ref[0, 0, at] = jnp.sum(gh * (dt * x)[:, None], axis=0)
            gdt_ref[0, at] = jnp.sum(g_exponent * a, axis=1) + g_input * x
            gx_ref[0, at] = g_input * dt
            return gh * decay * keep_ref[0, at], ga

        return jax.lax.fori_loop(0, chunk, token, carry)

    start = (gh_ref[0], jnp.zeros_like(a))
    gh0_ref[0], ga_ref[0] = jax.lax.fori_loop(0, chunks, one_chunk, start)


def backward(x, dt, a, b, c, keep, boundaries, gy, gh, chunk: int, interpret: bool):
    """Gradients of x, dt, a, b, c and the first state."""
    batch, length, width = x.shape
    states, block = a.shape[1], min(BLOCK, width)
    specs, programs = _specs(length, block, states), width // block
    f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    per_program = pl.BlockSpec((1, 1, length, states), lambda i, j: (i, j, 0, 0))
    gx, gdt, ga, gb, gc, gh0, _ = pl.pallas_call(
        functools.partial(_backward_kernel, chunk=chunk, interpret=interpret),
        out_shape=(
            f32(x.shape),
            f32(x.shape),
            f32((batch, *a.shape)),
            f32((batch, programs, length, states)),
            f32((batch, programs, length, states)),
            f32(gh.shape),
            f32((batch, chunk, width, states)),  # scratch: a chunk's states
        ),
        grid=(batch, programs),
        in_specs=[
            *(specs[n] for n in ("channels", "channels", "a", "states", "states", "tokens")),
            pl.BlockSpec((1, length // chunk, block, states), lambda i, j: (i, 0, j, 0)),
            specs["channels"],
            specs["h"],
        ],
        out_specs=(
            specs["channels"],
            specs["channels"],
            specs["h"],
            per_program,
            per_program,
            specs["h"],
            pl.BlockSpec((1, chunk, block, states), lambda i, j: (i, 0, j, 0)),
        ),
        compiler_params=None if interpret else triton.CompilerParams(num_warps=4),
        interpret=interpret,
    )(x, dt, a, b, c, keep, boundaries, gy, gh)
    return gx, gdt, jnp.sum(ga, axis=0), jnp.sum(gb, axis=1), jnp.sum(gc, axis=1), gh0
