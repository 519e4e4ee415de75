"""Counts the bytes that a compiled function's collectives move, from XLA's partitioned program.

Reads the program that the SPMD partitioner leaves (HLO text), before any pass of a backend: its
types and collectives are the same for every kind of device. An all-reduce counts as a
reduce-scatter where it is cut afterwards into as many parts as its groups have members: XLA's GPU
compiler makes it one. A group over a part of a mesh axis counts as one over the whole axis.

Bytes are those that a device sends in a ring of n devices, for S bytes that are gathered, reduced
or exchanged: S (n - 1) / n, and twice that for an all-reduce.
"""

from __future__ import annotations

import collections
import math
import pathlib
import re
import tempfile
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from mm_jax.config.errors import require

MOST_DEVICES = 64  # virtual ones; larger meshes are compiled with a smaller data axis
KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
# What may stand between an all-reduce and the part of it that is kept.
UNARY = ("bitcast", "convert", "copy", "reshape", "transpose")


class Collective(NamedTuple):
    """Holds one kind of collective of a step: over which mesh axes, the bytes S of one call of
    average size, and the calls per step."""

    kind: str
    axes: tuple[str, ...]
    size: float
    calls: float

    def moved(self, mesh: dict[str, int]) -> float:
        """Returns the bytes that a device sends in a step, over a mesh of these sizes."""
        n = math.prod(mesh[axis] for axis in self.axes)
        passes = 2 if self.kind == "all-reduce" else 1
        share = 1.0 if self.kind == "collective-permute" else (n - 1) / n
        return passes * share * self.size * self.calls


class Links(NamedTuple):
    """Describes what connects devices: the `host_devices` of a host have links of `inside` bytes/s
    each; to other hosts each device has `between` bytes/s."""

    host_devices: int
    inside: float
    between: float

    def seconds(self, collective: Collective, mesh: dict[str, int]) -> float:
        """Returns how long a step's calls take at least.

        A group inside a host is a ring over its links. In a group over several hosts every device
        exchanges one share of S with its peers on the other hosts, and the hosts' own devices
        exchange the shares; the two are added. In an all-to-all every device sends all that is for
        other hosts itself.
        """
        sizes = list(mesh.items())
        near = far = 1
        for i, (axis, n) in enumerate(sizes):
            if axis in collective.axes:
                step = math.prod(k for _, k in sizes[i + 1 :])  # between neighbours on this axis
                # Groups that fill hosts unevenly count as the even parts that they consist of.
                inside = math.gcd(n, max(1, self.host_devices // step))
                near, far = near * inside, far * (n // inside)
        passes = (2 if collective.kind == "all-reduce" else 1) * collective.calls
        if collective.kind == "collective-permute":
            return passes * collective.size / (self.between if far > 1 else self.inside)
        local = collective.size * (near - 1) / near / self.inside
        remote = collective.size * (far - 1) / far / self.between
        if collective.kind != "all-to-all":
            remote /= near
        return passes * (local + remote)


def compiled_mesh(sizes: dict[str, int]) -> dict[str, int]:
    """Returns the mesh that is compiled for a mesh of these sizes: itself up to MOST_DEVICES.

    Beyond, its data axis is smaller, with as many rows per device: a device then holds the same
    and moves what `widened` says. Raises ConfigError where that cannot be.
    """
    found = dict(sizes)
    while math.prod(found.values()) > MOST_DEVICES and found["data"] % 2 == 0 and found["data"] > 2:
        found["data"] //= 2
    require(
        math.prod(found.values()) <= MOST_DEVICES,
        f"--mesh: expected at most {MOST_DEVICES} devices, or more of them by a data axis that can "
        f"be halved until as many are left (data >= 2); got {sizes}",
    )
    return found


def partitioned(lowered: Any) -> tuple[Any, str]:
    """Compiles a lowered function; returns it and the text of its partitioned program."""
    with tempfile.TemporaryDirectory() as folder:
        compiled = lowered.compile(
            compiler_options={
                "xla_dump_to": folder,
                "xla_dump_hlo_pass_re": "spmd-partitioning",
                "xla_dump_hlo_as_text": True,
                # Nothing has this name. It makes jax's compilation cache, which knows nothing of
                # what was dumped, miss.
                "xla_dump_emitter_re": folder,
            }
        )
        found = sorted(pathlib.Path(folder).glob("*.after_spmd-partitioning.*"))
        if not found:
            raise RuntimeError("XLA wrote no partitioned program")
        return compiled, found[-1].read_text()


def collectives(text: str, mesh: dict[str, int]) -> list[Collective]:
    """Lists what one call of a partitioned program moves; `mesh`: axis -> size, in its order.

    A loop counts as often as its condition allows: for one that may end early, at most. Collectives
    of one kind over the same axes are one item. Scalars (up to 1 KB a call) are left out. Raises
    ValueError for a loop without a known end.
    """
    program = _parse(text)
    entry = next(name for name, body in program.items() if body.entry)
    found = collections.Counter()
    calls = collections.Counter()
    for kind, axes, size, times in _walk(program, entry, 1, mesh):
        if size > 1024 and axes:
            found[kind, axes] += size * times
            calls[kind, axes] += times
    return [Collective(*key, total / calls[key], calls[key]) for key, total in found.items()]


def widened(found: list[Collective], growth: int) -> list[Collective]:
    """Returns the collectives of a mesh whose data axis is `growth` times as wide, with as many
    rows per device: only what is gathered from all rows is larger."""
    return [
        one._replace(size=one.size * growth)
        if one.kind == "all-gather" and "data" in one.axes
        else one
        for one in found
    ]


def joined(parts: Iterable[tuple[list[Collective], float]]) -> list[Collective]:
    """Adds up several functions' collectives, each with how often a step calls it."""
    total, calls = collections.Counter(), collections.Counter()
    for found, times in parts:
        for one in found:
            total[one[:2]] += one.size * one.calls * times
            calls[one[:2]] += one.calls * times
    return [Collective(*key, total[key] / calls[key], calls[key]) for key in total]


# ---- reading HLO text --------------------------------------------------------------------------


class _Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    operands: list[str]
    rest: str  # operands and attributes, as written


class _Computation(NamedTuple):
    entry: bool
    instructions: dict[str, _Instruction]
    users: dict[str, list[_Instruction]]


_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*-> .*\{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")


def _parse(text: str) -> dict[str, _Computation]:
    program: dict[str, _Computation] = {}
    current = None
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = _Computation(bool(header[1]), {}, collections.defaultdict(list))
            program[header[2]] = current
        elif current is not None and (found := _LINE.match(line)):
            name, shape, opcode, rest = found.groups()
            operands = re.findall(r"%([\w.\-]+)", _inside(rest))
            one = _Instruction(name, shape, opcode, operands, rest)
            current.instructions[name] = one
            for operand in operands:
                current.users[operand].append(one)
    return program


def _inside(rest: str) -> str:
    """Returns the text up to the parenthesis that closes the operands."""
    depth = 1
    for i, character in enumerate(rest):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return rest[:i]
    return rest


def _bytes(shape: str) -> int:
    """Adds up the bytes of a shape, or of a tuple's parts."""
    total = 0
    for kind, sizes in re.findall(r"(\w+)\[([\d,]*)\]", shape):
        bits = 8 if kind == "pred" else int(re.match(r"[a-z]+(\d+)", kind)[1])
        total += math.prod(int(n) for n in sizes.split(",") if n) * bits // 8
    return total


def _walk(program, name: str, times: int, mesh) -> list[tuple[str, tuple[str, ...], int, int]]:
    """Lists (kind, axes, S, calls) of a computation that runs `times` times."""
    body, found = program[name], []
    for one in body.instructions.values():
        if one.opcode in KINDS:
            found.append((*_collective(body, one, mesh), times))
        elif re.match(r"(ragged-)?(all-|reduce-scatter|collective-)", one.opcode):
            raise ValueError(f"the collective {one.name} is of an unknown kind: {one.opcode}")
        elif one.opcode == "while":
            condition, loop = (
                re.search(rf"{word}=%?([\w.\-]+)", one.rest)[1] for word in ("condition", "body")
            )
            inner = _walk(program, loop, 1, mesh)
            if inner:
                n = times * _trips(program[condition], one)
                found += [(kind, axes, size, n * k) for kind, axes, size, k in inner]
        elif one.opcode == "conditional":
            listed = re.search(r"branch_computations=\{([^}]*)\}", one.rest)
            names = (
                listed[1].split(", ")
                if listed
                else re.findall(r"(?:true|false)_computation=(\S+?),", one.rest + ",")
            )
            branches = [_walk(program, branch.strip("%"), times, mesh) for branch in names]
            found += max(branches, key=lambda each: sum(s * k for _, _, s, k in each))
        elif one.opcode == "call":
            found += _walk(program, re.search(r"to_apply=%?([\w.\-]+)", one.rest)[1], times, mesh)
    return found


def _trips(condition: _Computation, loop: _Instruction) -> int:
    """Reads how often a loop that counts up from 0 or more runs at most: its condition asks whether
    the counter is less than a constant."""
    for one in condition.instructions.values():
        if one.opcode == "compare" and "direction=LT" in one.rest:
            for operand in one.operands:
                value = condition.instructions[operand]
                if value.opcode == "constant" and re.fullmatch(r"[su]\d+\[\]", value.shape):
                    return int(_inside(value.rest))
    raise ValueError(f"the loop {loop.name} has collectives and no known end: {loop.rest[-200:]}")


def _collective(body: _Computation, one: _Instruction, mesh):
    """Returns (kind, axes, S) of a collective."""
    operands = sum(_bytes(body.instructions[name].shape) for name in one.operands)
    if one.opcode == "collective-permute":
        pairs = re.findall(r"\{(\d+),(\d+)\}", one.rest)
        groups = [[int(a), int(b)] for a, b in pairs if a != b]
    else:
        groups = _groups(one.rest, math.prod(mesh.values()))
    axes = _axes(groups, mesh)
    if one.opcode == "all-reduce":
        value = one
        while len(users := body.users[value.name]) == 1 and users[0].opcode in UNARY:
            value = users[0]
        if len(users) == 1 and users[0].opcode == "dynamic-slice":
            n = math.prod(mesh[axis] for axis in axes)
            if _elements(users[0].shape) * n == _elements(one.shape):
                return "reduce-scatter", axes, operands
    return one.opcode, axes, _bytes(one.shape) if one.opcode == "all-gather" else operands


def _elements(shape: str) -> int:
    return math.prod(int(n) for n in re.search(r"\[([\d,]*)\]", shape)[1].split(",") if n)


def _axes(groups: list[list[int]], mesh: dict[str, int]) -> tuple[str, ...]:
    """Names the mesh axes along which the members of a group differ."""
    sizes = tuple(mesh.values())
    differ = np.zeros(len(sizes), bool)
    for group in groups:
        places = np.array(np.unravel_index(group, sizes))
        differ |= (places != places[:, :1]).any(axis=1)
    return tuple(axis for axis, yes in zip(mesh, differ, strict=True) if yes)


def _groups(rest: str, devices: int) -> list[list[int]]:
    """Reads replica groups in each of XLA's three forms."""
    found = re.search(r"replica_groups=(\{\}|\{\{.*?\}\})", rest)
    if found:
        listed = [[int(n) for n in g.split(",")] for g in re.findall(r"\{([\d,]+)\}", found[1])]
        return listed or [list(range(devices))]
    found = re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", rest)
    if found:
        count = int(found[1].split(",")[0])
        return _iota(found[2]).reshape(count, -1).tolist()
    # mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b', 'a':(2)2}: a part of axis a is its middle
    # factor, after a leading one of 2.
    found = re.search(
        r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?\]?(?:T\([\d,]+\))?)\))? \{(.*?)\}",
        rest,
    )
    if not found:
        raise ValueError(f"replica groups in an unknown form: {rest[:200]}")
    axes = [(name, int(n)) for name, n in re.findall(r"'(\w+)'=(\d+)", found[1])]
    taken = collections.defaultdict(list)
    for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", found[3]):
        taken[name].append((int(before), int(size)) if size else (1, dict(axes)[name]))
    shape, grouped = [], []
    for name, n in axes:
        at = 1
        for before, size in sorted(taken[name]):
            shape += [before // at, size]
            grouped.append(len(shape) - 1)
            at = before * size
        shape.append(n // at)
    ids = _iota(found[2]).reshape(-1) if found[2] else np.arange(devices)
    others = [i for i in range(len(shape)) if i not in grouped]
    width = math.prod(shape[i] for i in grouped)
    return ids.reshape(shape).transpose(others + grouped).reshape(-1, width).tolist()


def _iota(text: str) -> np.ndarray:
    """Reads [2,4]T(1,0): the numbers in order in this shape, transposed."""
    shape, _, order = text.partition("T")
    sizes = [int(n) for n in shape.strip("[]").split(",")]
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return ids.transpose([int(n) for n in order.strip("()").split(",")]) if order else ids
