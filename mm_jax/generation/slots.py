"""The running batch on the devices: its arrays, and the jitted functions that change them.

When which prompt enters is decided by engine.py.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mm_jax.generation.sampler import Decoding, fold_each, row_keys, sample_token
from mm_jax.models.decoder import Cache, Decoder
from mm_jax.models.sharding import batch_parallelism, batch_sharding
from mm_jax.ops.attention import OwnCache, heads_first
from mm_jax.ops.log_probs import project_logits
from mm_jax.ops.partition import BATCH_AXES


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How tokens are drawn: see `sampler.sample_token` and `sampler.generate`."""

    stop_ids: tuple[int, ...]
    pad_id: int
    max_new_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0


class Block(NamedTuple):
    """Holds prompts that were read, with the first token of every continuation: B rows of T."""

    prefix: Cache  # per layer: k [B, K, H, T], v [B, K, T, H]; mask bool[B, T]
    keys: jax.Array  # [B, G]
    token: jax.Array  # int32[B, G]
    logp: jax.Array  # float32[B, G]
    manner: jax.Array | None  # float32[B, 2]: temperature, top_p; None: those of `Drawing`


class Slots(NamedTuple):
    """Holds the running batch: S slots with prompts of up to P tokens, G continuations of up to R.

    count: tokens that the slot's continuations have; done: which have ended by a stop token.
    """

    prefix: Cache  # per layer: k [S, K, H, P], v [S, K, P, H]; mask bool[S, P]
    own: tuple[OwnCache, ...]
    keys: jax.Array  # [S, G]
    token: jax.Array  # int32[S, G], the newest
    count: jax.Array  # int32[S]
    done: jax.Array  # bool[S, G]
    lengths: jax.Array  # int32[S, G]
    tokens: jax.Array  # int32[S, G, R]
    logps: jax.Array  # float32[S, G, R]
    manner: jax.Array | None  # float32[S, 2]


class SlotPrograms:
    """Jits what is done with slots that are spread over a mesh (arguments as in `engine.Engine`).

    * read(at, key, seeds, manner) -> Block
    * empty(block, count=, length=) -> Slots without a request
    * insert(slots, block, rows, places, count) -> Slots; consumes the old ones
    * resize(slots, places, length=) -> Slots
    * decode(params, slots, limits) -> Slots after up to `steps` tokens; consumes the old ones
    """

    def __init__(
        self,
        model: Callable[[Any], Decoder],
        mesh: Mesh,
        drawing: Drawing,
        kv_heads: int,
        group: int,
        steps: int,
    ):
        self.model, self.mesh, self.drawing = model, mesh, drawing
        self.group, self.steps, self.ways = group, steps, batch_parallelism(mesh)
        rows = batch_sharding(mesh)
        split = kv_heads % mesh.shape["tensor"] == 0
        heads = NamedSharding(mesh, PartitionSpec(BATCH_AXES, "tensor" if split else None))
        prefix = Cache(heads, heads, rows)
        self.block_shardings = Block(prefix, *[rows] * 4)
        self.slot_shardings = slots = Slots(prefix, heads, *[rows] * 8)
        self.read = jax.jit(self._read_block, out_shardings=self.block_shardings)
        self.empty = jax.jit(
            self._empty_slots, static_argnames=("count", "length"), out_shardings=slots
        )
        self.insert = jax.jit(self._insert_rows, donate_argnums=0, out_shardings=slots)
        self.resize = jax.jit(self._resized, static_argnames="length", out_shardings=slots)
        self.decode = jax.jit(self._decode, donate_argnums=1, out_shardings=slots)

    def abstract_arguments(self, at: Decoding, count: int) -> tuple[Slots, Block, jax.Array]:
        """Returns the shapes of (`count` slots, a block, limits) for prompts that were
        read; `decode` takes (params, slots, limits)."""
        rows, length = at.cache.mask.shape
        seeds = jax.ShapeDtypeStruct((rows, self.group), jnp.uint32)
        block = jax.eval_shape(self.read, at, jax.random.key(0), seeds)
        slots = jax.eval_shape(
            functools.partial(self._empty_slots, count=count, length=length), block
        )

        def placed(tree, shardings):
            whole = jax.tree.broadcast(shardings, tree)
            struct = lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s)  # noqa: E731
            return jax.tree.map(struct, tree, whole)

        limits = jax.ShapeDtypeStruct((count,), jnp.int32)
        return (
            placed(slots, self.slot_shardings),
            placed(block, self.block_shardings),
            placed(limits, batch_sharding(self.mesh)),
        )

    def _read_block(self, at: Decoding, key: jax.Array, seeds: jax.Array, manner=None) -> Block:
        """Lays caches out as the products of every step read them, keys transposed, and draws the
        first tokens."""
        keys = row_keys(key, seeds)
        prefix = Cache(
            tuple(jnp.swapaxes(heads_first(k), -1, -2) for k in at.cache.k),
            tuple(map(heads_first, at.cache.v)),
            at.cache.mask,
        )
        logits = jnp.broadcast_to(at.logits[:, None], (*keys.shape, at.logits.shape[-1]))
        return Block(prefix, keys, *self._drawn(fold_each(keys, 0), logits, manner), manner)

    def _drawn(self, keys: jax.Array, logits: jax.Array, manner: jax.Array | None):
        """Samples a token of each of the G continuations: keys [S, G], logits [S, G, V]."""
        d = self.drawing
        temperature, top_p = d.temperature, d.top_p
        if manner is not None:
            temperature, top_p = (jnp.broadcast_to(x[:, None], keys.shape) for x in manner.T)
        return sample_token(keys, logits, temperature, d.top_k, top_p)

    def _empty_slots(self, block: Block, *, count: int, length: int) -> Slots:
        shape, most = (count, self.group), self.drawing.max_new_tokens
        zeros = lambda a, *axes: jnp.zeros((count, *axes), a.dtype)  # noqa: E731
        k = tuple(zeros(a, *a.shape[1:3], length) for a in block.prefix.k)
        v = tuple(zeros(a, a.shape[1], length, a.shape[3]) for a in block.prefix.v)
        own = tuple(
            OwnCache(
                zeros(a, a.shape[1], self.group, a.shape[2], most),
                zeros(a, a.shape[1], self.group, most, a.shape[2]),
            )
            for a in block.prefix.k
        )
        return Slots(
            Cache(k, v, jnp.zeros((count, length), bool)),
            own,
            jnp.broadcast_to(block.keys[:1], shape),
            jnp.zeros(shape, jnp.int32),
            jnp.zeros(count, jnp.int32),
            jnp.ones(shape, bool),
            jnp.zeros(shape, jnp.int32),
            jnp.zeros((*shape, most), jnp.int32),
            jnp.zeros((*shape, most), jnp.float32),
            None if block.manner is None else jnp.zeros((count, 2), jnp.float32),
        )

    def _insert_rows(self, slots: Slots, block: Block, rows, places, count) -> Slots:
        """Copies rows of a block into slots.

        rows, places int32[W, N]: where from and where to, of each of the W devices' own rows and
        slots; a place beyond the last slot drops its row. Only the first `count` are looked at.
        """
        pad, stop = self.drawing.pad_id, jnp.asarray(self.drawing.stop_ids, jnp.int32)
        most = self.drawing.max_new_tokens
        width = slots.prefix.mask.shape[1] - block.prefix.mask.shape[1]
        first = lambda x, empty: jnp.pad(  # noqa: E731
            x[..., None], ((0, 0), (0, 0), (0, most - 1)), constant_values=empty
        )
        done = jnp.isin(block.token, stop)
        mask = jnp.pad(block.prefix.mask, ((0, 0), (0, width)))
        ones = jnp.ones(block.token.shape, jnp.int32)
        new = (
            (block.prefix.k, block.prefix.v, mask),
            block.keys,
            block.token,
            ones[:, 0],
            done,
            ones,
            first(block.token, pad),
            first(block.logp, 0.0),
            block.manner,
        )
        old = (tuple(slots.prefix), *slots[2:])
        apart = lambda x: x.reshape(self.ways, -1, *x.shape[1:])  # noqa: E731
        joined = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
        old, new = jax.tree.map(apart, (old, new))

        def put(place, row, into, source):
            # A masked value still takes part in sums, times 0: nothing may stay that is not finite.
            widths = [(0, n - m) for n, m in zip(into.shape[1:], source.shape[1:], strict=True)]
            whole = (
                jnp.pad(source[row], widths) if into.shape[1:] != source.shape[1:] else source[row]
            )
            return into.at[place].set(whole, mode="drop")

        def blank(place, own):
            return own.at[place].set(0, mode="drop")

        def body(i, carry):
            old, own = carry
            place, row = places[:, i], rows[:, i]
            old = jax.tree.map(functools.partial(jax.vmap(put), place, row), old, new)
            return old, jax.tree.map(functools.partial(jax.vmap(blank), place), own)

        # One row at a time: a scatter of all rows would also read and write those it drops.
        start = (old, jax.tree.map(apart, slots.own))
        old, own = jax.lax.fori_loop(0, count, body, start)
        prefix, *rest = jax.tree.map(joined, old)
        return Slots(Cache(*prefix), jax.tree.map(joined, own), *rest)

    def _resized(self, slots: Slots, places: jax.Array, *, length: int) -> Slots:
        """Takes the slots `places` int32[W, N], of each device's own, with prompts of `length`."""

        def taken(x):
            x = x.reshape(self.ways, -1, *x.shape[1:])
            return jax.vmap(lambda own, at: own[at])(x, places).reshape(-1, *x.shape[2:])

        def long(x, axis):
            width = length - x.shape[axis]
            if width <= 0:
                return jax.lax.slice_in_dim(x, 0, length, axis=axis)
            return jnp.pad(x, [(0, width if i == axis else 0) for i in range(x.ndim)])

        k, v, mask = slots.prefix
        prefix = Cache(
            tuple(long(taken(x), 3) for x in k),
            tuple(long(taken(x), 2) for x in v),
            long(taken(mask), 1),
        )
        return Slots(prefix, *jax.tree.map(taken, slots[1:]))

    def _decode(self, params, slots: Slots, limits: jax.Array) -> Slots:
        """Decodes up to `steps` tokens in every slot that has fewer than its limit."""
        d, lm, prefix = self.drawing, self.model(params), slots.prefix
        stop = jnp.asarray(d.stop_ids, jnp.int32)
        kernel = lm.head_kernel()
        lm.unstack()

        def active(s: Slots):
            return (s.count < limits) & ~jnp.all(s.done, axis=1)

        def cond(carry):
            i, s = carry
            return (i < self.steps) & jnp.any(active(s))

        def body(carry):
            i, s = carry
            goes = active(s)
            # Slots that rest decode in vain, at a place of theirs that nothing reads.
            at = jnp.clip(s.count, 1, d.max_new_tokens - 1) if d.max_new_tokens > 1 else s.count * 0
            hidden, own = lm.decode(s.token, prefix, s.own, jnp.maximum(at - 1, 0))
            logits = project_logits(hidden, kernel, lm.config.vocab_padding)
            keys = jax.vmap(fold_each)(s.keys, at)
            token, logp = self._drawn(keys, logits, s.manner)
            going = goes[:, None] & ~s.done

            def write(old, new, empty):
                def one(old, new, done, goes, i):
                    return old.at[:, i].set(jnp.where(goes, jnp.where(done, empty, new), old[:, i]))

                # Row by row, so that no device waits for another.
                return jax.vmap(one)(old, new, s.done, goes, at)

            return i + 1, s._replace(
                own=own,
                token=jnp.where(goes[:, None], token, s.token),
                count=s.count + goes,
                done=s.done | (going & jnp.isin(token, stop)),
                lengths=s.lengths + going,
                tokens=write(s.tokens, token, d.pad_id),
                logps=write(s.logps, logp, 0.0),
            )

        slots = slots._replace(prefix=None)
        _, slots = jax.lax.while_loop(cond, body, (jnp.int32(0), slots))
        return slots._replace(prefix=prefix)
