"""Counts the programs of a stage and the padding of its batches, from lengths alone.

    python tools/shapes_report.py --config configs/base.py --stage sft \\
        --config.data.folder=data/mesc/text/1.0.0 --config.data.tokenizer=DIR

Samples without media are counted as if every turn had `frames` pictures and the sound of its words
(1 to 30 s); --frames 0 leaves them as they are.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import pathlib
import sys
import tempfile

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from mm_jax.config.load import load_config, resolve
from mm_jax.data.datasets.common import SampleSource
from mm_jax.data.pipeline import BatchSchedule, list_items
from mm_jax.data.records import Sample
from mm_jax.run import build, flops


@dataclasses.dataclass
class WithMedia:
    """Shows a split as if every turn had been filmed."""

    source: SampleSource
    frames: int
    words_a_second: float

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        sample = self.source[index]
        if len(sample.frames) or len(sample.fbank):
            return sample
        seconds = np.clip(len(sample.client_text.split()) / self.words_a_second, 1, 30)
        return dataclasses.replace(
            sample,
            frames=np.broadcast_to(np.uint8(0), (self.frames, 1, 1, 3)),
            fbank=np.broadcast_to(np.float32(0), (int(100 * seconds), 128)),
        )


def report(args: argparse.Namespace, overrides: list[str]) -> dict:
    config = resolve(load_config(args.config, overrides))
    stage = config.stage[args.stage]
    train = SampleSource(config.data.folder, "train", light=True)
    space = build.label_space(config)
    with tempfile.TemporaryDirectory() as empty:
        tokenizer = build.run_tokenizer(config, pathlib.Path(empty), space)
    network = build.model_config(config, tokenizer)
    base = build.prompter(config, network, tokenizer, space)
    recipe = build.stage_recipe(config, stage)
    source = WithMedia(train, args.frames, args.words_a_second) if args.frames else train
    items, refused = list_items(source, recipe, build.stage_prompter(base, stage, train))
    shapes = build.shapes(config, network, [item.lengths for item in items])
    grouped = config.data.group_by_length
    schedule = BatchSchedule(items, recipe, stage.batch_size, config.seed, 1, shapes, grouped)
    cost, batches = flops.row_cost(network), collections.Counter()
    real = padded = tokens = places = 0
    for step in range(schedule.steps_per_epoch):
        rows = schedule[step]
        batches[rows.shape] += 1
        padded += stage.batch_size * cost(np.array([rows.shape]))[0]
        real += cost(np.array([item.lengths for item in rows.items])).sum()
        tokens += sum(item.lengths.tokens for item in rows.items)
        places += stage.batch_size * rows.shape.tokens
    return {
        "examples": len(items),
        "left_out": dict(refused),
        "batches_of_an_epoch": [{**shape._asdict(), "batches": n} for shape, n in batches.items()],
        "programs": len(batches),
        "padding_share_of_flops": round(1 - float(real / padded), 4),
        "padding_share_of_tokens": round(1 - tokens / places, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="configs/NAME.py[:arg]")
    parser.add_argument("--stage", default="sft")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--words_a_second", type=float, default=2.5)
    args, rest = parser.parse_known_args()
    overrides = [option.removeprefix("--config.") for option in rest]
    print(json.dumps(report(args, overrides), indent=1))


if __name__ == "__main__":
    main()
