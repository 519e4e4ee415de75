"""Prints a table of what a step computes and moves on 8 to 512 GPUs.

Runs `plan` for meshes of growing size, with as many rows per GPU (weak scaling) or as many in all
(strong), and one prompt per GPU and micro-batch. Efficiency is the time of computing and decoding
over that of the whole step, once with everything overlapped and once with nothing. Takes half a
minute to several minutes a row.
"""

from __future__ import annotations

import argparse
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from configs.decoders import SIZES
from tools.hardware_table import planned

DEVICES = (8, 64, 512)


def command(args, devices: int) -> list[str]:
    """Returns the arguments of `plan` on that many GPUs."""
    if devices < 2:
        raise SystemExit(f"--devices: expected at least 2, got {devices}: one moves nothing")
    fsdp, tensor = args.fsdp, args.tensor
    data, left = divmod(devices, fsdp * tensor)
    if left or not data:
        raise SystemExit(f"fsdp {fsdp} x tensor {tensor} does not divide {devices} devices")
    ways = data * fsdp
    batch = args.batch or args.rows * ways
    micro, left = divmod(batch, ways)
    if left or not micro:
        raise SystemExit(f"--batch: expected a multiple of {ways} rows, got {batch}")
    fields = [f"batch_size={batch}", f"accumulation={micro}"]
    fields += [f"rl.chunks={micro}"] if args.stage == "grpo" else []
    fields += args.set
    return [
        "plan",
        *planned(args.stage, args.decoder),
        f"--mesh=data:{data},fsdp:{fsdp},tensor:{tensor}",
        *(f"--config.stage.{args.stage}.{field}" for field in fields),
    ]


def row(args, devices: int) -> tuple[str, str]:
    """Returns a row of the table, and the plan's lines on collectives."""
    arguments = command(args, devices)
    print(" ".join(arguments), file=sys.stderr, flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "mm_jax", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    out = done.stdout

    def find(pattern: str) -> float:
        found = re.search(pattern, out)
        if done.returncode or not found:
            raise SystemExit(f"plan failed:\n{out}{done.stderr}")
        return float(found[1])

    memory = find(r"([\d.]+) GB of 1000")
    computing = find(r"MFU on \d+ \w+: ([\d.]+) s")
    if "decoding alone" in out:
        computing += find(r"decoding alone takes at least ([\d.]+) s")
    moving = find(r"between hosts: ([\d.]+) s")
    overlapped, apart = max(computing, moving), computing + moving
    mesh, batch = (
        re.search(rf"{word}=(\S+)", " ".join(arguments))[1] for word in ("mesh", "batch_size")
    )
    cells = [
        str(devices), mesh, batch, f"{memory:.0f}", f"{computing:.2f}", f"{moving:.2f}",
        f"{computing / overlapped:.0%}", f"{computing / apart:.0%}",
    ]  # fmt: skip
    start = out.index("collectives of a step")
    return "| " + " | ".join(cells) + " |", out[start : out.index("\nlinks:")]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--stage", choices=("sft", "grpo"), default="sft")
    add("--decoder", choices=SIZES, default="", help="default: Qwen2-7B")
    add("--devices", type=int, nargs="+", default=DEVICES)
    add("--fsdp", type=int, default=8)
    add("--tensor", type=int, default=1)
    add("--rows", type=int, default=2, help="per GPU, for weak scaling (default 2)")
    add("--batch", type=int, help="rows in all, for strong scaling")
    add("--set", nargs="*", default=[], help="fields of the stage, such as lora.rank=64")
    args = parser.parse_args(argv)
    print("| GPUs | mesh | rows | GB a GPU | computing, s | moving, s | overlapped | apart |")
    print("|" + "---|" * 8)
    for devices in args.devices:
        cells, detail = row(args, devices)
        print(cells, flush=True)
        print(detail, file=sys.stderr, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
