"""GPU kernels of the selective scan (Pallas, Triton backend), forward and backward.

A program has one row of the batch and BLOCK channels, one a thread, and walks along the sequence.
A thread keeps all N states of its channel in registers of their own, so that nothing passes between
threads but the sums over channels of the gradients of B and C: x, dt and y go through memory once.
The forward pass stores the state at every chunk boundary; the backward pass walks the chunks from
the last to the first, computes a chunk's states again (every TILE-th into a scratch buffer, those
in between in registers), and goes back through them.

Inside, states lie before channels, [N, D], as a warp reads and writes them.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

BLOCK, WARPS = 32, 1  # channels and warps of a program
FORWARD_TILE, BACKWARD_TILE = 8, 4  # tokens that are unrolled
LOG2_E = math.log2(math.e)
NEVER = -1e30  # added to an exponent: the state before is forgotten


def _specs(length: int, block: int, states: int):
    """Block specifications by name, for a grid (batch, channel blocks)."""
    return {
        "channels": pl.BlockSpec((1, length, block), lambda i, j: (i, 0, j)),
        "states": pl.BlockSpec((1, length, states), lambda i, j: (i, 0, 0)),
        "tokens": pl.BlockSpec((1, length), lambda i, j: (i, 0)),
        "a": pl.BlockSpec((states, block), lambda i, j: (0, j)),
        "d": pl.BlockSpec((block,), lambda i, j: (j,)),
        "h": pl.BlockSpec((1, states, block), lambda i, j: (i, 0, j)),
    }


def _boundaries(count: int, states: int, block: int):
    return pl.BlockSpec((1, count, states, block), lambda i, j: (i, 0, 0, j))


def _exp2(x: jax.Array, interpret: bool) -> jax.Array:
    """2**x in one instruction, to 2 units in the last place; subnormal results are 0."""
    if interpret:
        return jnp.exp2(x)
    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    asm = dict(constraints="=f,f", pack=1, result_shape_dtypes=[out])
    return triton.elementwise_inline_asm("ex2.approx.ftz.f32 $0, $1;", args=[x], **asm)[0]


def _call(kernel, grid, in_specs, out_specs, out_shape, interpret: bool):
    return pl.pallas_call(
        kernel,
        out_shape=out_shape,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        compiler_params=None if interpret else triton.CompilerParams(num_warps=WARPS),
        interpret=interpret,
    )


def _forward_kernel(
    x_ref, dt_ref, a_ref, b_ref, c_ref, d_ref, forget_ref, h0_ref, y_ref, boundaries_ref, h_ref,
    *, chunk, tile, interpret,
):  # fmt: skip
    states, length = range(a_ref.shape[0]), x_ref.shape[1]
    a, d = [a_ref[n] * LOG2_E for n in states], d_ref[...]

    def load(first):
        return [(dt_ref[0, first + k], x_ref[0, first + k]) for k in range(tile)]

    def one_tile(first, carry):
        h, inputs = carry
        # What comes next is on its way while this tile is worked on.
        following = load(jnp.minimum(first + tile, length - tile))
        ys = []
        for k, (dt, x) in enumerate(inputs):
            at, u, y = first + k, dt * x, d * x
            forget = forget_ref[0, at]
            new = []
            for n in states:
                decay = _exp2(dt * a[n] + forget, interpret)
                new.append(decay * h[n] + u * b_ref[0, at, n])
                y = y + new[n] * c_ref[0, at, n]
            h = new
            ys.append(y)
        for k, y in enumerate(ys):
            y_ref[0, first + k] = y
        return h, following

    def one_chunk(i, carry):
        for n in states:
            boundaries_ref[0, i, n] = carry[0][n]
        tiles = chunk // tile
        return jax.lax.fori_loop(
            0, tiles, lambda j, carry: one_tile(i * chunk + j * tile, carry), carry
        )

    start = ([h0_ref[0, n] for n in states], load(0))
    h, _ = jax.lax.fori_loop(0, length // chunk, one_chunk, start)
    for n in states:
        h_ref[0, n] = h[n]


def forward(x, dt, a, b, c, d, keep, h0, chunk: int, interpret: bool):
    """y [B, L, D], states at the chunks' beginnings [B, L / chunk, N, D], last state [B, D, N].

    L is a multiple of `chunk`, D a multiple of BLOCK, or below it and a power of 2.
    """
    batch, length, width = x.shape
    states, block = a.shape[1], min(BLOCK, width)
    specs, chunks = _specs(length, block, states), length // chunk
    kernel = functools.partial(
        _forward_kernel, chunk=chunk, tile=math.gcd(chunk, FORWARD_TILE), interpret=interpret
    )
    f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    names = ("channels", "channels", "a", "states", "states", "d", "tokens", "h")
    y, boundaries, h = _call(
        kernel,
        (batch, width // block),
        [specs[name] for name in names],
        (specs["channels"], _boundaries(chunks, states, block), specs["h"]),
        (f32(x.shape), f32((batch, chunks, states, width)), f32((batch, states, width))),
        interpret,
    )(x, dt, a.T, b, c, d, (1.0 - keep) * NEVER, jnp.swapaxes(h0, 1, 2))
    return y, boundaries, jnp.swapaxes(h, 1, 2)


def _backward_kernel(
    x_ref, dt_ref, a_ref, b_ref, c_ref, d_ref, forget_ref, boundaries_ref, gy_ref, gh_ref,
    gx_ref, gdt_ref, ga_ref, gb_ref, gc_ref, gd_ref, gh0_ref, before_ref,
    *, chunk, tile, interpret,
):  # fmt: skip
    states, tiles = range(a_ref.shape[0]), chunk // tile
    chunks = x_ref.shape[1] // chunk
    a, d = [a_ref[n] * LOG2_E for n in states], d_ref[...]

    def token(h, at):
        """The state after a token, and the decays to it."""
        dt, forget = dt_ref[0, at], forget_ref[0, at]
        u = dt * x_ref[0, at]
        decays = [_exp2(dt * a[n] + forget, interpret) for n in states]
        return [decays[n] * h[n] + u * b_ref[0, at, n] for n in states], decays

    def one_chunk(i, carry):
        first = (chunks - 1 - i) * chunk

        def recompute(j, h):
            for n in states:
                before_ref[0, j, n] = h[n]
            for k in range(tile):
                h, _ = token(h, first + j * tile + k)
            return h

        start = [boundaries_ref[0, chunks - 1 - i, n] for n in states]
        jax.lax.fori_loop(0, tiles, recompute, start)
        if not interpret:
            triton.debug_barrier()  # the loop below reads what the one above has written

        def one_tile(j, carry):
            gh, ga, gd = carry
            j = tiles - 1 - j
            h, seen = [before_ref[0, j, n] for n in states], []
            for k in range(tile):
                after, decays = token(h, first + j * tile + k)
                seen.append((h, after, decays))
                h = after
            for k in reversed(range(tile)):
                at = first + j * tile + k
                before, after, decays = seen[k]
                dt, x, gy = dt_ref[0, at], x_ref[0, at], gy_ref[0, at]
                u, g_input, g_dt = dt * x, 0.0, 0.0
                gh, ga = list(gh), list(ga)
                for n in states:
                    gc_ref[0, 0, at, n] = jnp.sum(after[n] * gy)
                    g = gh[n] + gy * c_ref[0, at, n]
                    gb_ref[0, 0, at, n] = jnp.sum(g * u)
                    g_input = g_input + g * b_ref[0, at, n]
                    gh[n] = g * decays[n]
                    g_exponent = gh[n] * before[n]  # of dt * a
                    ga[n] = ga[n] + g_exponent * dt
                    g_dt = g_dt + g_exponent * a[n]
                gdt_ref[0, at] = g_dt / LOG2_E + g_input * x
                gx_ref[0, at] = g_input * dt + gy * d
                gd = gd + gy * x
            return gh, ga, gd

        return jax.lax.fori_loop(0, tiles, one_tile, carry)

    start = ([gh_ref[0, n] for n in states], [jnp.zeros_like(d) for _ in states], jnp.zeros_like(d))
    gh, ga, gd_ref[0] = jax.lax.fori_loop(0, chunks, one_chunk, start)
    for n in states:
        gh0_ref[0, n], ga_ref[0, n] = gh[n], ga[n]


def backward(x, dt, a, b, c, d, keep, boundaries, gy, gh, chunk: int, interpret: bool):
    """Gradients of x, dt, a, b, c, d and the first state."""
    batch, length, width = x.shape
    states, block = a.shape[1], min(BLOCK, width)
    tile = math.gcd(chunk, BACKWARD_TILE)
    specs, programs = _specs(length, block, states), width // block
    kernel = functools.partial(_backward_kernel, chunk=chunk, tile=tile, interpret=interpret)
    f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    # Each program's share of the gradients of b and c; and every TILE-th state of a chunk.
    share = pl.BlockSpec((1, 1, length, states), lambda i, j: (i, j, 0, 0))
    names = ("channels", "channels", "a", "states", "states", "d", "tokens")
    gx, gdt, ga, gb, gc, gd, gh0, _ = _call(
        kernel,
        (batch, programs),
        [
            *(specs[name] for name in names),
            _boundaries(length // chunk, states, block),
            specs["channels"],
            specs["h"],
        ],
        (
            *(specs[name] for name in ("channels", "channels", "h")),
            share,
            share,
            pl.BlockSpec((1, block), lambda i, j: (i, j)),
            specs["h"],
            _boundaries(chunk // tile, states, block),
        ),
        (
            f32(x.shape),
            f32(x.shape),
            f32((batch, states, width)),
            f32((batch, programs, length, states)),
            f32((batch, programs, length, states)),
            f32((batch, width)),
            f32((batch, states, width)),
            f32((batch, chunk // tile, states, width)),
        ),
        interpret,
    )(x, dt, a.T, b, c, d, (1.0 - keep) * NEVER, boundaries, gy, jnp.swapaxes(gh, 1, 2))
    ga, gd = jnp.sum(ga, axis=0).T, jnp.sum(gd, axis=0)
    gb, gc = jnp.sum(gb, axis=1), jnp.sum(gc, axis=1)
    return gx, gdt, ga, gb, gc, gd, jnp.swapaxes(gh0, 1, 2)
