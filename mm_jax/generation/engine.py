"""Continuous batching: prompts enter and leave a running batch of slots on the devices.

A slot holds one prompt with its G continuations. Every step decodes a few tokens in all slots;
slots whose continuations have ended take the next prompt, so that no slot waits for the longest
answer of a batch. What a prompt is answered with follows from its own seeds and positions alone, as
in `sampler.generate`: not from its slot, its neighbours, or when it came.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from mm_jax.generation.sampler import Decoding
from mm_jax.generation.slots import Block, Drawing, SlotPrograms, Slots
from mm_jax.models.abstract import AbstractModel
from mm_jax.models.decoder import Decoder
from mm_jax.models.sharding import (
    OnMesh,
    batch_parallelism,
    fetch,
    param_shardings,
    put_whole_batch,
)


@dataclasses.dataclass(frozen=True)
class Request:
    """Asks for the continuations of a prompt.

    seeds: one number per continuation; limit: the most tokens, 0 for the engine's; deadline: when
    to stop, by `time.monotonic`; manner: temperature and top_p, for an engine that takes `each`
    request's own.
    """

    name: Hashable
    seeds: Sequence[int]
    limit: int = 0
    deadline: float | None = None
    manner: tuple[float, float] = (0.0, 1.0)


class Progress(NamedTuple):
    """Tells what a step gave a request.

    tokens, logps: each continuation's new ones; finished: "" while it decodes, then "ended" (all by
    a stop token), "length", "cancelled" or "deadline"; result: when it has finished.
    """

    name: Hashable
    tokens: tuple[np.ndarray, ...]
    logps: tuple[np.ndarray, ...]
    finished: str
    result: Result | None


class Result(NamedTuple):
    """Holds a request's continuations, as `sampler.Samples` does for a batch.

    tokens int32[G, R], logps float32[G, R], lengths int32[G], ended bool[G].
    """

    tokens: np.ndarray
    logps: np.ndarray
    lengths: np.ndarray
    ended: np.ndarray


@dataclasses.dataclass
class Waiting:
    """A block some of whose prompts still need a slot; rows: row -> its request."""

    block: Block
    rows: dict[int, Request]


@dataclasses.dataclass
class Running:
    """A request in a slot; length: places that its prompt takes; sent: tokens that were told."""

    request: Request
    length: int
    sent: int = 0


class Weights(NamedTuple):
    """Holds what an engine decodes with, for a model on a mesh: decoder(weights) -> Decoder;
    of(params) -> the weights of its language model with layers apart; its `kv_heads`."""

    decoder: Callable[[Any], Decoder]
    of: OnMesh
    kv_heads: int


def weights_of(abstract: AbstractModel) -> Weights:
    def decoder(params):
        lm = nnx.merge(abstract.graph, params).language_model
        lm.unstack()
        return lm

    graph, weights = nnx.split(nnx.eval_shape(decoder, abstract.params))
    of = jax.jit(
        lambda params: nnx.split(decoder(params))[1],
        out_shardings=param_shardings(weights, abstract.mesh),
    )
    heads = nnx.merge(graph, weights).config.num_key_value_heads
    return Weights(functools.partial(nnx.merge, graph), OnMesh(of, abstract.mesh), heads)


class Engine:
    """Decodes requests in at most `slots` slots.

    model(params) returns the decoder; its layers must be apart (`Decoder.unstack`), or every call
    copies them. longest: the most places that a prompt may take, 0 for any; group: continuations
    of a prompt; steps: tokens that one call decodes; each: draw as each request says, not as
    `drawing` does. All slots are as long as the longest prompt in
    them: prompts come padded to few lengths, and the shorter ones should come first. Slots are
    spread over the mesh's batch axes, the `kv_heads` of their caches over its tensor axis, and a
    prompt stays on the devices that read it.
    """

    def __init__(
        self,
        model: Callable[[Any], Decoder],
        mesh: Mesh,
        drawing: Drawing,
        *,
        slots: int,
        kv_heads: int,
        longest: int = 0,
        group: int = 1,
        steps: int = 4,
        each: bool = False,
    ):
        self.each = each
        self.mesh, self.drawing = mesh, drawing
        self.group, self.steps, self.longest = group, steps, longest
        self.ways = batch_parallelism(mesh)
        # Two sizes: each is a program for every length. The last prompts take the smaller one.
        most = -(-slots // self.ways)
        self.sizes = [n * self.ways for n in sorted({-(-most // 4), most})]
        self.waiting: list[Waiting] = []
        self.running: dict[int, Running] = {}
        self.slots: Slots | None = None
        self.shape = (0, 0)
        self.cancelled: set[Hashable] = set()
        self.programs = SlotPrograms(model, mesh, drawing, kv_heads, group, steps)

    @property
    def wants_more(self) -> bool:
        """Tells whether a slot is free for which no prompt waits."""
        each = self.sizes[-1] // self.ways
        taken = collections.Counter(self._way(place) for place in self.running)
        for part in self.waiting:
            taken.update(row * self.ways // len(part.block.token) for row in part.rows)
        # Two blocks wait at most, as each holds its prompts' caches.
        return len(self.waiting) < 2 and any(taken[way] < each for way in range(self.ways))

    @property
    def emptiest_way(self) -> int:
        """Returns which share of the mesh's batch axes has most free slots."""
        taken = collections.Counter(self._way(place) for place in self.running)
        for part in self.waiting:
            taken.update(row * self.ways // len(part.block.token) for row in part.rows)
        return min(range(self.ways), key=lambda way: taken[way])

    @property
    def is_idle(self) -> bool:
        return not self.running and not self.waiting

    def admit(self, at: Decoding, requests: Sequence[Request | None], seed: int | jax.Array = 0):
        """Takes prompts that were read (`sampler.prefill`); rows without a request are padding.

        They wait until slots are free. Raises ValueError for a prompt that no slot holds, before
        anything is stored.
        """
        rows, length = at.cache.mask.shape
        if not any(requests):
            return
        if jax.process_count() > 1 and any(r.deadline is not None for r in requests if r):
            raise ValueError("engine: several processes would not agree on a deadline")
        if self.longest and length > self.longest:
            raise ValueError(
                f"engine: a prompt takes {length} places, and a slot has {self.longest}"
            )
        most, names = self.drawing.max_new_tokens, {r.name for r in self.requests()}
        for request in filter(None, requests):
            if request.limit > most or request.name in names:
                raise ValueError(
                    f"engine: {request.name!r}: limit {request.limit}, expected at most {most}"
                    if request.limit > most
                    else f"engine: there is a request {request.name!r} already"
                )
            names.add(request.name)
        seeds = np.zeros((rows, self.group), np.uint32)
        manner = np.ones((rows, 2), np.float32) if self.each else None
        for row, request in enumerate(requests):
            if request is not None:
                seeds[row] = request.seeds
                if manner is not None:
                    manner[row] = request.manner
        key = jax.random.key(seed) if isinstance(seed, int) else seed
        with jax.set_mesh(self.mesh):
            placed = put_whole_batch((seeds, manner), self.mesh)
            block = self.programs.read(at, key, *placed)
        found = {row: r for row, r in enumerate(requests) if r is not None}
        self.waiting.append(Waiting(block, found))

    def cancel(self, name: Hashable) -> None:
        """Ends a request that waits or runs with the next step; what it has is its result. Several
        processes must call it alike."""
        if any(request.name == name for request in self.requests()):
            self.cancelled.add(name)

    def step(self, params: Any) -> list[Progress]:
        """Fills free slots, decodes, and tells what every request got."""
        told, reasons = [], {}
        now = time.monotonic()
        for request in list(self.requests()):
            if request.name in self.cancelled:
                reasons[request.name] = "cancelled"
            elif request.deadline is not None and now >= request.deadline:
                reasons[request.name] = "deadline"
        self.cancelled.clear()
        for part in self.waiting:
            for row, request in list(part.rows.items()):
                if request.name in reasons:
                    del part.rows[row]
                    told.append(self._never_ran(request, reasons[request.name]))
        self._drop_empty()
        with jax.set_mesh(self.mesh):
            self._fill()
            if not self.running:
                return told
            limits = np.zeros(self.shape[0], np.int32)
            for place, own in self.running.items():
                if own.request.name not in reasons:
                    limits[place] = own.request.limit or self.drawing.max_new_tokens
            if limits.any():
                on_device = put_whole_batch(limits, self.mesh)
                self.slots = self.programs.decode(params, self.slots, on_device)
            s = self.slots
            parts = fetch((s.count, s.done, s.lengths, s.tokens, s.logps))
        for place, own in list(self.running.items()):
            told.append(self._progress(place, own, limits[place], reasons, parts))
        return told

    def run(self, params: Any, blocks: Iterable[tuple]) -> Iterator[list[Progress]]:
        """Decodes blocks of (arguments of `admit`), each read when a slot is free for it; yields
        what every step told."""
        source: Iterator | None = iter(blocks)
        try:
            while source is not None or not self.is_idle:
                while source is not None and self.wants_more:
                    block = next(source, None)
                    if block is None:
                        source = None
                    else:
                        self.admit(*block)
                    del block  # its caches are laid out anew
                yield self.step(params)
        finally:  # their memory is others' now, and after an error they are of no use
            self.clear()

    def clear(self) -> None:
        """Forgets all requests, and gives their memory back."""
        self.waiting, self.running = [], {}
        self.cancelled.clear()
        self.slots, self.shape = None, (0, 0)

    def finished(self, params: Any, blocks: Iterable[tuple]) -> Iterator[Progress]:
        """Yields every request of `run` once it has finished."""
        for told in self.run(params, blocks):
            yield from (progress for progress in told if progress.finished)

    def requests(self) -> Iterator[Request]:
        yield from (own.request for own in self.running.values())
        for part in self.waiting:
            yield from part.rows.values()

    def _way(self, place: int) -> int:
        return place * self.ways // self.shape[0]

    def _never_ran(self, request: Request, reason: str) -> Progress:
        d, group = self.drawing, self.group
        tokens = np.full((group, d.max_new_tokens), d.pad_id, np.int32)
        counts = np.zeros(group, np.int32)
        result = Result(tokens, np.zeros(tokens.shape, np.float32), counts, counts > 0)
        none = (tokens[0, :0],) * group, (result.logps[0, :0],) * group
        return Progress(request.name, *none, reason, result)

    def _progress(self, place: int, own: Running, limit: int, reasons, parts) -> Progress:
        count, done, lengths, tokens, logps = (x[place] for x in parts)
        new = [
            tuple(x[g, own.sent : lengths[g]].copy() for g in range(self.group))
            for x in (tokens, logps)
        ]
        own.sent = int(count)
        finished = reasons.get(own.request.name, "")
        if not finished and done.all():
            finished = "ended"
        elif not finished and count >= limit:
            finished = "length"
        if not finished:
            return Progress(own.request.name, *new, "", None)
        del self.running[place]
        # Copies: else a view would hold the whole batch.
        result = Result(*(np.array(x) for x in (tokens, logps, lengths, done)))
        return Progress(own.request.name, *new, finished, result)

    def _fill(self) -> None:
        """Gives waiting prompts slots; changes the batch's size where it must, or can."""
        each = self.sizes[-1] // self.ways
        used = collections.Counter(self._way(place) for place in self.running)
        moves: list[tuple[Waiting, dict[int, int]]] = []  # row -> way
        for part in self.waiting:
            count, own = len(part.block.token), {}
            for row in sorted(part.rows):
                way = row * self.ways // count
                if used[way] < each:
                    used[way] += 1
                    own[row] = way
            moves.append((part, own))
        need = max(used.values(), default=0) * self.ways
        if not need:
            return
        entering = [part.block.prefix.mask.shape[1] for part, own in moves if own]
        size = next(n for n in self.sizes if n >= need)
        length = max(entering, default=0)
        if self.running:
            # Shrunk only when nothing waits: it takes a copy.
            size = max(size, self.shape[0]) if self.waiting else size
            length = max(length, *(own.length for own in self.running.values()))
            if length <= self.shape[1] <= 2 * length:  # a copy would gain little
                length = self.shape[1]
        self._reshape(size, length)
        free = collections.defaultdict(list)
        for place in range(size):
            if place not in self.running:
                free[self._way(place)].append(place)
        for part, own in moves:
            if own:
                self._move(part, own, free)
        self._drop_empty()

    def _drop_empty(self) -> None:
        self.waiting = [part for part in self.waiting if part.rows]

    def _reshape(self, size: int, length: int) -> None:
        if (size, length) == self.shape:
            return
        if not self.running:
            block = self.waiting[0].block
            # Longer slots than needed are taken as they are: each size is a program.
            if size != self.shape[0] or not length <= self.shape[1] <= 2 * length:
                self.slots = None  # before there are others
                self.slots = self.programs.empty(block, count=size, length=length)
                self.shape = (size, length)
            return
        each, before = size // self.ways, self.shape[0] // self.ways
        places = np.zeros((self.ways, each), np.int32)
        moved, filled = {}, collections.Counter()
        for place, own in sorted(self.running.items()):
            way = self._way(place)
            places[way, filled[way]] = place - way * before
            moved[way * each + filled[way]] = own
            filled[way] += 1
        for way in range(self.ways):  # any slot does for those that stay free
            places[way, filled[way] :] = 0
        self.slots = self.programs.resize(
            self.slots, put_whole_batch(places, self.mesh), length=length
        )
        self.running, self.shape = moved, (size, length)

    def _move(self, part: Waiting, own: dict[int, int], free: dict[int, list[int]]) -> None:
        count, each = len(part.block.token) // self.ways, self.shape[0] // self.ways
        rows = np.zeros((self.ways, count), np.int32)
        places = np.full((self.ways, count), each, np.int32)  # beyond the last: dropped
        filled = collections.Counter()
        for row, way in own.items():
            place = free[way].pop(0)
            rows[way, filled[way]] = row - way * count
            places[way, filled[way]] = place - way * each
            filled[way] += 1
            self.running[place] = Running(part.rows.pop(row), part.block.prefix.mask.shape[1])
        placed = put_whole_batch((rows, places), self.mesh)
        most = np.int32(max(filled.values()))
        self.slots = self.programs.insert(self.slots, part.block, *placed, most)
