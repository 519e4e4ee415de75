"""Checks a folder of `export --layout transformers`: what its own code computes, in a process of
its own, must be what `predict` computes with the folder's weights."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import pickle
import subprocess
import sys
import tempfile
import unicodedata
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from flax import nnx

from mm_jax.config.files import read_json
from mm_jax.data.answers import cut_at_fields
from mm_jax.data.batch import collate
from mm_jax.data.conversation import history_of, own_sample
from mm_jax.data.media import MediaSpec
from mm_jax.data.prompts import PromptError
from mm_jax.data.records import CLIENT, THERAPIST
from mm_jax.data.tokenizer import Tokenizer
from mm_jax.generation.predictor import predictor_of
from mm_jax.models.sharding import put_whole_batch
from mm_jax.run.build import Run
from mm_jax.run.folder import MEDIA_FILE
from mm_jax.run.start import start_params
from mm_jax.weights.tensors import WeightsError

LOGITS = 1e-4  # largest allowed difference, of the largest logit
PROBABILITIES = 1e-4
SCRIPT = pathlib.Path(__file__).with_name("exported_script.py")


@dataclasses.dataclass(frozen=True)
class Compared:
    """Says how far the folder's answer to a turn is from ours; `scale`: the largest logit."""

    turn: str
    same_ids: bool
    logits: float
    scale: float
    probabilities: float
    same_reply: bool

    @property
    def passed(self) -> bool:
        close = self.logits <= LOGITS * max(1.0, self.scale)
        return self.same_ids and close and self.probabilities <= PROBABILITIES and self.same_reply

    def __str__(self) -> str:
        if not self.same_ids:
            return f"{self.turn}: the prompt's token ids differ"
        return (
            f"{self.turn}: logits within {self.logits:.1e} of values up to {self.scale:.3g}, "
            f"probabilities within {self.probabilities:.1e}, "
            f"{'the same reply' if self.same_reply else 'ANOTHER REPLY'}"
        )


def example_turns(run: Run, spec: MediaSpec) -> dict[str, dict]:
    """Makes turns with all that the run's network reads: name -> the processor's arguments."""
    rng = np.random.default_rng(0)
    turn = {"text": "I lost my job on 12 May <video> \U0001f642.", "problem": "work"}
    history = [
        {"speaker": speaker, "text": text}
        | {task.name: task.labels[1] for task in run.prompter.label_space.by_speaker[speaker]}
        for speaker, text in ((CLIENT, "I can't sleep."), (THERAPIST, "Since when?"))
    ]
    turns = {"text": turn, "text, history": {**turn, "history": history}}
    video = {"video": rng.integers(0, 256, (spec.num_frames + 3, 40, 56, 3), np.uint8)}
    audio = {"audio": rng.uniform(-0.3, 0.3, 20_000).astype(np.float32)}
    parts = run.config.model.parts
    if "vision" in parts:
        turns["text, video"] = {**turn, **video}
    if "audio" in parts:
        turns["text, sound"] = {**turn, **audio}
    if {"vision", "audio"} <= set(parts):
        turns["all"] = {**turn, "history": history, **video, **audio}
    return turns


def answers_of(
    folder: pathlib.Path, turns: list[dict], where: pathlib.Path, texts: Sequence[str] = ()
) -> tuple[list[dict], list[list[int]]]:
    """Answers turns, and writes texts as token ids, by the folder's own code and without this
    package; the logits of turn i are left in `where`/found{i}.npy. Raises WeightsError."""
    given, found = where / "given", where / "found"
    given.write_bytes(pickle.dumps((turns, list(texts))))
    env = {**os.environ, "HF_MODULES_CACHE": f"{where}/modules", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-P", str(SCRIPT), str(folder.absolute()), given, found]
    done = subprocess.run(command, env=env, cwd=where, capture_output=True, text=True)
    if done.returncode:
        raise WeightsError(
            f"weights: {folder} does not answer in transformers:\n{done.stderr.strip()[-2000:]}"
        )
    return pickle.loads(found.read_bytes())


def compare_export(run: Run, folder: pathlib.Path) -> Iterator[Compared]:
    """Compares the folder's answers with ours, in float32 and decoded greedily; `run` is the run
    that it was exported from."""
    config = run.config.replace(
        init_from={"model": str(folder)},
        precision="float32",
        predict__temperature=0.0,
        predict__labels="scored",
    )
    run = Run.open(config, run.workdir)
    spec = MediaSpec(**read_json(run.workdir / MEDIA_FILE))
    turns, examples = {}, {}
    for name, turn in example_turns(run, spec).items():
        shown = history_of(turn.get("history", ()), run.prompter.label_space)
        sample = own_sample(spec, **{**turn, "history": shown})
        labels = [u.labels for u in shown]
        try:
            example = run.prompter.example(sample, "av", labels, with_answer=False)
        except PromptError as error:
            print(f"{name}: left out: {error}")
            continue
        turns[name], examples[name] = turn, (sample, example)
    texts = example_texts(run.tokenizer)
    with tempfile.TemporaryDirectory() as where:
        answers, ids = answers_of(folder, list(turns.values()), pathlib.Path(where), texts)
        compare_ids(run.tokenizer, texts, ids, str(folder))
        forward = jax.jit(lambda p, b: _logits(nnx.merge(run.abstract.graph, p), b))
        predictor = predictor_of(run, 1)
        with jax.set_mesh(run.abstract.mesh), jax.default_matmul_precision("highest"):
            params = start_params(config, run.create, run.abstract)
            for i, (name, (sample, example)) in enumerate(examples.items()):
                if example.tokens.tolist() != answers[i]["ids"].tolist():
                    yield Compared(name, False, np.inf, 0.0, 1.0, False)
                    continue
                rows = [example] * predictor.batch_size
                batch = collate(rows, run.tokenizer.pad_id)
                (batch,) = put_whole_batch((batch,), run.abstract.mesh)
                real = len(run.tokenizer)  # rows beyond it get no probability
                want = np.asarray(forward(params, batch))[0, : len(example.tokens), :real]
                got = np.load(f"{where}/found{i}.npy", mmap_mode="r")[:, :real]
                (ours,) = predictor.predict(params, [sample], "av", "gold")
                gaps = [0.0]
                for task, shares in (ours.probabilities or {}).items():
                    gaps += [
                        abs(p - answers[i]["probabilities"][task][x]) for x, p in shares.items()
                    ]
                yield Compared(
                    name,
                    True,
                    float(np.abs(got - want).max()),
                    float(np.abs(want).max()),
                    max(gaps),
                    cut_at_fields(ours.response, run.prompter.label_space)
                    == answers[i]["response"],
                )


def _logits(model, batch) -> jax.Array:
    return model.language_model.logits(model(batch))


def example_texts(tokenizer: Tokenizer, count: int = 1000) -> list[str]:
    """Makes texts that tokenizers are known to differ on: digits, spaces, signs, added tokens."""
    pieces = "1234|12| 7|\u0663\u0664|\u00bd|  |\n\n|\r\n|\t|\u00a0|!!!|don't|I feel sad| happy|abc"
    pieces += "|\U0001f642|\U0001f469\u200d\U0001f467|e\u0301|\ufb01|\u4e2d\u6587"
    pieces = [*pieces.split("|"), "x" * 30, *sorted(tokenizer.added_texts)]
    rng = np.random.default_rng(0)
    return ["".join(rng.choice(pieces, rng.integers(1, 9))) for _ in range(count)]


def compare_ids(tokenizer: Tokenizer, texts: list[str], theirs: list[list[int]], name: str) -> None:
    """Raises WeightsError unless transformers' tokenizer gave our ids."""
    for text, got in zip(texts, theirs, strict=True):
        want = tokenizer.encode(text)
        if got != want:
            raise WeightsError(
                f"weights: {name}: transformers' tokenizer writes {text!r} as {got}, training "
                f"wrote it as {want}"
            )
    print(f"tokenizer: the same ids for {len(texts)} texts")


def check_tokenizer(tokenizer: Tokenizer, folder: pathlib.Path) -> None:
    """Compares the tokenizer that transformers reads in a folder without code, or a GGUF file."""
    from transformers import AutoTokenizer  # heavy

    where, more = folder, {}
    texts = example_texts(tokenizer)
    if folder.suffix == ".gguf":
        where, more = folder.parent, {"gguf_file": folder.name}
        texts = [unicodedata.normalize("NFC", text) for text in texts]  # llama.cpp does not
    theirs = AutoTokenizer.from_pretrained(where, **more)
    ids = [theirs.encode(text, add_special_tokens=False) for text in texts]
    compare_ids(tokenizer, texts, ids, str(folder))


def report(found: Iterator[Compared]) -> None:
    """Prints every comparison as it is made. Raises WeightsError at the end if one failed."""
    failed = []
    for compared in found:
        print(compared)
        failed += [] if compared.passed else [compared.turn]
    if failed:
        raise WeightsError(
            f"weights: the folder's answers to {failed} differ: logits by more than {LOGITS:g} of "
            f"the largest, probabilities by more than {PROBABILITIES:g}, or another reply"
        )
