"""Prints README's hardware table: on how many GPUs each kind of stage of the 7B network fits, or of
the network with another language model (--decoder, of configs/decoders.py).

Runs `plan` for every kind on 1, 2, 4 and 8 GPUs (fsdp), one prompt per GPU and micro-batch, with
the examples that `plan` takes by default: 4,096 tokens with 16 frames and 10 s of sound. Takes a
quarter of an hour.
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
from mm_jax.commands.plan import HEADROOM

MEMORIES = (24, 48, 80, 141)  # GB: RTX 4090, L40S, H100, H200
COUNTS = (1, 2, 4, 8)
BATCH = 16
LORA = ("lora.rank=64",)
KINDS = {
    "SFT, full": ("sft", ()),
    "SFT, LoRA": ("sft", LORA),
    "SFT, LoRA on nf4": ("sft", (*LORA, "lora.base=nf4")),
    "GRPO, full": ("grpo", ()),
    "GRPO, LoRA": ("grpo", LORA),
    "PPO, full": ("ppo", ()),
    "PPO, LoRA": ("ppo", LORA),
}


def planned(stage: str, decoder: str) -> list[str]:
    """Returns the arguments of `plan` that choose a kind of stage and a language model ("":
    Qwen2-7B); none is refused for its size."""
    words = ",".join(word for word in ("" if stage == "sft" else stage, decoder) if word)
    placeholders = 4  # tokens that mm_jax adds to a decoder's
    vocabulary = SIZES[decoder]["vocab_size"] + placeholders if decoder else 151650
    return [
        "--config=configs/base.py" + (f":{words}" if words else ""),
        f"--vocab_size={vocabulary}",
        "--hbm=1000GB",
    ]


def command(kind: str, gpus: int, decoder: str) -> list[str]:
    """Returns the arguments of `plan` for a kind of stage on that many GPUs."""
    name, fields = KINDS[kind]
    micro = BATCH // gpus
    fields = (f"batch_size={BATCH}", f"accumulation={micro}", *fields)
    if name != "sft":
        fields += (f"rl.chunks={micro}",)
    return [
        "plan",
        *planned(name, decoder),
        f"--mesh=data:1,fsdp:{gpus},tensor:1",
        *(f"--config.stage.{name}.{field}" for field in fields),
    ]


def needed(kind: str, gpus: int, decoder: str) -> float:
    """Returns the GB per GPU."""
    arguments = command(kind, gpus, decoder)
    print(" ".join(arguments), file=sys.stderr, flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "mm_jax", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    found = re.search(r"([\d.]+) GB of 1000", done.stdout)
    if done.returncode or not found:
        raise SystemExit(f"plan failed:\n{done.stdout}{done.stderr}")
    return float(found[1])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--decoder", choices=SIZES, default="", help="default: Qwen2-7B")
    args = parser.parse_args(argv)
    print("| | " + " | ".join(f"{memory} GB" for memory in MEMORIES) + " | GB per GPU |")
    print("|" + "---|" * (len(MEMORIES) + 2))
    for kind in args.kinds:
        sizes = {}
        for gpus in COUNTS:
            sizes[gpus] = needed(kind, gpus, args.decoder)
            if sizes[gpus] <= HEADROOM * MEMORIES[0]:
                break
        cells = []
        for memory in MEMORIES:
            fitting = [gpus for gpus, size in sizes.items() if size <= HEADROOM * memory]
            cells.append(str(fitting[0]) if fitting else "–")
        shown = ", ".join(f"{gpus}: {size:.0f}" for gpus, size in sizes.items())
        print(f"| {kind} | {' | '.join(cells)} | {shown} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
