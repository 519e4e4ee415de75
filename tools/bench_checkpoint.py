"""Times import and export of a synthetic Qwen2 checkpoint, against transformers' from_pretrained.

    python tools/bench_checkpoint.py --folder DIR [--layers 28]

Writes a checkpoint with the 7B's shapes and random bfloat16 values into DIR (15.2 GB at 28 layers;
kept for the next run), and an export, which is deleted. Every phase runs in its own process, after
the files were evicted from the page cache: from_pretrained with one touch of every page (it maps
the file), then import onto a virtual mesh of 4 devices, and export. Prints one JSON line: seconds,
processor time, GB/s, peak resident memory and its anonymous part (memory that is no mapped file
and cannot be reclaimed), and whether the exported bytes equal the imported ones.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import re
import resource
import shutil
import subprocess
import sys
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def make(folder: pathlib.Path, layers: int) -> None:
    """Writes the synthetic checkpoint block by block."""
    import ml_dtypes
    import numpy as np
    from flax import nnx

    from mm_jax.models.decoder import Decoder
    from mm_jax.models.decoder_config import DecoderConfig
    from mm_jax.weights import keymap
    from mm_jax.weights.load import param_shapes
    from mm_jax.weights.save import write_safetensors
    from mm_jax.weights.tensors import Tensor

    config = DecoderConfig(num_hidden_layers=layers)
    shapes = param_shapes(nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))[1])
    noise = np.random.default_rng(0).normal(0, 0.02, 1 << 24).astype(ml_dtypes.bfloat16)
    tensors = {}
    for e in keymap.entries(shapes, keymap.DECODER):
        shape = e.torch_shape(shapes[e.path])
        for key in e.keys:
            width = int(np.prod(shape[1:]))

            def rows(start, stop, shape=shape, width=width, shift=len(tensors)):
                flat = np.resize(np.roll(noise, shift * 977 + start), (stop - start) * width)
                return flat.reshape(stop - start, *shape[1:])

            tensors[key] = Tensor(shape, noise.dtype, rows)
    folder.mkdir(parents=True)
    write_safetensors(folder, tensors)
    values = {**config.to_hf_config(), "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(values))


def evict(folder: pathlib.Path) -> None:
    for file in folder.glob("*.safetensors"):
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Meter:
    """Measures time and memory from its creation on."""

    def __init__(self):
        self.peak_anonymous = 0
        self.before = self.resident()
        threading.Thread(target=self.watch, daemon=True).start()
        self.restart()

    def restart(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def watch(self) -> None:
        while True:
            status = pathlib.Path("/proc/self/status").read_text()
            anonymous = int(re.search(r"RssAnon:\s*(\d+)", status).group(1))
            self.peak_anonymous = max(self.peak_anonymous, anonymous)
            time.sleep(0.05)

    def resident(self) -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9

    def read(self, prefix: str = "") -> dict:
        return {
            f"{prefix}seconds": round(time.perf_counter() - self.wall, 1),
            f"{prefix}cpu_seconds": round(time.process_time() - self.cpu, 1),
            f"{prefix}peak_rss_gb": round(self.resident(), 2),
            f"{prefix}peak_anonymous_gb": round(self.peak_anonymous * 1024 / 1e9, 2),
        }


def peer(folder: pathlib.Path) -> dict:
    import torch
    import transformers

    meter = Meter()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    loaded = meter.read()["seconds"]
    for p in model.parameters():
        p.detach().flatten()[::1024].float().sum()
    return {
        "seconds_to_return": loaded,
        "rss_before_gb": round(meter.before, 2),
        **meter.read(),
    }


def ours(folder: pathlib.Path) -> dict:
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
    import dataclasses

    import jax

    from mm_jax.models.abstract import abstract_model
    from mm_jax.models.decoder import Decoder
    from mm_jax.models.sharding import make_mesh
    from mm_jax.weights import keymap
    from mm_jax.weights.load import load_state
    from mm_jax.weights.save import tensors_of, write_safetensors
    from mm_jax.weights.sources import open_source
    from mm_jax.weights.tensors import read_folder

    jax.devices()
    meter = Meter()
    source = open_source(str(folder))
    rows = source.tensors["model.embed_tokens.weight"].shape[0]
    config = dataclasses.replace(source.configs["llm"], vocab_size=rows)
    mesh = make_mesh({"data": 1, "fsdp": 4, "tensor": 1})
    abstract = abstract_model(lambda rngs: Decoder(config, rngs=rngs), mesh)
    state = load_state(
        abstract.params,
        keymap.DECODER,
        source.tensors,
        shardings=abstract.shardings,
        dtype=lambda path, dtype: dtype,
    )
    jax.block_until_ready(state)
    imported = meter.read()
    sizes = [t.nbytes for t in source.tensors.values()]
    out = folder.with_name(folder.name + "_export")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    meter.restart()
    write_safetensors(out, tensors_of(state, keymap.DECODER))
    exported = meter.read("export_")
    del state
    same = all(
        t.rows(a, b).tobytes() == source.tensors[k].rows(a, b).tobytes()
        for k, t in read_folder(out).items()
        for a, b in t.blocks()
    )
    shutil.rmtree(out)
    return {
        "gb": round(sum(sizes) / 1e9, 2),
        "largest_tensor_gb": round(max(sizes) / 1e9, 2),
        "rss_before_gb": round(meter.before, 2),
        **imported,
        "allowed_rss_gb": round((sum(sizes) + 1.2 * max(sizes)) / 1e9, 2),
        **exported,
        "exported_bytes_equal": same,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", required=True, type=pathlib.Path)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--phase", choices=("make", "peer", "ours"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = args.folder / f"qwen2_{args.layers}_layers"
    if args.phase:
        if args.phase == "make":
            make(folder, args.layers)
            return
        print(json.dumps({"peer": peer, "ours": ours}[args.phase](folder)))
        return
    if not folder.is_dir():
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--phase", "make"], check=True)
    found = {}
    for phase in ("peer", "ours"):
        evict(folder)
        command = [sys.executable, __file__, *sys.argv[1:], "--phase", phase]
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found[phase] = json.loads(printed.splitlines()[-1])
    gigabytes = found["ours"]["gb"]
    result = {
        "benchmark": "checkpoint",
        "date": datetime.date.today().isoformat(),
        "cores": len(os.sched_getaffinity(0)),
        "dtype": "bfloat16",
        "layers": args.layers,
        "import_gb_per_second": round(gigabytes / found["ours"]["seconds"], 2),
        "export_gb_per_second": round(gigabytes / found["ours"]["export_seconds"], 2),
        "peer_gb_per_second": round(gigabytes / found["peer"]["seconds"], 2),
        "ratio": round(found["peer"]["seconds"] / found["ours"]["seconds"], 2),
        **found,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
