"""Reports how well a run's compressor reconstructs histories of a held-out split.

    python tools/compressor_report.py --checkpoint RUN [--stage conversations] [--utterances 1]

A unit is the stage's, or --utterances consecutive utterances. The report gives the accuracy of the
next token, given the text before it, and of whole captions (a line's role and labels): with the
unit's own memory, with blank memory vectors, with another unit's memory, and for comparison of the
train split's likeliest token (line numbers count throughout). For greedy reconstructions it gives
ROUGE-L and the share of lines with the right emotion and strategy. Prints a table; --json FILE
saves it.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from mm_jax.__main__ import set_up_process


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", required=True, type=pathlib.Path, help="run folder of train")
    add("--stage", help="a finished stage with objective compressor (default: the last)")
    add("--utterances", type=int, help="consecutive utterances per unit; 0: whole conversations")
    add("--split", choices=("train", "val", "test"), default="val")
    add("--limit", type=int, default=64, help="units, evenly spread over the split")
    add("--json", type=pathlib.Path, help="also write the results to this file")
    args = parser.parse_args(argv)
    set_up_process()
    from mm_jax.config.errors import UserError

    try:
        found = report(args)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    kind = f"utterances in a row: {found['utterances']}"
    kind = kind if found["utterances"] else "whole conversations"
    print(f"{found['stage']}, {found['units']} units of {args.split}, {kind}")
    if found["left_out"]:
        print(f"  left out: {found['left_out']}")
    print(f"right given the text before, %{'tokens':>10}{'captions':>10}")
    for name, value in found["token_accuracy"].items():
        caption = found["caption_accuracy"].get(name)
        shown = "" if caption is None else f"{100 * caption:10.1f}"
        print(f"  {name:<28}{100 * value:10.1f}{shown}")
    print("greedy reconstruction from its own memory")
    for name, value in found["greedy"].items():
        shown = "ROUGE-L" if name == "rouge_l" else f"{name} recovered, %"
        print(f"  {shown:<28}{100 * value:10.1f}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))
    return 0


def report(args: argparse.Namespace) -> dict:
    from mm_jax.config.errors import require
    from mm_jax.config.load import read_config
    from mm_jax.data.datasets.common import SampleSource
    from mm_jax.data.pipeline import Loader, evaluation_batches, list_items
    from mm_jax.generation.predictor import predictor_of
    from mm_jax.generation.reconstruction import (
        MEMORIES,
        Reconstructor,
        reconstruction_metrics,
        whole_runs,
    )
    from mm_jax.run import build
    from mm_jax.run.build import Run
    from mm_jax.run.folder import read_stages
    from mm_jax.training.checkpoint import load_stage

    require(args.json is None or args.json.parent.is_dir(), f"--json: no folder for {args.json}")
    require(args.limit > 1, f"--limit: expected at least 2, got {args.limit}")
    wanted = args.utterances
    require(wanted is None or wanted >= 0, f"--utterances: expected at least 0, got {wanted}")
    config = read_config(args.checkpoint / "config.json")
    finished = read_stages(args.checkpoint)
    able = [s for s in config.stages if config.stage[s].objective == "compressor" and s in finished]
    require(bool(able), f"--checkpoint: {args.checkpoint} has no finished compressor stage")
    stage = args.stage or able[-1]
    require(stage in able, f"--stage: expected one of {able}, got {stage!r}")
    run = Run.open(config, args.checkpoint)
    params, _ = load_stage(run, stage)
    recipe = build.stage_recipe(config, config.stage[stage]).without_dropout()
    if wanted is not None:
        recipe = dataclasses.replace(recipe, utterances=wanted)
    written = config.stage[stage].with_response
    # The weight marks captions among the targets.
    prompter = dataclasses.replace(run.prompter, with_response=written, label_weight=2.0)
    source = SampleSource(config.data.folder, args.split, light=True)
    items, refused = list_items(source, recipe, prompter)
    require(
        len(items) > 1,
        f"--split: expected at least 2 units of {args.split} that fit, got {len(items)} (left out: "
        f"{dict(refused)})",
    )
    count = min(args.limit, len(items))
    items = [items[i * len(items) // count] for i in range(count)]
    shapes = build.shapes(config, run.model_config, [item.lengths for item in items])
    loader = Loader(source, recipe, prompter)
    reconstructor = Reconstructor(run.abstract, run.tokenizer)
    right, total, batches = collections.Counter(), 0, []
    whole, captions = collections.Counter(), 0
    likeliest = unigram(config, run, recipe, prompter)
    rows = max(2, predictor_of(run).batch_size)  # another unit's memory needs a second row
    for planned, real in evaluation_batches(items, rows, "text", shapes):
        _, batch = loader(planned)
        batch.loss_weights[real:] = 0
        targets = batch.loss_weights > 0
        total += int(targets.sum())
        right["train's likeliest token"] += int((batch.tokens[targets] == likeliest).sum())
        for kind in MEMORIES:
            hits = reconstructor.right(params, batch, kind)
            right[kind] += int(hits[targets].sum())
            recalled, shown = whole_runs(batch.loss_weights == 2, hits)
            whole[kind] += recalled
        captions += shown
        batches.append((batch, real))
    texts = reconstructor.texts(params, batches)
    order = [*MEMORIES, "train's likeliest token"]
    return {
        "stage": stage,
        "utterances": recipe.utterances,
        "split": args.split,
        "units": count,
        "left_out": dict(refused),
        "token_accuracy": {name: right[name] / total for name in order},
        "caption_accuracy": {name: whole[name] / captions for name in MEMORIES},
        "greedy": reconstruction_metrics(texts, run.prompter.label_space),
    }


def unigram(config, run, recipe, prompter) -> int:
    """Finds the likeliest target token of the train split."""
    import numpy as np

    from mm_jax.data.datasets.common import SampleSource
    from mm_jax.data.pipeline import list_items

    source = SampleSource(config.data.folder, "train", light=True)
    counts = np.zeros(run.model_config.llm.vocab_size, np.int64)
    for item in list_items(source, recipe, prompter)[0]:
        example = recipe.build(prompter, source[item.record], item.first, "text", False)
        np.add.at(counts, example.tokens[example.loss_weights > 0], 1)
    return int(counts.argmax())


if __name__ == "__main__":
    sys.exit(main())
