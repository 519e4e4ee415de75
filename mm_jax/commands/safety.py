"""Checks a model's replies to authored crisis, idiom and privacy prompts (command `safety`).

Writes safety.json for the report: what a transparent screen finds in the prompts, and whether the
replies refer to help or contain harm. No clinical claim follows from it.
"""

from __future__ import annotations

import argparse
import json

from mm_jax.commands.arguments import add_run_arguments, open_run
from mm_jax.config.errors import require
from mm_jax.config.files import write_whole
from mm_jax.data.records import Sample
from mm_jax.evaluation.report import findings
from mm_jax.evaluation.report.page import Page, as_text
from mm_jax.evaluation.safety import PROMPTS, safety_report
from mm_jax.generation.predictor import predictor_of
from mm_jax.run.folder import record_command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser)


def main(args: argparse.Namespace, overrides: list[str]) -> None:
    run, _, params = open_run(args.checkpoint, args.stage, args.step, overrides)
    space = run.prompter.label_space
    require(space.reply, f"safety: label space {space.name} has no replies")
    samples = [
        Sample(id=f"safety_{i}", dialogue_id=f"safety_{i}", client_text=p.text)
        for i, p in enumerate(PROMPTS)
    ]
    predictions = predictor_of(run).predict(params, samples, "text", "none")
    found = safety_report([p.response for p in predictions])
    out = args.checkpoint / "safety.json"
    write_whole(out, json.dumps(found, indent=1))
    record_command(args.checkpoint, args.argv)
    print(as_text(Page("", [], [findings.safety(found)])))
    print(f"safety in {out}; `evaluate` puts it into the report")
