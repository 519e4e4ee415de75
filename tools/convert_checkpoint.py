"""Reads released weights of any layout (docs/checkpoints.md), checks them, and makes a run folder.

    python tools/convert_checkpoint.py --from SOURCE                    # list its parts
    python tools/convert_checkpoint.py --from SOURCE --check            # compare with transformers
    python tools/convert_checkpoint.py --from SOURCE --out RUN          # for predict and export

SOURCE is a local folder or file, or a Hugging Face hub id. Weights keep their precision. Training
reads sources directly: see `init_from` in docs/config.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import pathlib
import shutil
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from mm_jax.__main__ import set_up_process


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--from", dest="source", required=True, help="folder, file or hub id")
    add("--adapter", default="", help="PEFT LoRA folder or hub id to merge into it")
    add("--out", type=pathlib.Path, help="new run folder")
    add("--tokenizer", default="", help="tokenizer folder (default: the source's)")
    add("--num_frames", type=int, help="frames of a video in --out's predictions (default: 8)")
    add(
        "--check",
        nargs="?",
        const="transformers",
        metavar="VECTORS",
        help="compare with transformers, or with the logits stored in an npz file",
    )
    args, rest = parser.parse_known_args(argv)
    overrides = [a.removeprefix("--config.") for a in rest if a.startswith("--config.")]
    if len(overrides) != len(rest):
        parser.error(f"unrecognised arguments: {' '.join(rest)}")
    set_up_process()
    from mm_jax.config.errors import UserError

    try:
        convert(args, overrides)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def convert(args: argparse.Namespace, overrides: list[str]) -> None:
    from mm_jax.config.errors import require
    from mm_jax.config.load import load_config
    from mm_jax.config.schema import InitFrom
    from mm_jax.run.remote_code import read_processor
    from mm_jax.run.start import read_sources
    from mm_jax.weights.check import check_source, read_vectors, report

    require(
        args.out is None or not os.path.lexists(args.out),
        f"--out: {args.out} exists; remove it or name another folder",
    )
    vectors = None
    if args.check and args.check != "transformers":
        vectors = read_vectors(pathlib.Path(args.check))
    base = str(ROOT / "configs" / "base.py")
    config = load_config(base, overrides)
    config.init_from.model, config.init_from.adapter = args.source, args.adapter
    config.data.tokenizer = args.tokenizer
    source = read_sources(InitFrom(**config.init_from.to_dict()))
    describe(source)
    if args.check:
        report(check_source(source, vectors))
    if args.out is not None:
        found = read_processor(source.folder)
        fields, spec, space = found or ({}, None, None)
        require(
            found is not None or not source.is_exported,
            f"--out: {source.name} has no processor_config.json, which says how its prompts are "
            "written; save it there by processor.save_pretrained",
        )
        require(
            spec is None or args.num_frames is None,
            f"--num_frames: the processor of {source.name} says {spec and spec.num_frames}",
        )
        # What the command line names takes precedence.
        own = load_config(base, [f"{k}={v}" for k, v in fields.items()] + overrides)
        config.data, config.predict = own.data, own.predict
        config.data.tokenizer = args.tokenizer
        write_run(config, source, args.out, spec, space, args.num_frames or 8)


def describe(source) -> None:
    """Prints the parts of a source: tensors, parameters and their types."""
    from mm_jax.weights.sources import group_of

    print(f"{source.name}:")
    for group in sorted(source.groups):
        own = [t for k, t in source.tensors.items() if group_of(k) == group]
        count = sum(t.nbytes // t.dtype.itemsize for t in own)
        kinds = ", ".join(sorted({str(t.dtype) for t in own}))
        print(f"  {'.'.join(group):<36} {len(own):>5} tensors {count:>15,} parameters  {kinds}")
    print(f"  tokenizer: {'yes' if source.has_tokenizer else 'no'}")


def write_run(config, source, out: pathlib.Path, spec, space, num_frames: int) -> None:
    from configs.base import stage
    from mm_jax.config.errors import require
    from mm_jax.config.load import resolve, save_config
    from mm_jax.config.model import MODULES
    from mm_jax.data.labels import write_labels
    from mm_jax.data.media import MediaSpec
    from mm_jax.run.build import Run, label_space
    from mm_jax.run.folder import IMPORTED, MEDIA_FILE, write_stages
    from mm_jax.run.start import apply_sources, start_params
    from mm_jax.training.checkpoint import Checkpoints

    require(
        ("language_model",) in source.groups,
        f"--out: a run needs a language model; {source.name} has none",
    )
    modules = {group[0] for group in source.groups}
    parts = dict.fromkeys(part for m, part in MODULES.items() if part and m in modules)
    if space is None and not config.data.label_space:
        config.data.label_space = "mesc"
    with config.unlocked():
        config.model.parts = tuple(parts)
        config.stages = (IMPORTED,)
        config.stage = {IMPORTED: stage(trainable=("language_model",))}
    config = apply_sources(resolve(config))
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write_labels(partial, space or label_space(config))
        run = Run.open(config, partial)
        params = start_params(config, run.create, run.abstract, lambda path, dtype: dtype)
        checkpoints = Checkpoints(partial / "checkpoints" / IMPORTED)
        checkpoints.save_params(params, {"stage": IMPORTED, "seed": config.seed})
        checkpoints.close()
        save_config(config, partial / "config.json")
        vision = run.model_config.vision
        if spec is None:
            side = vision.image_size if vision else 384
            spec = MediaSpec(num_frames=num_frames, image_size=side)
        (partial / MEDIA_FILE).write_text(json.dumps(dataclasses.asdict(spec)))
        write_stages(partial, {IMPORTED: 0})
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    logging.getLogger(__name__).info("%s: a run folder for predict and export", out)


if __name__ == "__main__":
    sys.exit(main())
