"""Plans memory, FLOPs, traffic and time of a training step, before anything is paid for (command
`plan`).

python -m mm_jax plan --config=configs/base.py --mesh=data:1,fsdp:4,tensor:1 --hbm=80GB

Compiles the real functions of a stage on virtual devices (`mm_jax.planning`); no weight is
allocated and no data is read.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from typing import NamedTuple

from mm_jax.config.errors import ConfigError, require
from mm_jax.config.load import load_config, resolve
from mm_jax.run.host_memory import memory_limit
from mm_jax.training.traffic import Collective, Links, compiled_mesh

GB = 1e9


class Card(NamedTuple):
    """A device: its name in `run.flops.PEAK_BF16`, memory in GB, its bandwidth in TB/s, and
    that of its link to the others of its host in GB/s per direction (NVLink, or else PCIe)."""

    name: str
    memory: float
    bandwidth: float
    link: float


CARDS = {
    "H100": Card("NVIDIA H100", 80, 3.35, 450),
    "H200": Card("NVIDIA H200", 141, 4.8, 450),
    "B200": Card("NVIDIA B200", 180, 8.0, 900),
    "A100": Card("NVIDIA A100", 80, 2.0, 300),
    "L40S": Card("NVIDIA L40S", 48, 0.864, 32),
    "L4": Card("NVIDIA L4", 24, 0.3, 32),
    "A6000": Card("NVIDIA RTX A6000", 48, 0.768, 32),
    "RTX5090": Card("NVIDIA GeForce RTX 5090", 32, 1.792, 64),
    "RTX4090": Card("NVIDIA GeForce RTX 4090", 24, 1.008, 32),
    "RTX3090": Card("NVIDIA GeForce RTX 3090", 24, 0.936, 32),
}
CPU = "CPU"  # this machine, with its own memory
LEAST = {"text_tokens": 1, "frames": 1, "audio_seconds": 0, "utterances": 0, "history_tokens": 0}
LEAST |= {"vocab_size": 10, "steps": 1}
HEADROOM = 0.92  # usable share of the memory; the runtime, NCCL and fragmentation take the rest
# On a CPU: Python and the data take some, and a quarter may be freed memory that is kept.
CPU_HEADROOM = 0.7


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--config", required=True, help="configs/NAME.py[:arg]")
    add("--stage", help="stage to plan (default: the last)")
    add("--mesh", help="data:1,fsdp:4,tensor:1 (default: the config's; then no -1 in it)")
    add(
        "--device",
        default="H100",
        choices=[*CARDS, CPU],
        help="default H100; CPU: one process on this machine's cores, in float32",
    )
    add("--hbm", help="memory of a device, such as 40GB (default: the device's)")
    add("--mfu", type=float, default=0.4, help="assumed for the time (default 0.4)")
    add("--price", type=float, help="of a device and hour: prints hours and price of the stage")
    add("--steps", type=int, help="optimiser steps (default: the stage's, if it names them)")
    add("--vocab_size", type=int, help="tokens of the tokenizer (default: the config's)")
    links = parser.add_argument_group("links, for the time of the traffic")
    add = links.add_argument
    add("--host_devices", type=int, default=8, help="devices of a host (default 8)")
    add("--link", type=float, help="GB/s a device sends inside its host (default: the device's)")
    add(
        "--network",
        type=float,
        default=50.0,
        help="GB/s a device sends to other hosts (default 50: one 400 Gb/s card a device)",
    )
    shape = parser.add_argument_group("an example at its longest")
    shape.add_argument("--text_tokens", type=int, default=2048, help="default 2048")
    shape.add_argument("--frames", type=int, default=16, help="default 16")
    shape.add_argument("--audio_seconds", type=float, default=10.0, help="default 10")
    shape.add_argument("--utterances", type=int, default=64, help="of the history (default 64)")
    shape.add_argument("--history_tokens", type=int, default=2048, help="default 2048")


def main(args: argparse.Namespace, overrides: list[str]) -> None:
    config = resolve(load_config(args.config, overrides))
    mesh = parse_mesh(args.mesh) if args.mesh else config.mesh.model_dump()
    require(
        not args.mesh or all(n >= 1 for n in mesh.values()),
        f"--mesh: expected sizes of at least 1, got {args.mesh}",
    )
    require(
        all(n >= 1 for n in mesh.values()),
        f"--mesh: the config leaves {[k for k, n in mesh.items() if n < 1]} to the devices there "
        "are; name the sizes, such as --mesh=data:1,fsdp:8,tensor:1",
    )
    on_cpu = args.device == CPU
    memory = memory_limit() if on_cpu else CARDS[args.device].memory * GB
    hbm = parse_bytes(args.hbm) if args.hbm else memory
    usable = hbm * (CPU_HEADROOM if on_cpu else HEADROOM)
    require(
        not on_cpu or math.prod(mesh.values()) == 1,
        f"--mesh: a CPU is one place with all the memory; expected sizes of 1, got {mesh}",
    )
    require(
        not on_cpu or args.price is None, "--price: the time of a step on a CPU is not estimated"
    )
    require(0 < args.mfu <= 1, f"--mfu: expected 0 < mfu <= 1, got {args.mfu}")
    for name, least in LEAST.items():
        value = vars(args)[name]
        require(
            value is None or value >= least, f"--{name}: expected at least {least}, got {value}"
        )
    for name in ("host_devices", "link", "network"):
        value = vars(args)[name]
        require(value is None or value > 0, f"--{name}: expected more than 0, got {value}")
    require(args.price is None or args.price >= 0, f"--price: expected 0 or more, got {args.price}")
    # Set before the first use of a device: as many virtual devices as the compiled mesh has places.
    os.environ["JAX_PLATFORMS"] = "cpu"
    count = math.prod(compiled_mesh(mesh).values())
    if count > 1:  # such programs are compiled anew to see their traffic: nothing to keep
        os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"
    flags = [
        f"--xla_force_host_platform_device_count={count}",
        # Nothing is run, and LLVM has no part in what is read from the program.
        "--xla_backend_optimization_level=0",
    ]
    if not on_cpu:
        flags += [
            # XLA's CPU compiler computes bfloat16 products in float32; without this it would
            # convert the stacked weights of all layers at once, which no GPU does.
            "--xla_disable_hlo_passes=while-loop-invariant-code-motion,"
            "while-loop-expensive-invariant-code-motion",
            # Like a GPU's scheduler, this one saves memory; the default lets everything run early.
            "--xla_cpu_enable_concurrency_optimized_scheduler=false",
        ]
    os.environ["XLA_FLAGS"] = " ".join(flags)
    from mm_jax import planning  # jax sees the flags above
    from mm_jax.ops import products

    if on_cpu and config.precision == "auto":
        config = config.replace(precision="float32")
    example = planning.Longest(
        args.text_tokens, args.frames, args.audio_seconds, args.utterances, args.history_tokens
    )
    how = (config, args.stage, mesh, example, args.vocab_size)
    with products.standing_for_gpu(not on_cpu):
        plan = planning.make_plan(*how)
    print(report(plan, args, mesh, hbm))
    if args.price is not None:
        print(cost(config, args, plan, mesh))
    if plan.total > usable:
        print("it does not fit: planning smaller ones", file=sys.stderr)
        with products.standing_for_gpu(not on_cpu):
            least = planning.least_change(*how, usable)
        raise ConfigError(
            f"does not fit: {plan.total / GB:.1f} GB per device, usable are "
            f"{usable / GB:.1f} of {hbm / GB:.3g} GB\n"
            + (
                f"the least change that fits on {math.prod(mesh.values())} of these "
                f"({least[1].total / GB:.1f} GB, planned, not estimated):\n  {least[0]}\n"
                if least
                else "neither LoRA, quantised bases, fewer trained parts nor shorter inputs make "
                "it fit on as many devices\n"
            )
            + "other estimates:\n"
            + "\n".join(f"  {line}" for line in remedies(plan, usable, on_cpu))
        )


def cost(config, args, plan, mesh) -> str:
    """Says how long the stage takes and what it costs."""
    stage = config.stage[args.stage or config.stages[-1]]
    steps = args.steps or stage.steps
    require(steps > 0, "--price: the stage counts epochs; name its optimiser steps with --steps")
    devices = math.prod(mesh.values())
    hours = steps * sum(step_seconds(plan, args, mesh)) / 3600
    return (
        f"{steps} steps: {hours:.1f} hours on {devices} {args.device}, "
        f"{hours * devices * args.price:.2f} at {args.price:g} per device and hour (nothing "
        "overlapped, without evaluations and checkpoints)"
    )


class Seconds(NamedTuple):
    """How long a step computes, reads the weights and caches of decoding, and moves its traffic."""

    computing: float
    decoding: float
    moving: float


def step_seconds(plan, args, mesh) -> Seconds:
    from mm_jax.run.flops import PEAK_BF16

    card, links = CARDS[args.device], links_of(args)
    return Seconds(
        plan.flops / (math.prod(mesh.values()) * PEAK_BF16[card.name] * args.mfu),
        plan.decoded / (card.bandwidth * 1e12),
        sum(links.seconds(one, mesh) for one in plan.traffic),
    )


def links_of(args) -> Links:
    inside = args.link or CARDS[args.device].link
    return Links(args.host_devices, inside * GB, args.network * GB)


def traffic_table(plan, args, mesh) -> list[str]:
    """Says what a device sends in a step, per phase, mesh axes and kind of collective."""
    links, seconds = links_of(args), step_seconds(plan, args, mesh)
    lines = ["collectives of a step (calls, GB that a device sends, seconds on the links alone):"]

    def line(what: str, found: list[Collective]) -> str:
        calls, moved = sum(c.calls for c in found), sum(c.moved(mesh) for c in found)
        alone = sum(links.seconds(c, mesh) for c in found)
        return f"  {what:<47}{calls:>8.0f}{moved / GB:>10.2f} GB{alone:>9.3f} s"

    small = []
    for name, phase in plan.phases.items():
        for one in sorted(phase.traffic, key=lambda one: -links.seconds(one, mesh)):
            if links.seconds(one, mesh) < 0.005 * seconds.moving:
                small.append(one)
            else:
                lines.append(line(f"{name:<9}{'+'.join(one.axes):<19}{one.kind}", [one]))
    if small:
        lines.append(line("all others", small))
    alone = seconds.computing + seconds.decoding
    lines.append(
        f"links: {links.inside / GB:g} GB/s inside a host of {links.host_devices}, "
        f"{links.between / GB:g} GB/s between hosts: {seconds.moving:.2f} s; the step: "
        f"{max(alone, seconds.moving):.2f} s where all of it overlaps with computing, "
        f"{sum(seconds):.2f} s where nothing does"
    )
    return lines


def parse_mesh(text: str) -> dict[str, int]:
    sizes = {"data": 1, "fsdp": 1, "tensor": 1}
    for part in text.split(","):
        name, _, size = part.partition(":")
        if name not in sizes or not size.isdigit():
            raise ConfigError(f"--mesh: expected data:1,fsdp:4,tensor:1, got {text!r}")
        sizes[name] = int(size)
    return sizes


def parse_bytes(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(GB|GiB)?", text)
    if not found:
        raise ConfigError(f"--hbm: expected bytes such as 80GB, got {text!r}")
    return float(found[1]) * (2**30 if found[2] == "GiB" else GB)


def report(plan, args, mesh, hbm: float) -> str:
    devices = math.prod(mesh.values())
    rows = [
        ("trained parameters", plan.trainable),
        ("frozen parameters", plan.frozen),
        ("optimiser state", plan.optimizer),
        ("reference", plan.reference),
        ("gradients", plan.gradients),
        ("activations and scratch", plan.activations),
        ("batch", plan.batch),
    ]
    lines = [f"mesh {mesh}, {plan.rows_per_device} rows per device and micro-batch"]
    lines += [f"  {name:<24} {size / GB:8.2f} GB" for name, size in rows if size]
    if len(plan.phases) > 1:
        sampling = plan.phases["sampling"]
        lines += [
            f"  {'weights for sampling':<24} {sampling.weights / GB:8.2f} GB",
            f"  {'rollout cache':<24} {plan.cache / GB:8.2f} GB, "
            f"{plan.slots[0]} slots of {plan.slots[1]} places and "
            f"{' x '.join(map(str, plan.shapes['responses'][1:]))}",
        ]
        lines += [
            f"  {f'peak while {name}':<24} {(plan.resident + phase.own) / GB:8.2f} GB"
            for name, phase in plan.phases.items()
        ]
    lines += [
        f"  {'total per device':<24} {plan.total / GB:8.2f} GB of {hbm / GB:.0f}",
        "shapes: " + ", ".join(f"{k}{list(v)}" for k, v in plan.shapes.items()),
    ]
    if args.device == CPU:
        lines.append(f"{plan.flops / 1e12:.1f} TFLOP per step")
    else:
        seconds, reading, _ = step_seconds(plan, args, mesh)
        lines.append(
            f"{plan.flops / 1e12:.1f} TFLOP per step; at {args.mfu:.0%} MFU on {devices} "
            f"{args.device}: {seconds:.2f} s, {plan.tokens / seconds:,.0f} tokens/s"
        )
        if plan.decoded:
            lines.append(f"decoding alone takes at least {reading:.2f} s (memory bandwidth)")
        if devices > 1:
            lines += traffic_table(plan, args, mesh)
    lines += [
        f"compiled in {plan.seconds_to_compile:.0f} s",
    ]
    return "\n".join(lines)


def remedies(plan, usable: float, on_cpu: bool) -> list[str]:
    """Finds the first three changes, or combinations of changes, with which the plan fits.

    An estimate: scratch memory is taken as proportional to the rows of a micro-batch (or of a chunk
    of a rollout), and the rest as inversely proportional to the number of shards.
    """

    def total(
        rows=1.0, chunks=1.0, shards=1, trained=None, optimizer=1.0, frozen=None, reference=1.0,
        gathered=True,
    ) -> float:  # fmt: skip
        weights = plan.trainable if trained is None else trained
        share = weights / plan.trainable if plan.trainable else 1.0
        kept = plan.frozen if frozen is None else frozen
        own = weights + kept + share * (plan.optimizer * optimizer + plan.reference * reference)
        resident = own / shards + plan.batch
        gradients = plan.gradients * share / shards
        peaks = [gradients + plan.activations * rows]
        for name, phase in plan.phases.items():
            if name == "sampling":
                kept = phase.weights if gathered else phase.weights / plan.shards / shards
                peaks.append(kept + phase.scratch * chunks)
            elif name == "scoring":
                peaks.append(phase.own * rows)
        return resident + max(peaks)

    found = []
    halvings = [2.0**-i for i in range(1, 12) if 2.0**-i >= 1.0 / plan.rows_per_device]

    def offer(text: str, **changes) -> bool:
        fits = total(**changes) <= usable and len(found) < 3
        if fits:
            found.append(f"{text} (about {total(**changes) / GB:.1f} GB)")
        return fits

    def micro(rows: float) -> str:
        return f"accumulation={round(plan.micro_batches / rows)}"

    if "sampling" in plan.phases:
        offer("rl.rollout_weights=training", gathered=False)
        any(offer(f"{round(1 / c)} times rl.chunks", chunks=c) for c in halvings)
    any(offer(micro(rows), rows=rows) for rows in halvings)
    any(
        offer(f"fsdp and tensor over {plan.shards * more} devices", shards=more)
        for more in (() if on_cpu else (2, 4, 8, 16, 32))
    )
    if not plan.adapters:
        lora = dict(trained=plan.matrices // 50, frozen=plan.frozen + plan.matrices)
        offer("lora.rank=64", **lora) or any(
            offer(f"lora.rank=64 and {micro(rows)}", rows=rows, **lora) for rows in halvings
        )
    elif not plan.quantised:
        offer("lora.base=nf4", frozen=plan.frozen - 0.72 * plan.matrices)
    if plan.reference:
        offer("rl.beta=0 (no reference)", reference=0.0)
    offer("momentum_dtype=bfloat16", optimizer=0.75)
    offer("optimizer=adafactor", optimizer=0.02)
    for rows in halvings:
        for more in (2, 4, 8, 16):
            offer(
                f"{micro(rows)} and {plan.shards * more} devices",
                rows=rows, chunks=rows, shards=more,
            )  # fmt: skip
    return found or ["nothing tried: fewer tokens, frames or a smaller model"]
