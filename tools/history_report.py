"""Reports what the conversation compressor saves on MESC: tokens, prefill FLOPs and cache bytes.

    python tools/history_report.py --raw DIR --tokenizer DIR --out DIR [--split test]

--raw is the folder with MESC.csv and the split's json, --tokenizer one with a tokenizer (Qwen2's).
An utterance is counted as the compressor reads it (role, labels, text and `<MEM>`), with and
without the json's machine-written clue sentences, and by its text alone; with clue sentences, one
vector saves the paper's 98.6 %. Histories are those of the split's samples, without clue sentences,
and as text they are what data.history=text puts into the prompt. FLOPs and bytes are those of the
language model's layers (Qwen2-7B in bfloat16), next to the compressor's (mamba-370m). Writes
history_report.json and history_report.png, and prints a table.

--quality NAME=RUN ... adds the scores of evaluated runs of the same small model that differ only in
the history: as memory vectors, as text (data.history=text), or none.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import statistics
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from mm_jax.config.errors import ConfigError
from mm_jax.config.files import read_json
from mm_jax.data.datasets.mesc.mesc_dataset_builder import read_splits, read_utterances
from mm_jax.data.history import (
    MemoryBudget,
    encode_history,
    history_labels,
    history_line,
    newest_lines,
)
from mm_jax.data.labels import built_in
from mm_jax.data.records import dialogue_samples
from mm_jax.data.tokenizer import Tokenizer
from mm_jax.models.decoder_config import DecoderConfig
from mm_jax.models.mamba import MambaConfig
from mm_jax.run.flops import decoder_flops, mamba_flops

LLM, COMPRESSOR = DecoderConfig(), MambaConfig()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--raw", required=True, type=pathlib.Path)
    add("--tokenizer", required=True, type=pathlib.Path)
    add("--out", required=True, type=pathlib.Path)
    add("--split", default="test", choices=("val", "test"))
    add("--memory_vectors", type=int, default=1, help="memory vectors per group of utterances")
    add("--memory_utterances", type=int, default=1, help="utterances per group")
    add(
        "--quality",
        nargs="+",
        default=[],
        metavar="NAME=RUN",
        help="evaluated runs, such as memory=A text=B none=C",
    )
    args = parser.parse_args(argv)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        quality = dict(read_quality(entry) for entry in args.quality)
        budget = MemoryBudget(args.memory_vectors, args.memory_utterances)
        tok = Tokenizer.load(args.tokenizer)
        report = {
            "split": args.split,
            "budget": {"vectors": budget.vectors, "utterances": budget.utterances},
            "utterances": utterance_tokens(args.raw, args.split, tok, budget),
            "histories": history_tokens(args.raw, args.split, tok, budget),
            "quality": quality,
        }
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    (args.out / "history_report.json").write_text(json.dumps(report, indent=1))
    plot(report, args.out / "history_report.png")
    print_report(report)
    return 0


def read_quality(entry: str) -> tuple[str, dict]:
    """Parses NAME=RUN; returns the name, and accuracies and ROUGE-L of the run's first system."""
    name, _, run = entry.partition("=")
    if not run:
        raise ConfigError(f"--quality: expected NAME=RUN, got {entry!r}")
    path = pathlib.Path(run) / "metrics.json"
    own = read_json(path)
    if not isinstance(own, dict) or not own.get("systems"):
        raise ConfigError(f"--quality: {path} is not what `evaluate` writes")
    standard = own["systems"][0]["standard"]
    scores = {
        task: {key: m[key] for key in ("accuracy", "interval", "n")}
        for task, m in standard.items()
        if task != "response"
    }
    return name, {
        "dataset": own["dataset"],
        "labels": scores,
        "rouge_l": standard.get("response", {}).get("rouge_l"),
    }


def utterance_tokens(raw: pathlib.Path, split: str, tok: Tokenizer, budget: MemoryBudget) -> dict:
    """Computes mean tokens per utterance, counted in three ways, and what share memory saves."""
    utterances = read_utterances(raw, split)

    def line(utterance) -> int:
        caption, text = history_line(utterance, utterance.labels, built_in("mesc"))
        return len(tok.encode(caption)) + len(tok.encode_data(text)) + 1

    bare = [dataclasses.replace(u, clue="") for u in utterances]
    counts = {
        "whole line, with clue sentences": [line(u) for u in utterances],
        "whole line, without": [line(u) for u in bare],
        "text alone, without": [len(tok.encode_data(u.text)) for u in bare],
    }
    vectors = budget.vectors / budget.utterances
    means = {name: statistics.fmean(tokens) for name, tokens in counts.items()}
    return {name: {"tokens": m, "saved": 1 - vectors / m} for name, m in means.items()}


def history_tokens(raw: pathlib.Path, split: str, tok: Tokenizer, budget: MemoryBudget) -> list:
    """Lists each history's tokens as text and as memory vectors, and the cost of both."""
    rows, space = [], built_in("mesc")
    for dialogue in read_splits(raw, clues=False)[split]:
        kept = 0  # tokens of the dialogue that its memory need not read again
        for sample in dialogue_samples(dialogue):
            if not sample.history:
                continue
            labels = history_labels(sample, "gold")
            ids, memory = encode_history(sample, tok, labels, space, budget)
            text, vectors = len(newest_lines(sample, tok, labels, space)[1]), len(memory)
            rows.append(
                {
                    "dialogue": dialogue.id,
                    "utterances": len(sample.history),
                    "compressor_tokens": len(ids),
                    "compressor_tokens_after_memory": len(ids) - kept,
                    "text_tokens": text,
                    "memory_vectors": vectors,
                    "text_gflop": layer_flops(text) / 1e9,
                    "memory_gflop": layer_flops(vectors) / 1e9,
                    "compressor_gflop": mamba_flops(COMPRESSOR, 1, len(ids)) / 1e9,
                    "text_cache_bytes": text * cache_bytes(LLM),
                    "memory_cache_bytes": vectors * cache_bytes(LLM),
                }
            )
            kept = budget.settled(len(sample.history), memory)
    return rows


def layer_flops(tokens: int) -> float:
    """Computes the FLOPs of prefill without the head, which reads only one position."""
    flops = decoder_flops(LLM, 1, tokens)
    return flops["matrices"] + flops["attention"]


def cache_bytes(c: DecoderConfig) -> int:
    """Returns the bytes of one token's keys and values in bfloat16."""
    return 2 * 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim


def plot(report: dict, path: pathlib.Path) -> None:
    rows = report["histories"]
    by_length: dict[int, list] = {}
    for row in rows:
        by_length.setdefault(row["utterances"], []).append(row)
    lengths = sorted(by_length)
    panels = 4 if report["quality"] else 3
    fig, axes = plt.subplots(1, panels, figsize=(4.4 * panels, 3.6))
    if report["quality"]:
        plot_quality(report["quality"], axes[3])
    for axis, what, label, scale in (
        (axes[0], ("text_tokens", "memory_vectors"), "positions the language model reads", 1),
        (axes[1], ("text_gflop", "memory_gflop"), "prefill TFLOP", 1e3),
        (axes[2], ("text_cache_bytes", "memory_cache_bytes"), "key-value cache, MB", 1e6),
    ):
        for key, name, colour in zip(
            what, ("history as text", "memory vectors"), ("#8d5ba8", "#4a9a5b"), strict=True
        ):
            means = [statistics.fmean(r[key] for r in by_length[n]) / scale for n in lengths]
            axis.plot(lengths, means, marker=".", label=name, color=colour)
        if what[0] == "text_gflop":
            means = [
                statistics.fmean(r["compressor_gflop"] for r in by_length[n]) / scale
                for n in lengths
            ]
            axis.plot(lengths, means, "--", label="compressor, whole history", color="#c9a227")
        axis.set_xlabel("utterances in the history")
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.legend(frameon=False, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    fig.suptitle(f"MESC {report['split']}, Qwen2-7B", fontsize=11)
    fig.tight_layout()
    fig.savefig(path, dpi=130)
    plt.close(fig)


def plot_quality(quality: dict, axis) -> None:
    """Plots the accuracy of every label task by what the model sees of the history."""
    tasks = list(next(iter(quality.values()))["labels"])
    width = 0.8 / len(quality)
    for i, (name, own) in enumerate(quality.items()):
        mean = [own["labels"][t]["accuracy"] for t in tasks]
        low = [m - own["labels"][t]["interval"][0] for m, t in zip(mean, tasks, strict=True)]
        high = [own["labels"][t]["interval"][1] - m for m, t in zip(mean, tasks, strict=True)]
        at = [k + i * width for k in range(len(tasks))]
        axis.bar(at, mean, 0.9 * width, yerr=[low, high], capsize=2, label=f"history: {name}")
    places = [k + (len(quality) - 1) * width / 2 for k in range(len(tasks))]
    axis.set_xticks(places, [t.replace("_", "\n") for t in tasks])
    axis.set_ylabel("accuracy, %, with 95 % interval")
    axis.set_title(next(iter(quality.values()))["dataset"], fontsize=8)
    axis.legend(frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def print_report(report: dict) -> None:
    rows = report["histories"]
    print(f"{'an utterance of ' + report['split']:<36}{'tokens':>8}{'saved by a vector':>20}")
    for name, entry in report["utterances"].items():
        print(f"{'  ' + name:<36}{entry['tokens']:8.1f}{100 * entry['saved']:18.2f} %")
    total = lambda key: sum(r[key] for r in rows)  # noqa: E731
    print(f"\n{len(rows)} histories, mean of each:{'as text':>17}{'as memory':>12}{'saved':>9}")
    for name, text, memory, scale in (
        ("positions", "text_tokens", "memory_vectors", 1),
        ("prefill TFLOP", "text_gflop", "memory_gflop", 1e3),
        ("key-value cache, MB", "text_cache_bytes", "memory_cache_bytes", 1e6),
    ):
        a, b = (total(key) / len(rows) / scale for key in (text, memory))
        print(f"  {name:<30}{a:>13.2f}{b:>12.2f}{100 * (1 - b / a):>8.1f} %")
    afresh, further = total("compressor_tokens"), total("compressor_tokens_after_memory")
    print(
        f"  tokens the compressor reads: {afresh:,} with every history afresh, "
        f"{further:,} with the memory kept ({afresh / further:.1f}x fewer)"
    )
    mean = total("compressor_gflop") / len(rows) / 1e3
    print(f"  the compressor reads a whole history for {mean:.3f} TFLOP")
    for name, own in report["quality"].items():
        shown = ", ".join(
            f"{task} {m['accuracy']:.1f} ({m['interval'][0]:.1f} to {m['interval'][1]:.1f})"
            for task, m in own["labels"].items()
        )
        if own["rouge_l"] is not None:
            shown += f", ROUGE-L {own['rouge_l']:.2f}"
        print(f"  history as {name}, {own['dataset']}: {shown}")


if __name__ == "__main__":
    sys.exit(main())
