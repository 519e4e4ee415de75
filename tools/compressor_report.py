"""How much of a history its memory holds: reconstruction by a run's compressor on a held-out split.

    python tools/compressor_report.py --checkpoint RUN [--stage conversations] [--limit 64]

Of every unit of the stage (utterances or conversations): accuracy of the next token given the text
before it, with its own memory, with blank memory vectors and with another unit's, beside the train
split's likeliest token; and of the greedy reconstruction ROUGE-L and the share of its lines whose
emotion and strategy are those of the history. Prints a table; --json FILE keeps it.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import pathlib
import re
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from mm_jax.__main__ import set_up_process

CAPTION = re.compile(r"(Client|Therapist)(?:\(([^)]*)\))?(?: \(([^)]*)\))?")
MEMORIES = ("its own memory", "another's memory", "blank memory")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", required=True, type=pathlib.Path, help="run folder of train")
    add("--stage", help="a finished stage with objective compressor (default: the last)")
    add("--split", choices=("train", "val", "test"), default="val")
    add("--limit", type=int, default=64, help="units, evenly spread over the split")
    add("--json", type=pathlib.Path, help="write the results here too")
    args = parser.parse_args(argv)
    set_up_process()
    from mm_jax.config import ConfigError
    from mm_jax.training.checkpoint import CheckpointError

    try:
        found = report(args)
    except (ConfigError, CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{found['stage']}, {found['units']} units of {args.split}: next tokens that are right")
    for name, value in found["token_accuracy"].items():
        print(f"  {name:<32}{100 * value:6.1f} %")
    print("greedy reconstruction from its own memory")
    print(f"  {'ROUGE-L':<32}{100 * found['rouge_l']:6.1f}")
    for name, value in found["labels"].items():
        print(f"  {name + ' recovered':<32}{100 * value:6.1f} %")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))
    return 0


def report(args: argparse.Namespace) -> dict:
    import jax
    import numpy as np

    from mm_jax import build
    from mm_jax.config import read_config, require
    from mm_jax.data.datasets.common import SampleSource
    from mm_jax.data.pipeline import Loader, list_items
    from mm_jax.evaluation.metrics import rouge_l
    from mm_jax.session import Session, read_stages
    from mm_jax.stages import evaluation_batches
    from mm_jax.training.sharding import fetch, put_whole_batch

    config = read_config(args.checkpoint / "config.json")
    config.lock()
    finished = read_stages(args.checkpoint)
    able = [s for s in config.stages if config.stage[s].objective == "compressor" and s in finished]
    require(bool(able), f"--checkpoint: {args.checkpoint} has no finished compressor stage")
    stage = args.stage or able[-1]
    require(stage in able, f"--stage: expected one of {able}, got {stage!r}")
    require(args.limit > 0, "--limit: expected at least 1")
    session = Session.open(config, args.checkpoint)
    params, _ = session.stage_params(stage)
    task = dataclasses.replace(build.stage_task(config, config.stage[stage]), label_dropout=0.0)
    source = SampleSource(config.data.folder, args.split)
    items, _ = list_items(source, task, session.prompter)
    count = min(args.limit, len(items))
    items = [items[i * len(items) // count] for i in range(count)]
    loader = Loader(source, task, session.prompter, build.buckets(config))
    programs = make_programs(session)
    tok = session.tokenizer
    right, total = collections.Counter(), 0
    likeliest = unigram(config, session, task)
    rouge, labels = [], collections.Counter()
    for planned, real in evaluation_batches(items, session.predictor().batch_size, "text"):
        _, batch = loader(planned)
        batch.loss_weights[real:] = 0
        targets = batch.loss_weights > 0
        total += int(targets.sum())
        right["train's likeliest token"] += int((batch.tokens[targets] == likeliest).sum())
        with jax.set_mesh(session.abstract.mesh):
            placed = put_whole_batch(batch, session.abstract.mesh)
            for kind in MEMORIES:
                right[kind] += int(fetch(programs["correct"](params, placed, kind)))
            prompt, length = prompts_alone(batch, tok.pad_id)
            placed = put_whole_batch(prompt, session.abstract.mesh)
            tokens = fetch(programs["greedy"](params, placed, length))
        for row in range(real):
            gold = tok.decode(batch.tokens[row][targets[row]])
            text = tok.decode(tokens[row])
            rouge.append(rouge_l(gold, text))
            labels.update(label_hits(gold, text))
    order = [*MEMORIES, "train's likeliest token"]
    return {
        "stage": stage,
        "split": args.split,
        "units": count,
        "token_accuracy": {name: right[name] / total for name in order},
        "rouge_l": float(np.mean(rouge)),
        "labels": {
            name: labels[name, "right"] / labels[name, "all"]
            for name in ("emotions", "strategies")
            if labels[name, "all"]
        },
    }


def make_programs(session) -> dict:
    """ "correct": number of right next tokens by kind of memory; "greedy": tokens [B, R]."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from mm_jax.models.qwen2 import token_log_probs
    from mm_jax.rl import sampler

    def memory_of(model, batch, kind):
        memory = model.mamba_compressor(batch.history_tokens, batch.memory_index)
        other = jnp.roll(memory, 1, axis=0)
        return {MEMORIES[0]: memory, MEMORIES[1]: other, MEMORIES[2]: jnp.zeros_like(memory)}[kind]

    def correct(params, batch, kind):
        model = nnx.merge(session.abstract.graph, params)
        lm = model.language_model
        hidden = lm(model.embed(batch, memory=memory_of(model, batch, kind)), batch.mask)
        targets = jnp.roll(batch.tokens, -1, axis=1)
        counted = jnp.roll(batch.loss_weights, -1, axis=1).at[:, -1].set(0) > 0
        padding = lm.config.vocab_padding
        found = token_log_probs(hidden, lm.head_kernel(), targets, vocab_padding=padding)
        return jnp.sum(counted & (found.best == targets))

    def greedy(params, batch, length):
        model = nnx.merge(session.abstract.graph, params)
        at = sampler.prefill(model, batch)
        keys = sampler.row_keys(jax.random.key(0), jnp.zeros((len(batch.tokens), 1), jnp.uint32))
        tok = session.tokenizer
        samples = sampler.generate(
            model.language_model,
            at,
            keys,
            stop_ids=(tok.end_id,),
            pad_id=tok.pad_id,
            max_new_tokens=length,
        )
        return samples.tokens[:, 0]

    return {
        "correct": jax.jit(correct, static_argnums=2),
        "greedy": jax.jit(greedy, static_argnums=2),
    }


def prompts_alone(batch, pad_id: int):
    """(the batch without its targets, a length that holds them all)."""
    import numpy as np

    real = batch.mask & ~(batch.loss_weights > 0)
    # Rows that only fill a batch up have no weights; they are cut to nothing worse than a prompt.
    tokens = np.where(real, batch.tokens, pad_id).astype(np.int32)
    longest = int((batch.loss_weights > 0).sum(axis=1).max())
    length = -(-(longest + 8) // 64) * 64
    weights = np.zeros_like(batch.loss_weights)
    return batch._replace(tokens=tokens, mask=real, loss_weights=weights), length


def unigram(config, session, task) -> int:
    """The likeliest target token of the train split."""
    import numpy as np

    from mm_jax.data.datasets.common import SampleSource
    from mm_jax.data.pipeline import list_items

    source = SampleSource(config.data.folder, "train", light=True)
    counts = np.zeros(session.model_config.llm.vocab_size, np.int64)
    for item in list_items(source, task, session.prompter)[0]:
        example = task.build(session.prompter, source[item.record], item.utterance, "text", False)
        np.add.at(counts, example.tokens[example.loss_weights > 0], 1)
    return int(counts.argmax())


def label_hits(gold: str, text: str) -> collections.Counter:
    """Of every line of a history: whether the same line of the reconstruction has its labels."""
    hits: collections.Counter = collections.Counter()
    lines = text.split("\n")
    for i, line in enumerate(gold.split("\n")):
        wanted = CAPTION.match(line)
        found = CAPTION.match(lines[i]) if i < len(lines) else None
        if wanted is None:
            continue
        for name, group in (("strategies", 2), ("emotions", 3)):
            if wanted[group]:
                hits[name, "all"] += 1
                hits[name, "right"] += bool(found and found[group] == wanted[group])
    return hits


if __name__ == "__main__":
    sys.exit(main())
