"""The linear probe: what a run's released language model tells about the labels before training.

Logistic regression on the features of `systems.regression` and the frozen model's state after the
last therapist's and the client's utterance. Cheap, and hard to beat. The states are scaled to a
length of about 1, as a tf-idf vector has: unscaled ones would drown the labels of the history. They
are computed from the released weights, which are read again, and kept in the run folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from flax import nnx
from scipy.sparse import csr_matrix, hstack
from sklearn.linear_model import LogisticRegression

from mm_jax.config.schema import Config
from mm_jax.data.batch import pad_to
from mm_jax.data.labels import LabelSpace
from mm_jax.data.records import THERAPIST, Sample
from mm_jax.evaluation.systems import feature_tables
from mm_jax.models.abstract import abstract_model
from mm_jax.models.sharding import batch_parallelism, fetch, put_whole_batch
from mm_jax.run import build
from mm_jax.run.start import start_params

log = logging.getLogger(__name__)

STATES_FILE = "probe_states.npz"
BATCH, BUCKET, LONGEST = 32, 64, 256  # rows, tokens that lengths are rounded up to, tokens kept
PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0)  # inverse strengths, the middle one without a val split


def source_is_local(config: Config) -> bool:
    """Tells whether the language model was read from files here, not from a hub."""
    return pathlib.Path(config.init_from.language_model or config.init_from.model or ":").exists()


def probe_labels(
    run: pathlib.Path,
    config: Config,
    train: Sequence[Sample],
    val: Sequence[Sample],
    test: Sequence[Sample],
    space: LabelSpace,
) -> list[dict[str, str]] | None:
    """Predicts {task: label} of every test sample, or returns None for a run from random weights.

    The penalty is chosen on `val` (empty: not chosen). The states are kept in the run folder.
    Raises ConfigError, WeightsError or FileNotFoundError where the released model cannot be read.
    """
    if not (config.init_from.language_model or config.init_from.model):
        return None
    splits = (train, val, test)
    states = read_states(run, config, [s for split in splits for s in split])
    mean = np.mean([states[s.id] for s in train], axis=0)
    spread = np.std([states[s.id] for s in train], axis=0) * np.sqrt(len(mean)) + 1e-6
    standard = [
        csr_matrix([(states[s.id] - mean) / spread for s in split] or np.zeros((0, len(mean))))
        for split in splits
    ]
    tables = feature_tables(train, (val, test), space)
    rows = [hstack([a, b], format="csr") for a, b in zip(tables, standard, strict=True)]
    found = {
        task: probe(rows, *([s.target(task) for s in split] for split in (train, val)))
        for task in space.names
    }
    return [{task: labels[i] for task, labels in found.items()} for i in range(len(test))]


def probe(rows: Sequence[csr_matrix], train: list[str], val: list[str]) -> list[str]:
    """Fits features of train, chooses the penalty by the likelihood of val's labels, and predicts
    test."""
    labelled = [i for i, label in enumerate(train) if label]
    rows, train = (rows[0][labelled], *rows[1:]), [train[i] for i in labelled]
    if len(set(train)) < 2:
        return [(train or [""])[0]] * rows[2].shape[0]
    known = [i for i, label in enumerate(val) if label in set(train)]
    tried = PENALTIES if known else PENALTIES[2:3]
    models = [LogisticRegression(C=c, max_iter=500).fit(rows[0], train) for c in tried]
    if not known:
        return [str(label) for label in models[0].predict(rows[2])]
    places = np.searchsorted(models[0].classes_, [val[i] for i in known])
    likely = [m.predict_log_proba(rows[1])[known, places].mean() for m in models]
    return [str(label) for label in models[int(np.argmax(likely))].predict(rows[2])]


def read_states(
    run: pathlib.Path, config: Config, samples: Sequence[Sample]
) -> dict[str, np.ndarray]:
    """Maps sample ids to states float32[D]; those that the run folder does not hold are computed
    and added to it."""
    texts = {s.id: probe_text(s) for s in samples}
    named = config.init_from
    source = "\n".join((named.language_model, named.model, named.adapter))
    marks = {
        name: hashlib.sha256("\n".join((source, *text)).encode()).hexdigest()
        for name, text in texts.items()
    }
    path, kept = run / STATES_FILE, {}
    if path.is_file():
        with np.load(path) as stored:
            kept = dict(zip(stored["marks"].tolist(), stored["states"], strict=True))
    missing = {mark: texts[name] for name, mark in marks.items() if mark not in kept}
    if missing:
        kept |= zip(missing, last_states(run, config, list(missing.values())), strict=True)
        partial = path.with_name(path.name + ".partial")
        with open(partial, "wb") as file:
            np.savez(file, marks=np.array(list(kept)), states=np.stack(list(kept.values())))
        partial.rename(path)
    return {name: kept[mark] for name, mark in marks.items()}


def probe_text(sample: Sample) -> tuple[str, str]:
    """Returns the last therapist's utterance before the client's, and the client's."""
    last = [u.text for u in sample.history if u.speaker == THERAPIST][-1:]
    return (*last, "")[0], sample.client_text


def last_states(run: pathlib.Path, config: Config, texts: Sequence[tuple[str, str]]) -> np.ndarray:
    """Computes the frozen language model's states float32[N, D], two thirds up its layers, at the
    last token of every (therapist's, client's) text."""
    config = config.replace(mesh={"data": 1, "fsdp": -1, "tensor": 1})  # the devices here
    tok = build.run_tokenizer(config, run, build.label_space(config, run))
    network = build.model_config(config, tok)
    network = dataclasses.replace(network, vision=None, audio=None, compressor=None)
    create = build.create_model(config, network)
    abstract = abstract_model(create, build.mesh_of(config.mesh))
    compute = np.dtype(build.dtypes(config).compute)
    layer = max(1, round(network.llm.num_hidden_layers * 2 / 3)) - 1
    newline, bos = tok.encode("\n"), tok.bos_ids
    ids = []
    for before, text in texts:
        tokens = [*(tok.encode_data(before) + newline if before else []), *tok.encode_data(text)]
        kept = (tokens or newline)[len(bos) - LONGEST :]
        ids.append(np.array([*bos, *kept], np.int32))

    @jax.jit
    def run_batch(params, tokens, lengths):
        lm = nnx.merge(abstract.graph, params).language_model
        mask = jnp.arange(tokens.shape[1]) < lengths[:, None]
        _, outputs = lm(lm.embed(tokens), mask, with_layers=True)
        at = (lengths - 1)[:, None, None]
        return jnp.take_along_axis(outputs[layer], at, axis=1)[:, 0].astype(jnp.float32)

    named = config.init_from.language_model or config.init_from.model
    log.info("linear probe: reading %d texts with %s", len(ids), pathlib.Path(named).name)
    ways = batch_parallelism(abstract.mesh)
    size = -(-BATCH // ways) * ways
    out = np.zeros((len(ids), network.llm.hidden_size), np.float32)
    order = np.argsort([len(i) for i in ids], kind="stable")
    with jax.set_mesh(abstract.mesh):
        params = start_params(config, create, abstract, lambda path, _: compute)
        for start in tqdm.trange(0, len(ids), size, desc="linear probe"):
            index = order[start : start + size]
            width = -(-len(ids[index[-1]]) // BUCKET) * BUCKET
            filler = [ids[index[-1]]] * (size - len(index))
            own = [ids[i] for i in index] + filler
            tokens = np.stack([pad_to(i, width) for i in own])
            lengths = np.array([len(i) for i in own], np.int32)
            placed = put_whole_batch((tokens, lengths), abstract.mesh)
            out[index] = fetch(run_batch(params, *placed))[: len(index)]
    return out
