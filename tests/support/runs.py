"""Trains runs for the tests, and reads their folders."""

import json

import numpy as np

from mm_jax import stages
from mm_jax.config.load import resolve, save_config
from mm_jax.run.build import Run
from mm_jax.training.checkpoint import Checkpoints, load_stage

CONFIG_FILE = """
import pathlib
from ml_collections import ConfigDict
from mm_jax.config.load import read_config

def get_config(arg=""):
    return ConfigDict(read_config(pathlib.Path(__file__).with_suffix(".json")).model_dump())
"""


def config_file(config, folder):
    """Writes a config file that returns `config`."""
    save_config(resolve(config), folder / "run.json")
    (folder / "run.py").write_text(CONFIG_FILE)
    return str(folder / "run.py")


def losses(workdir):
    """Reads (step, loss) from every complete line of metrics.jsonl that has a loss."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [(r["step"], r["loss"]) for r in rows if "loss" in r]


def letters(requests):
    """Rewards the share of a's and e's, which a tiny model learns in a few steps."""
    texts = [r.completion for r in requests]
    return [sum(t.count(x) for x in "ae") / max(len(t), 1) for t in texts]


def records(workdir, key="reward"):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [r for r in rows if key in r]


def samples(workdir):
    return [json.loads(line) for line in (workdir / "samples.jsonl").read_text().splitlines()]


def room(examples, tokens=384, fbank=320, history=512, memory=16):
    """Returns one shape for all examples of a test; what they do not have stays absent."""
    from mm_jax.data.batch import Shape, lengths_of
    from mm_jax.data.shapes import joined

    own = joined([lengths_of(e) for e in examples])
    most = Shape(tokens, own.frames, fbank, history, memory)
    return Shape(*(size if n else 0 for size, n in zip(most, own, strict=True)))


def two_batches(rl, session):
    from mm_jax.data.batch import collate
    from mm_jax.data.datasets.common import SampleSource
    from mm_jax.data.history import history_labels

    source = SampleSource(rl.data.folder, "train")
    chosen = [s for s in (source[i] for i in range(len(source))) if len(s.frames) and len(s.fbank)]
    chosen = chosen[:8]
    out = {}
    for modality in ("av", "a", "v", "text"):
        examples = [
            session.prompter.example(s, modality, history_labels(s, "gold"), with_answer=False)
            for s in chosen
        ]
        out[modality] = collate(examples, session.tokenizer.pad_id, room(examples))
    return chosen, out


def leaves(config, workdir, stage):
    """Reads all parameters of a stage's newest checkpoint, by path."""
    session = open_run(config, workdir)
    checkpoints = Checkpoints(workdir / "checkpoints" / stage)
    step = checkpoints.steps()[-1]
    checkpoints.close()
    params, _ = load_stage(session, stage, step)
    return {path: np.asarray(v.get_value()) for path, v in params.flat_state()}


def train(config, workdir, resume=False, overwrite=False, wandb_project=""):
    """Trains the stages of a ConfigDict."""
    stages.train(resolve(config), workdir, resume, overwrite, wandb_project)


def open_run(config, workdir):
    """Opens the run of a ConfigDict."""
    return Run.open(resolve(config), workdir)
