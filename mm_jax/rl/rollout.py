"""Rollouts with their rewards, and their record in samples.jsonl."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from mm_jax.data.answers import parse_answer
from mm_jax.data.batch import Responses
from mm_jax.data.records import Sample
from mm_jax.models.sharding import batch_sharding, fetch, put_batch, put_whole_batch
from mm_jax.rewards.base import Request, Score, failure
from mm_jax.rewards.combine import combine, screen
from mm_jax.rewards.pool import RewardFailureError, RewardPool
from mm_jax.training import hosts
from mm_jax.training.metrics_writer import keep_records

SAMPLES_FILE = "samples.jsonl"


@dataclasses.dataclass(frozen=True)
class Scoring:
    """How responses become rewards: decode(ids) -> text, the rewards' pool and weights, the learned
    reward (see `rl/preference.py`), and the rules of `config.reward` and of the stage's `rl`."""

    decode: Callable[[np.ndarray], str]
    label_space: str
    pool: RewardPool
    weights: dict[str, float]
    learned: Callable[[Responses], np.ndarray] | None
    reward: Any
    rl: Any


@dataclasses.dataclass
class Rolled:
    """One batch of rollouts with its rewards, on the host where not said otherwise."""

    responses: Responses  # on the devices
    sampler_logps: jax.Array  # on the devices
    lengths: np.ndarray
    ended: np.ndarray
    requests: list[Request]
    scores: dict[str, list[Score]]
    rewards: np.ndarray  # [B, G], NaN where invalid
    plain: np.ndarray  # the same as weighted means, never by group: what a run is judged by
    valid: np.ndarray
    vetoed: list[str]
    seconds: dict[str, float]


def seeds_of(samples: Sequence[Sample], group: int) -> np.ndarray:
    """uint32[B, G]: a seed for every response, by the prompt's id."""
    return np.array(
        [[zlib.crc32(f"{s.id} {g}".encode()) for g in range(group)] for s in samples], np.uint32
    )


def roll_out(
    rollout: Callable,
    scoring: Scoring,
    mesh: Mesh,
    params: nnx.State,
    step: int,
    batch,
    samples: Sequence[Sample],
    chunks: int,
) -> Rolled:
    """Samples and scores G responses to every prompt of `batch` (this process's rows; `samples`
    are those of all rows). `rollout` of `policy.jit_rollout`."""
    seconds = {"rollout": 0.0}
    rows, group = len(samples), scoring.rl.group
    seeds = seeds_of(samples, group)
    where = batch_sharding(mesh)
    parts, waiting, requests, own_requests = [], [], [], []
    share, shares = jax.process_index(), jax.process_count()
    own_rows = len(batch.tokens)
    own_size = own_rows // chunks
    for chunk in range(chunks):
        began = time.perf_counter()
        own = jax.tree.map(lambda a: a[chunk * own_size : (chunk + 1) * own_size], batch)  # noqa: B023
        # Of the rows of every process this chunk's part, in the order in which devices hold them.
        index = np.arange(rows).reshape(-1, own_rows)[:, chunk * own_size : (chunk + 1) * own_size]
        index = index.reshape(-1)
        put = put_whole_batch(seeds[index], mesh)
        on_device = put_batch(own, mesh)
        features, out = rollout(params, on_device, np.uint32(step), put)
        tokens, lengths, ended = fetch((out.tokens, out.lengths, out.ended))
        seconds["rollout"] += time.perf_counter() - began
        new = []
        for row, sample in enumerate(samples[i] for i in index):
            for g in range(group):
                text = scoring.decode(tokens[row, g, : lengths[row, g]])
                parsed = parse_answer(text, scoring.label_space)
                new.append(Request(sample, parsed.response, text, parsed.labels))
        waiting.append(scoring.pool.submit(new[share::shares]))
        own_requests.append(len(new))
        requests += new
        parts.append((on_device, features, out, lengths, ended))
    join = lambda *a: jnp.concatenate(a) if chunks > 1 else a[0]  # noqa: E731
    device = jax.tree.map(join, *[(b, f, o.tokens, o.mask(), o.logps) for b, f, o, *_ in parts])
    device_batch, features, tokens, mask, logps = jax.device_put(device, where)
    responses = Responses(device_batch, features, tokens, mask)
    learned = None if scoring.learned is None else scoring.learned(responses)
    began = time.perf_counter()
    scores: dict[str, list[Score]] = {r.name: [] for r in scoring.pool.rewards}
    for future, count in zip(waiting, own_requests, strict=True):
        for name, got in shared_scores(future, count).items():
            scores[name] += got
    seconds["reward_wait"] = time.perf_counter() - began
    if learned is not None:
        scores["learned"] = [learned_score(float(raw)) for raw in learned.reshape(-1)]
    lengths, ended = (np.concatenate([p[i] for p in parts]) for i in (3, 4))
    shape = (rows, group)
    vetoed = [screen(r.response) if scoring.reward.safety_veto else "" for r in requests]
    worst = outside(requests, ended.reshape(-1), scoring.rl) | np.array(vetoed, bool)
    rewards, valid = combine(
        scores, scoring.weights, shape, scoring.reward.combination, worst.reshape(shape)
    )
    plain, _ = combine(scores, scoring.weights, shape, "sum", worst.reshape(shape))
    return Rolled(
        responses,
        logps,
        lengths,
        ended,
        requests,
        scores,
        rewards,
        plain,
        valid,
        vetoed,
        seconds,
    )


def learned_score(raw: float) -> Score:
    """The probability that the learned reward gives a response against one of value 0."""
    if not np.isfinite(raw):
        return failure("not finite")
    return Score(1 / (1 + math.exp(-max(raw, -700.0))), raw=raw)


def outside(requests: Sequence[Request], ended: np.ndarray, rl) -> np.ndarray:
    """Which responses a rule gives the lowest reward: outside the length window (in words), or cut
    off where rl.truncated is "zero"."""
    low, high = rl.length_window
    words = np.array([len(r.response.split()) for r in requests])
    out = (words < low) | ((words > high) if high else False)
    return out | ~ended if rl.truncated == "zero" else out


def shared_scores(future: Future, count: int) -> dict[str, list[Score]]:
    """The scores of all processes, where process p scored the requests p, p + n, p + 2n, ...

    Where one of them stops, all do: raises its own error or, for another's, RewardFailureError.
    """
    if jax.process_count() == 1:
        return future.result()
    failed, own = future.exception(), {}
    if failed is None:
        own = future.result()
    plain = {name: [dataclasses.asdict(s) for s in scores] for name, scores in own.items()}
    gathered = hosts.gather_objects({"scores": plain, "error": failed and str(failed)})
    if failed is not None:
        raise failed
    for place, other in enumerate(gathered):
        if other["error"] is not None:
            raise RewardFailureError(f"process {place}: {other['error']}")
    out: dict[str, list] = {name: [None] * count for name in own}
    shares = [other["scores"] for other in gathered]
    for place, share in enumerate(shares):
        for name, scores in share.items():
            out[name][place :: len(shares)] = [Score(**s) for s in scores]
    return out


def length_metrics(rolled: Rolled) -> dict[str, float]:
    words = [len(r.response.split()) for r in rolled.requests]
    return {
        "response_tokens": float(rolled.lengths.mean()),
        "response_words": float(np.mean(words)),
        "truncated_share": float(1 - rolled.ended.mean()),
        "unparsed_share": float(np.mean([not r.response for r in rolled.requests])),
        "vetoed_share": float(np.mean(np.array(rolled.vetoed, bool))),
    }


class SampleRecord:
    """samples.jsonl: one line a response, with every reward and what became of it.

    Process 0 writes. Lines of steps that are to be run again are dropped.
    """

    def __init__(self, path: pathlib.Path, stage: str, start: int):
        self.path, self.stage = path, stage
        if jax.process_index() or not path.exists():
            return
        keep_records(path, lambda row: row["stage"] != stage or row["step"] < start)

    def write(self, step: int, rolled: Rolled, advantages: np.ndarray) -> None:
        if jax.process_index():
            return
        group = rolled.rewards.shape[1]
        # A lone surrogate (of an error's message) becomes the escape that JSON has for it.
        with open(self.path, "a", encoding="utf-8", errors="backslashreplace") as file:
            for i, request in enumerate(rolled.requests):
                row, g = divmod(i, group)
                rewards = {
                    name: {
                        "value": none_if_nan(scores[i].value),
                        "raw": none_if_nan(scores[i].raw),
                        "valid": scores[i].valid,
                        "reason": scores[i].reason,
                        **({"detail": scores[i].detail} if scores[i].detail else {}),
                    }
                    for name, scores in rolled.scores.items()
                }
                line = {
                    "stage": self.stage,
                    "step": step,
                    "id": request.sample.id,
                    "sample": g,
                    "completion": request.completion,
                    "response": request.response,
                    "rewards": rewards,
                    "reward": none_if_nan(rolled.rewards[row, g]),
                    "valid": bool(rolled.valid[row, g]),
                    "veto": rolled.vetoed[i],
                    "advantage": float(advantages[row, g]),
                    "tokens": int(rolled.lengths[row, g]),
                    "ended": bool(rolled.ended[row, g]),
                }
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def none_if_nan(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
