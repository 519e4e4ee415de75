"""Keeps the compressor's memory of running conversations: a new turn costs only its own tokens."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx

from mm_jax.data.batch import pad_to
from mm_jax.data.shapes import geometric
from mm_jax.models.abstract import AbstractModel
from mm_jax.models.mamba import MambaState
from mm_jax.models.sharding import batch_parallelism, fetch, put_whole_batch

LEAST_TOKENS, LEAST_VECTORS = 64, 8  # that are read at once
MOST_TOKENS = 4096


@dataclasses.dataclass(frozen=True)
class ConversationMemory:
    """Holds what the compressor keeps of one conversation, on the host.

    tokens int32[H]: what it has read; vectors float32[U, D_llm]: one per `<MEM>` in them; conv
    float32[L, K, E] and ssm float32[L, E, N]: the recurrent state after them. `MemoryWriter`
    continues from it, in this process or, after `save` and `load`, in another one.
    """

    tokens: np.ndarray
    vectors: np.ndarray
    conv: np.ndarray
    ssm: np.ndarray

    def is_prefix_of(self, tokens: np.ndarray) -> bool:
        n = len(self.tokens)
        return n <= len(tokens) and np.array_equal(tokens[:n], self.tokens)

    def save(self, path: pathlib.Path) -> None:
        """Writes an npz file atomically."""
        partial = path.with_name(path.name + ".partial")
        with open(partial, "wb") as file:
            np.savez(file, **dataclasses.asdict(self))
        partial.rename(path)

    @classmethod
    def load(cls, path: pathlib.Path) -> ConversationMemory:
        with np.load(path) as stored:
            return cls(**{f.name: stored[f.name] for f in dataclasses.fields(cls)})


class MemoryWriter:
    """Reads further tokens into the memories of several conversations at once.

    Rows are padded to `rows` and lengths to powers of two, so that few shapes are compiled.
    `compressed` counts the tokens read.
    """

    def __init__(self, abstract: AbstractModel, rows: int):
        ways = batch_parallelism(abstract.mesh)
        self.abstract = abstract
        self.rows = -(-rows // ways) * ways
        self.compressed = 0
        self._extend = jax.jit(self._extend_rows)
        self._empty = None

    def _extend_rows(self, params, tokens, memory_index, lengths, state):
        model = nnx.merge(self.abstract.graph, params)
        state = MambaState(*(s.swapaxes(0, 1) for s in state))  # rows first on the host
        vectors, state = model.mamba_compressor.extend(tokens, memory_index, lengths, state)
        return vectors.astype("float32"), tuple(s.swapaxes(0, 1).astype("float32") for s in state)

    def empty(self) -> ConversationMemory:
        """Returns the memory of a conversation that has not begun."""
        if self._empty is None:

            def make(params):
                model = nnx.merge(self.abstract.graph, params)
                return model.mamba_compressor.mamba.empty_state(1)

            shapes = jax.eval_shape(make, self.abstract.params)
            width = self.abstract.params["mamba_compressor"]["memory_projection"]["bias"].shape[0]
            conv, ssm = (np.zeros((s.shape[0], *s.shape[2:]), np.float32) for s in shapes)
            none = np.zeros(0, np.int32)
            self._empty = ConversationMemory(none, np.zeros((0, width), np.float32), conv, ssm)
        return self._empty

    def extend(
        self,
        params: nnx.State,
        memories: Sequence[ConversationMemory],
        tokens: Sequence[np.ndarray],
        memory_ids: Sequence[np.ndarray],
    ) -> list[ConversationMemory]:
        """Returns the memories after further `tokens` int32[H] of each conversation, whose `<MEM>`
        tokens are at the indices `memory_ids` int32[U]."""
        if max(map(len, tokens), default=0) > MOST_TOKENS:
            # In parts, so that a long history needs no program of its own.
            first = [t[:MOST_TOKENS] for t in tokens]
            later = [t[MOST_TOKENS:] for t in tokens]
            own = [ids[ids < MOST_TOKENS] for ids in memory_ids]
            rest = [ids[ids >= MOST_TOKENS] - MOST_TOKENS for ids in memory_ids]
            return self.extend(params, self.extend(params, memories, first, own), later, rest)
        out: list[ConversationMemory] = []
        for start in range(0, len(memories), self.rows):
            part = slice(start, start + self.rows)
            out += self._extend_batch(params, memories[part], tokens[part], memory_ids[part])
        return out

    def _extend_batch(self, params, memories, tokens, memory_ids) -> list[ConversationMemory]:
        missing = self.rows - len(memories)
        longest = max(1, *map(len, tokens))
        most = max(1, *map(len, memory_ids))
        length, count = geometric(longest, LEAST_TOKENS), geometric(most, LEAST_VECTORS)
        none = [np.zeros(0, np.int32)] * missing

        def stack(arrays, size):
            return np.stack([pad_to(np.asarray(a, np.int32), size) for a in arrays])

        whole = [*memories, *[self.empty()] * missing]
        state = (np.stack([m.conv for m in whole]), np.stack([m.ssm for m in whole]))
        lengths = np.array([len(t) for t in [*tokens, *none]], np.int32)
        inputs = (stack([*tokens, *none], length), stack([*memory_ids, *none], count), lengths)
        with jax.set_mesh(self.abstract.mesh):
            placed = put_whole_batch((*inputs, state), self.abstract.mesh)
            vectors, (conv, ssm) = fetch(self._extend(params, *placed))
        self.compressed += int(lengths.sum())
        return [
            ConversationMemory(
                np.concatenate([memory.tokens, np.asarray(new, np.int32)]),
                np.concatenate([memory.vectors, vectors[row, : len(at)]]),
                conv[row],
                ssm[row],
            )
            for row, (memory, new, at) in enumerate(zip(memories, tokens, memory_ids, strict=True))
        ]


def memory_vectors(
    writer: MemoryWriter,
    params: nnx.State,
    conversations: Sequence[str],
    tokens: Sequence[np.ndarray],
    memory_index: Sequence[np.ndarray],
    settled: Sequence[int],
    kept: dict[str, ConversationMemory] | None = None,
) -> list[np.ndarray]:
    """Computes the memory vectors float32[U, D_llm] of every history, in order.

    `tokens` int32[H] are the histories, with `<MEM>` at `memory_index` int32[U]; `conversations`
    names the conversation of each. A beginning that histories of one conversation share is read
    once: the first `settled` tokens (`MemoryBudget.settled`) are remembered, the rest is read again
    for a later history. `kept`, if given, holds conversations read before and is updated.
    """

    def read(memories, index, stop) -> list[ConversationMemory]:
        """Returns the memories after the tokens up to `stop` of the histories `index`."""
        out = list(memories)
        parts, ids = {}, {}
        for k, (memory, i, end) in enumerate(zip(memories, index, stop, strict=True)):
            seen, at = len(memory.tokens), memory_index[i]
            if end > seen:
                parts[k] = tokens[i][seen:end]
                ids[k] = at[(at >= seen) & (at < end)] - seen
        further = [memories[k] for k in parts]
        found = writer.extend(params, further, list(parts.values()), list(ids.values()))
        for k, memory in zip(parts, found, strict=True):
            out[k] = memory
        return out

    own: dict[str, list[int]] = {}
    for i in sorted(range(len(tokens)), key=lambda i: len(tokens[i])):
        own.setdefault(conversations[i], []).append(i)
    out: list[np.ndarray] = [np.zeros(0)] * len(tokens)
    names = list(own)
    group = writer.rows * 4  # conversations whose states are held at a time
    for first in range(0, len(names), group):
        running = {
            name: (kept or {}).get(name, writer.empty()) for name in names[first : first + group]
        }
        for wave in range(max(len(own[name]) for name in running)):
            todo = [name for name in running if len(own[name]) > wave]
            for name in todo:
                if not running[name].is_prefix_of(tokens[own[name][wave]]):
                    running[name] = writer.empty()
            index = [own[name][wave] for name in todo]
            memories = read([running[name] for name in todo], index, [settled[i] for i in index])
            running.update(zip(todo, memories, strict=True))
            memories = read(memories, index, [len(tokens[i]) for i in index])
            for i, memory in zip(index, memories, strict=True):
                # The newest: `memory_index` may leave older ones out.
                out[i] = memory.vectors[len(memory.vectors) - len(memory_index[i]) :]
        if kept is not None:
            kept.update(running)
    return out
