"""Import and export of a synthetic Qwen2 checkpoint, against transformers' from_pretrained.

    python tools/bench_checkpoint.py --folder DIR [--layers 28]

DIR gets a checkpoint of the 7B's shapes with random bfloat16 values (15.2 GB at 28 layers; kept,
so that the next run finds it) and the export (deleted). Every phase runs in a process of its own
with the files evicted from the page cache, in one run: from_pretrained and one touch of every page
(it maps the file), then import onto a virtual mesh of 4 devices, and export. Prints one JSON line:
seconds, GB/s and peak resident memory, and whether the exported bytes are the imported ones.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def make(folder: pathlib.Path, layers: int) -> None:
    """The checkpoint, written block by block."""
    import ml_dtypes
    import numpy as np
    from flax import nnx

    from mm_jax.models.qwen2 import Qwen2, Qwen2Config
    from mm_jax.weights import keymap
    from mm_jax.weights.load import param_shapes
    from mm_jax.weights.save import write_safetensors
    from mm_jax.weights.tensors import Tensor

    config = Qwen2Config(num_hidden_layers=layers)
    shapes = param_shapes(nnx.split(nnx.eval_shape(lambda: Qwen2(config, rngs=nnx.Rngs(0))))[1])
    noise = np.random.default_rng(0).normal(0, 0.02, 1 << 24).astype(ml_dtypes.bfloat16)
    tensors = {}
    for e in keymap.entries(shapes, keymap.QWEN2):
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


def memory() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def peer(folder: pathlib.Path) -> dict:
    import torch
    import transformers

    before, start = memory(), time.perf_counter()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    loaded = time.perf_counter() - start
    for p in model.parameters():
        p.detach().flatten()[::1024].float().sum()
    return {
        "seconds_to_return": round(loaded, 1),
        "seconds": round(time.perf_counter() - start, 1),
        "rss_before_gb": round(before, 2),
        "peak_rss_gb": round(memory(), 2),
    }


def ours(folder: pathlib.Path) -> dict:
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
    import dataclasses

    import jax

    from mm_jax.models.abstract import abstract_model
    from mm_jax.models.qwen2 import Qwen2
    from mm_jax.models.sharding import make_mesh
    from mm_jax.weights import keymap
    from mm_jax.weights.load import load_state
    from mm_jax.weights.save import tensors_of, write_safetensors
    from mm_jax.weights.sources import open_source
    from mm_jax.weights.tensors import read_folder

    jax.devices()
    before, start = memory(), time.perf_counter()
    source = open_source(str(folder))
    rows = source.tensors["model.embed_tokens.weight"].shape[0]
    config = dataclasses.replace(source.configs["llm"], vocab_size=rows)
    mesh = make_mesh({"data": 1, "fsdp": 4, "tensor": 1})
    abstract = abstract_model(lambda rngs: Qwen2(config, rngs=rngs), mesh)
    state = load_state(
        abstract.params,
        keymap.QWEN2,
        source.tensors,
        shardings=abstract.shardings,
        dtype=lambda path, dtype: dtype,
    )
    jax.block_until_ready(state)
    seconds, peak = time.perf_counter() - start, memory()
    sizes = [t.nbytes for t in source.tensors.values()]
    out = folder.with_name(folder.name + "_export")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    start = time.perf_counter()
    write_safetensors(out, tensors_of(state, keymap.QWEN2))
    export_seconds, export_peak = time.perf_counter() - start, memory()
    del state
    same = all(
        t.rows(a, b).tobytes() == source.tensors[k].rows(a, b).tobytes()
        for k, t in read_folder(out).items()
        for a, b in t.blocks()
    )
    shutil.rmtree(out)
    return {
        "seconds": round(seconds, 1),
        "gb": round(sum(sizes) / 1e9, 2),
        "largest_tensor_gb": round(max(sizes) / 1e9, 2),
        "rss_before_gb": round(before, 2),
        "peak_rss_gb": round(peak, 2),
        "allowed_rss_gb": round((sum(sizes) + 1.2 * max(sizes)) / 1e9, 2),
        "export_seconds": round(export_seconds, 1),
        "export_peak_rss_gb": round(export_peak, 2),
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
