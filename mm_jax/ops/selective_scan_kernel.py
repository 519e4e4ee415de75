"""GPU kernels of the selective scan (Pallas, Triton backend), forward and backward.

A program handles one row of the batch, BLOCK channels and one segment of the sequence. It keeps
its states [BLOCK, N] in registers and walks along the segment, so that x, dt, B, C and y pass
through memory once. If rows and channels alone would leave most of the device idle, the sequence is
cut into several segments. Their initial states come from a first pass, which finds for every
segment what it adds to a state and the factor by which a state decays. (The pass over gradients
runs backwards and is cut in the same way.)

The forward pass stores the state at the beginning of every chunk; from it the backward pass
recomputes the states, one tile of tokens at a time. The gradients of B and C are sums over the
channels of a program; XLA then adds them up over programs.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

# Channels per program, which is one warp. Vectors shorter than a warp are loaded in the layout that
# the tiles need; longer ones would go through shared memory.
BLOCK = 16
CHUNK = 16  # tokens per stored state
FORWARD_TILE, BACKWARD_TILE = 8, 4  # tokens that are unrolled
# Segments are doubled until the grid has this many programs, or until they would be shorter than
# this many tokens.
PROGRAMS, SHORTEST = 1024, 64
LOG2_E = math.log2(math.e)  # exp(x) = 2**(x * LOG2_E); multiplied into `a` once per program
NEVER = -1e30  # added to an exponent, it makes the decay 0: the state before is forgotten


def segments(batch: int, length: int, width: int) -> int:
    """Returns into how many segments, a power of 2, a sequence should be cut."""
    count = 1
    while batch * -(-width // BLOCK) * count < PROGRAMS and length >= 2 * count * SHORTEST:
        count *= 2
    return count


def _segments(batch: int, length: int, width: int, chunk: int) -> int:
    """Returns the number of segments that cuts a sequence between whole chunks."""
    count = segments(batch, length, width)
    while length % (chunk * count):
        count //= 2
    return count


def _specs(length: int, block: int, states: int, chunks: int):
    """Returns block specifications by name, for a grid (row, channel block, segment)."""
    return {
        "channels": pl.BlockSpec((1, length, block), lambda i, j, s: (i, s, j)),
        "states": pl.BlockSpec((1, length, states), lambda i, j, s: (i, s, 0)),
        "tokens": pl.BlockSpec((1, length), lambda i, j, s: (i, s)),
        "a": pl.BlockSpec((block, states), lambda i, j, s: (j, 0)),
        "d": pl.BlockSpec((block,), lambda i, j, s: (j,)),
        "h": pl.BlockSpec((1, 1, block, states), lambda i, j, s: (i, s, j, 0)),
        "boundaries": pl.BlockSpec((1, chunks, block, states), lambda i, j, s: (i, s, j, 0)),
    }


def _exp2(x: jax.Array, interpret: bool) -> jax.Array:
    """Computes 2**x in one instruction, to 2 units in the last place; subnormal results are 0."""
    if interpret:
        return jnp.exp2(x)
    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    asm = dict(constraints="=f,f", pack=1, result_shape_dtypes=[out])
    return triton.elementwise_inline_asm("ex2.approx.ftz.f32 $0, $1;", args=[x], **asm)[0]


def _call(kernel, grid, in_specs, out_specs, out_shape, interpret: bool):
    return pl.pallas_call(
        functools.partial(kernel, exp2=functools.partial(_exp2, interpret=interpret)),
        out_shape=out_shape,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        compiler_params=None if interpret else triton.CompilerParams(num_warps=1),
        interpret=interpret,
    )


def _loads(refs, tile: int, reverse: bool = False):
    """Returns a function that loads a tile: first token -> [(each ref at the token), ...]."""
    ks = range(tile)[::-1] if reverse else range(tile)
    return lambda first: [tuple(ref[0, first + k] for ref in refs) for k in ks]


def _along(length: int, tile: int, loads, body, carry, reverse: bool = False):
    """Runs `carry = body(i, loaded, carry)` over tiles; each is loaded one iteration ahead."""
    last = length // tile - 1
    at = lambda i: last - i if reverse else i  # noqa: E731

    def step(i, both):
        carry, loaded = both
        following = loads(at(jnp.minimum(i + 1, last)) * tile)
        return body(at(i), loaded, carry), following

    return jax.lax.fori_loop(0, last + 1, step, (carry, loads(at(0) * tile)))[0]


def _state_kernel(
    x_ref, dt_ref, a_ref, b_ref, forget_ref, added_ref, decay_ref, *, tile, exp2
):  # fmt: skip
    """Finds what a segment adds to a state, and the factor by which it multiplies a state."""
    a, refs = a_ref[...] * LOG2_E, (dt_ref, x_ref, b_ref, forget_ref)

    def body(_, loaded, carry):
        h, total, forgotten = carry
        for dt, x, b, forget in loaded:
            h = exp2(dt[:, None] * a + forget) * h + (dt * x)[:, None] * b[None]
            total, forgotten = total + dt, forgotten + forget
        return h, total, forgotten

    start = (jnp.zeros_like(a), jnp.zeros(a.shape[:1], a.dtype), jnp.zeros((), a.dtype))
    # The product of a segment's decays is one exponential of the sum of its dt.
    h, total, forgotten = _along(x_ref.shape[1], tile, _loads(refs, tile), body, start)
    added_ref[0, 0] = h
    decay_ref[0, 0] = exp2(total[:, None] * a + forgotten)


def _forward_kernel(
    x_ref, dt_ref, a_ref, b_ref, c_ref, d_ref, forget_ref, h0_ref, y_ref, h_ref, *boundaries,
    chunk, tile, exp2,
):  # fmt: skip
    a, d, refs = a_ref[...] * LOG2_E, d_ref[...], (dt_ref, x_ref, b_ref, c_ref, forget_ref)

    def body(i, loaded, h):
        for boundaries_ref in boundaries:

            @pl.when(jax.lax.rem(i, chunk // tile) == 0)
            def _():
                boundaries_ref[0, jax.lax.div(i, chunk // tile)] = h  # noqa: B023

        ys = []
        for dt, x, b, c, forget in loaded:
            h = exp2(dt[:, None] * a + forget) * h + (dt * x)[:, None] * b[None]
            ys.append(jnp.sum(h * c[None], axis=1) + d * x)
        for k, y in enumerate(ys):
            y_ref[0, i * tile + k] = y
        return h

    h_ref[0, 0] = _along(x_ref.shape[1], tile, _loads(refs, tile), body, h0_ref[0, 0])


def forward(x, dt, a, b, c, d, keep, h0, chunk: int, interpret: bool, store: bool = True):
    """Returns y [B, L, D], the last state [B, D, N] and, with `store`, the states at the beginnings
    of chunks [B, L / chunk, D, N].

    L is a multiple of `chunk`; D is a multiple of BLOCK, or a power of 2 below it; N is a power of
    2.
    """
    batch, length, width = x.shape
    states, block, chunks = a.shape[1], min(BLOCK, width), length // chunk
    count = _segments(batch, length, width, chunk)
    forget, tile = (1.0 - keep) * NEVER, math.gcd(chunk, FORWARD_TILE)
    specs = _specs(length // count, block, states, chunks // count)
    f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    starts = h0[:, None]
    if count > 1:
        names = ("channels", "channels", "a", "states", "tokens")
        out = f32((batch, count - 1, width, states))
        added, decay = _call(
            functools.partial(_state_kernel, tile=tile),
            (batch, width // block, count - 1),
            [specs[name] for name in names],
            (specs["h"], specs["h"]),
            (out, out),
            interpret,
        )(x, dt, a, b, forget)
        starts = [h0]
        for s in range(count - 1):
            starts.append(decay[:, s] * starts[-1] + added[:, s])
        starts = jnp.stack(starts, axis=1)
    names = ("channels", "channels", "a", "states", "states", "d", "tokens", "h")
    y, h, *boundaries = _call(
        functools.partial(_forward_kernel, chunk=chunk, tile=tile),
        (batch, width // block, count),
        [specs[name] for name in names],
        [specs[name] for name in ("channels", "h", "boundaries")[: 2 + store]],
        [
            f32(x.shape),
            f32((batch, count, width, states)),
            f32((batch, chunks, width, states)),
        ][: 2 + store],
        interpret,
    )(x, dt, a, b, c, d, forget, starts)
    return y, h[:, -1], *boundaries


def _adjoint_kernel(dt_ref, a_ref, c_ref, forget_ref, gy_ref, added_ref, decay_ref, *, tile, exp2):
    """Finds what a segment adds to the gradient of a state, and the factor it multiplies it by."""
    a, refs = a_ref[...] * LOG2_E, (dt_ref, gy_ref, c_ref, forget_ref)

    def body(_, loaded, carry):
        gh, total, forgotten = carry
        for dt, gy, c, forget in loaded:
            gh = exp2(dt[:, None] * a + forget) * (gh + gy[:, None] * c[None])
            total, forgotten = total + dt, forgotten + forget
        return gh, total, forgotten

    start = (jnp.zeros_like(a), jnp.zeros(a.shape[:1], a.dtype), jnp.zeros((), a.dtype))
    loads = _loads(refs, tile, reverse=True)
    gh, total, forgotten = _along(dt_ref.shape[1], tile, loads, body, start, reverse=True)
    added_ref[0, 0] = gh
    decay_ref[0, 0] = exp2(total[:, None] * a + forgotten)


def _backward_kernel(
    x_ref, dt_ref, a_ref, b_ref, c_ref, d_ref, forget_ref, boundaries_ref, gy_ref, gh_ref,
    gx_ref, gdt_ref, ga_ref, gb_ref, gc_ref, gd_ref, gh0_ref,
    *, chunk, tile, exp2,
):  # fmt: skip
    a, d = a_ref[...] * LOG2_E, d_ref[...]
    chunks, tiles = x_ref.shape[1] // chunk, chunk // tile

    loads = _loads((dt_ref, x_ref, b_ref, forget_ref, c_ref, gy_ref), tile)

    def one_chunk(i, carry):
        i = chunks - 1 - i
        first = i * chunk

        def recompute(j, h):
            for dt, x, b, forget, *_ in loads(first + j * tile):
                h = exp2(dt[:, None] * a + forget) * h + (dt * x)[:, None] * b[None]
            return h

        def back(j, carry):
            j = tiles - 1 - j
            gh, ga, gd = carry
            loaded, seen = loads(first + j * tile), []
            # From the chunk's beginning for every tile: registers hold the states of one tile only.
            h = jax.lax.fori_loop(0, j, recompute, boundaries_ref[0, i])
            for dt, x, b, forget, *_ in loaded:
                decay = exp2(dt[:, None] * a + forget)
                after = decay * h + (dt * x)[:, None] * b[None]
                seen.append((h, after, decay))
                h = after
            for k in reversed(range(tile)):
                t = first + j * tile + k
                before, after, decay = seen[k]
                dt, x, b, _, c, gy = loaded[k]
                gc_ref[0, 0, t] = jnp.sum(after * gy[:, None], axis=0)
                g = gh + gy[:, None] * c[None]
                gb_ref[0, 0, t] = jnp.sum(g * (dt * x)[:, None], axis=0)
                g_input = jnp.sum(g * b[None], axis=1)
                gh = g * decay
                g_exponent = gh * before  # of dt * a
                ga = ga + g_exponent * dt[:, None]
                # `a` carries LOG2_E here, which is no part of the gradient.
                gdt_ref[0, t] = jnp.sum(g_exponent * a, axis=1) / LOG2_E + g_input * x
                gx_ref[0, t] = g_input * dt + gy * d
                gd = gd + gy * x
            return gh, ga, gd

        return jax.lax.fori_loop(0, tiles, back, carry)

    start = (gh_ref[0, 0], jnp.zeros_like(a), jnp.zeros_like(d))
    gh0_ref[0, 0], ga_ref[0, 0], gd_ref[0, 0] = jax.lax.fori_loop(0, chunks, one_chunk, start)


def backward(x, dt, a, b, c, d, keep, boundaries, gy, gh, chunk: int, interpret: bool):
    """Returns the gradients of x, dt, a, b, c, d and the first state."""
    batch, length, width = x.shape
    states, block, chunks = a.shape[1], min(BLOCK, width), length // chunk
    count = _segments(batch, length, width, chunk)
    forget, tile = (1.0 - keep) * NEVER, math.gcd(chunk, BACKWARD_TILE)
    specs, programs = _specs(length // count, block, states, chunks // count), width // block
    f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    starts = gh[:, None]
    if count > 1:
        later = {
            name: pl.BlockSpec(spec.block_shape, functools.partial(_next, spec.index_map))
            for name, spec in specs.items()
        }
        out = f32((batch, count - 1, width, states))
        added, decay = _call(
            functools.partial(_adjoint_kernel, tile=tile),
            (batch, programs, count - 1),
            [later[name] for name in ("channels", "a", "states", "tokens", "channels")],
            (specs["h"], specs["h"]),
            (out, out),
            interpret,
        )(dt, a, c, forget, gy)
        starts = [gh]
        for s in reversed(range(count - 1)):
            starts.append(decay[:, s] * starts[-1] + added[:, s])
        starts = jnp.stack(starts[::-1], axis=1)
    # Each program writes its own share of the gradients of b and c, so no atomic additions are
    # needed, and results do not depend on the order in which programs run.
    share = pl.BlockSpec((1, 1, length // count, states), lambda i, j, s: (i, j, s, 0))
    names = ("channels", "channels", "a", "states", "states", "d", "tokens", "boundaries")
    outs = ("channels", "channels", "h")
    gx, gdt, ga, gb, gc, gd, gh0 = _call(
        functools.partial(_backward_kernel, chunk=chunk, tile=tile),
        (batch, programs, count),
        [specs[name] for name in (*names, "channels", "h")],
        (
            *(specs[name] for name in outs),
            share,
            share,
            pl.BlockSpec((1, 1, block), lambda i, j, s: (i, s, j)),
            specs["h"],
        ),
        (
            f32(x.shape),
            f32(x.shape),
            f32((batch, count, width, states)),
            f32((batch, programs, length, states)),
            f32((batch, programs, length, states)),
            f32((batch, count, width)),
            f32((batch, count, width, states)),
        ),
        interpret,
    )(x, dt, a, b, c, d, forget, boundaries, gy, starts)
    ga, gd = jnp.sum(ga, axis=(0, 1)), jnp.sum(gd, axis=(0, 1))
    return gx, gdt, ga, jnp.sum(gb, axis=1), jnp.sum(gc, axis=1), gd, gh0[:, 0]


def _next(index_map, i, j, s):
    return index_map(i, j, s + 1)
