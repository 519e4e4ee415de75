"""Collects rollouts: samples and scores a step's responses, and records them in samples.jsonl."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import math
import pathlib
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mm_jax.config.reward import Reward
from mm_jax.config.stage import Reinforcement
from mm_jax.data.answers import parse_answer
from mm_jax.data.batch import Batch, Responses
from mm_jax.data.labels import LabelSpace
from mm_jax.data.records import Sample
from mm_jax.generation import engine
from mm_jax.generation.engine import Result
from mm_jax.models.sharding import batch_sharding, put_batch, put_whole_batch
from mm_jax.rewards.base import Request, Score, failure
from mm_jax.rewards.combine import combine, screen
from mm_jax.rewards.pool import RewardFailureError, RewardPool
from mm_jax.rl.packing import pack
from mm_jax.rl.policy import Policy
from mm_jax.training import hosts
from mm_jax.training.metrics_writer import keep_records

SAMPLES_FILE = "samples.jsonl"


class Clock:
    """Adds up the seconds of named blocks: `with clock("update"): ...`."""

    def __init__(self):
        self.seconds: collections.defaultdict[str, float] = collections.defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - began


@dataclasses.dataclass
class Rollout:
    """Holds a step's responses with their rewards; on the host where not said otherwise."""

    order: list[int]  # where the rows stand among all processes' rows
    responses: Responses  # on the devices
    sampler_logps: jax.Array  # on the devices
    lengths: np.ndarray  # int[B, G], with the stop token
    ended: np.ndarray  # bool[B, G]: by a stop token
    requests: list[Request]
    scores: dict[str, list[Score]]
    rewards: np.ndarray  # [B, G], NaN where invalid
    means: np.ndarray  # the same as weighted means, never relative to a group
    valid: np.ndarray
    vetoed: list[str]

    @property
    def size(self) -> tuple[int, int]:
        """Returns how many rows of how many tokens are computed per prompt."""
        packing = self.responses.packing
        return (self.responses.tokens if packing is None else packing.source).shape[1:]


def seeds_of(samples: Sequence[Sample], group: int) -> np.ndarray:
    """Makes a seed for every response from its prompt's id, uint32[B, G]."""
    # Not from the row: with other hosts, chunks or batch sizes a prompt keeps its samples. crc32,
    # because Python's hash() of a string differs from process to process.
    return np.array(
        [[zlib.crc32(f"{s.id} {g}".encode()) for g in range(group)] for s in samples], np.uint32
    )


class Collector:
    """Samples responses of a policy and scores them.

    decode(ids) -> text; reward_model(responses) -> raw values float32[B, G] on the host, or None.
    """

    def __init__(
        self,
        policy: Policy,
        pool: RewardPool,
        reward: Reward,
        decode: Callable[[np.ndarray], str],
        label_space: LabelSpace,
        reward_model: Callable[[Responses], np.ndarray] | None = None,
    ):
        self.policy, self.pool, self.reward, self.decode = policy, pool, reward, decode
        self.label_space, self.reward_model = label_space, reward_model

    def collect(
        self,
        params: nnx.State,
        step: int,
        batch: Batch,
        samples: Sequence[Sample],
        clock: Clock | None = None,
    ) -> Rollout:
        """Samples and scores G responses to every prompt of `batch` (this process's rows; `samples`
        are those of all processes' rows).

        Prompts are read `rl.chunks` times, whenever slots are free; the responses to a prompt are
        scored while others are still sampled.
        """
        clock = clock or Clock()
        results: dict[int, Result] = {}
        asked: dict[int, list[Request]] = {}
        waiting: list[tuple[list[int], Future | None]] = []
        order, kept = [], []
        seeds = seeds_of(samples, self.policy.stage.rl.group)

        def block(index, part):
            features, at = self.policy.read(params, part)
            order.extend(index)
            kept.append((part, features))
            return at, [engine.Request(int(i), seeds[i]) for i in index], key

        key = jax.random.fold_in(jax.random.key(self.policy.seed), step)
        # A generator's own variables would keep the caches.
        blocks = (block(*chunk) for chunk in self._chunks(batch, len(samples)))

        with clock("rollout"):
            for told in self.policy.engine.run(params, blocks):
                done = {p.name: p.result for p in told if p.finished}
                results |= done
                asked |= {i: self._requests(samples[i], result) for i, result in done.items()}
                waiting.append(self._submit({i: asked[i] for i in done}))
        found = Result(*map(np.stack, zip(*(results[i] for i in order), strict=True)))
        requests = [request for i in order for request in asked[i]]
        responses, logps = self._on_devices(kept, found)
        # The reward model runs on the devices while judges and services are still answering.
        raw = None if self.reward_model is None else self.reward_model(responses)
        with clock("reward_wait"):
            scores = shared_scores(waiting, len(requests))
        group = found.lengths.shape[1]
        numbers = [i * group + g for i in order for g in range(group)]
        scores = {name: [own[n] for n in numbers] for name, own in scores.items()}
        if raw is not None:
            scores["reward_model"] = [preference_score(float(x)) for x in raw.reshape(-1)]
        lengths, ended = found.lengths, found.ended
        vetoed = [screen(r.response) if self.reward.safety_veto else "" for r in requests]
        # Rules decide over rewards that failed as well: a vetoed response is worst, not unknown.
        worst = outside(requests, ended.reshape(-1), self.policy.stage.rl) | np.array(vetoed, bool)
        shape, weights = lengths.shape, self.reward.weights
        worst = worst.reshape(shape)
        rewards, valid = combine(scores, weights, shape, self.reward.combination, worst)
        # Rewards normalised in their group average 0 whatever the policy does; progress is
        # therefore judged by plain means.
        means, _ = combine(scores, weights, shape, "sum", worst)
        return Rollout(
            order, responses, logps, lengths, ended, requests, scores, rewards, means, valid, vetoed
        )

    def _chunks(self, batch: Batch, count: int):
        """Yields (positions among all processes' rows, chunk on the devices)."""
        chunks, rows = self.policy.stage.rl.chunks, len(batch.tokens)
        size = rows // chunks
        for chunk in range(chunks):
            mine = slice(chunk * size, (chunk + 1) * size)
            # A chunk takes a part of every process's rows, so its rows are not consecutive in the
            # global batch; this is the order in which the devices hold them.
            index = np.arange(count).reshape(-1, rows)[:, mine].reshape(-1)
            yield index, put_batch(jax.tree.map(lambda a: a[mine], batch), self.policy.mesh)  # noqa: B023

    def _requests(self, sample: Sample, result: Result) -> list[Request]:
        """Decodes and parses the responses to a prompt."""
        requests = []
        for tokens, length in zip(result.tokens, result.lengths, strict=True):
            text = self.decode(tokens[:length])
            parsed = parse_answer(text, self.label_space)
            requests.append(Request(sample, parsed.response, text, parsed.labels))
        return requests

    def _submit(self, asked: dict[int, list[Request]]) -> tuple[list[int], Future | None]:
        """Hands this process's share of the responses to some prompts, by their positions, to the
        reward pool; returns the responses' numbers, too."""
        # Every process has all responses and scores each n-th: no call is paid for twice.
        mine = {
            number: request
            for i, requests in asked.items()
            for number, request in enumerate(requests, i * len(requests))
            if number % jax.process_count() == jax.process_index()
        }
        return list(mine), self.pool.submit(list(mine.values())) if mine else None

    def _on_devices(self, kept: list, found: Result) -> tuple[Responses, jax.Array]:
        """Joins the chunks into one batch; returns it with the responses, and the sampler's
        log-probabilities."""
        join = lambda *a: jnp.concatenate(a) if len(kept) > 1 else a[0]  # noqa: E731
        mesh = self.policy.mesh
        with jax.set_mesh(mesh):
            whole = jax.tree.map(join, *kept)
        batch, features = jax.device_put(whole, batch_sharding(mesh))
        # Scoring and updating compute every place: as few quarters of them as hold the longest.
        most = found.tokens.shape[2]
        length = next(n for k in range(1, 5) if (n := -(-most * k // 4)) >= found.lengths.max())
        mask = np.arange(length) < found.lengths[..., None]
        cut = (found.tokens[:, :, :length], mask, found.logps[:, :, :length])
        packing = pack(found.lengths, length) if self.policy.stage.rl.shared_prefix else None
        (tokens, mask, logps), packing = put_whole_batch((cut, packing), mesh)
        return Responses(batch, features, tokens, mask, packing), logps


def preference_score(raw: float) -> Score:
    """Turns a reward model's value into a score: the probability that it prefers the response to
    one with value 0."""
    if not np.isfinite(raw):
        return failure("not finite")
    return Score(1 / (1 + math.exp(-max(raw, -700.0))), raw=raw)  # exp(710) overflows a float


def outside(requests: Sequence[Request], ended: np.ndarray, rl: Reinforcement) -> np.ndarray:
    """Marks the responses that a rule gives the lowest reward: those outside the length window (in
    words), and those cut off if rl.truncated is "zero"."""
    low, high = rl.length_window
    words = np.array([len(r.response.split()) for r in requests])
    out = (words < low) | ((words > high) if high else False)
    return out | ~ended if rl.truncated == "zero" else out


def shared_scores(
    waiting: Sequence[tuple[list[int], Future | None]], count: int
) -> dict[str, list[Score]]:
    """Gathers the scores of all processes: component -> score of every response by its number.

    `waiting`: this process's responses, by their numbers, and their scores. An error of one process
    stops all: it raises its own error, the others RewardFailureError.
    """
    # The error is gathered like a result: a process that raised before the gathering would leave
    # the others waiting in it.
    begun = [(numbers, future) for numbers, future in waiting if future is not None]
    failed = next((e for _, future in begun if (e := future.exception()) is not None), None)
    own: dict[str, dict[int, Score]] = {}
    for numbers, future in begun if failed is None else ():
        for name, scores in future.result().items():
            own.setdefault(name, {}).update(zip(numbers, scores, strict=True))
    if jax.process_count() == 1:
        if failed is not None:
            raise failed
        return {name: [scores[n] for n in range(count)] for name, scores in own.items()}
    plain = {
        name: [(n, dataclasses.asdict(score)) for n, score in scores.items()]
        for name, scores in own.items()
    }
    gathered = hosts.gather_objects({"scores": plain, "error": failed and str(failed)})
    if failed is not None:
        raise failed
    for place, other in enumerate(gathered):
        if other["error"] is not None:
            raise RewardFailureError(f"process {place}: {other['error']}")
    out: dict[str, list] = {}
    for other in gathered:
        for name, scores in other["scores"].items():
            each = out.setdefault(name, [None] * count)
            for n, score in scores:
                each[n] = Score(**score)
    return out


def length_metrics(rollout: Rollout) -> dict[str, float]:
    words = [len(r.response.split()) for r in rollout.requests]
    return {
        "response_tokens": float(rollout.lengths.mean()),
        "response_words": float(np.mean(words)),
        "truncated_share": float(1 - rollout.ended.mean()),
        "unparsed_share": float(np.mean([not r.response for r in rollout.requests])),
        "vetoed_share": float(np.mean(np.array(rollout.vetoed, bool))),
    }


def padding_share(batch: Batch, rollout: Rollout) -> float:
    """Returns the share of padding in what scoring and the update compute; `batch`: the prompts of
    this process."""
    real = batch.mask.sum() / len(batch.mask) + rollout.lengths.sum() / len(rollout.lengths)
    return float(1 - real / (batch.mask.shape[1] + math.prod(rollout.size)))


class SampleRecord:
    """Writes samples.jsonl: one line per response, with every reward and the resulting advantage.

    Only process 0 writes. Lines of steps that are to be run again are dropped.
    """

    def __init__(self, path: pathlib.Path, stage: str, start: int):
        self.path, self.stage = path, stage
        if jax.process_index() or not path.exists():
            return
        keep_records(path, lambda row: row["stage"] != stage or row["step"] < start)

    def write(self, step: int, rollout: Rollout, advantages: np.ndarray) -> None:
        if jax.process_index():
            return
        group = rollout.rewards.shape[1]
        # An error's message may hold a lone surrogate, which UTF-8 cannot encode; it is written as
        # the escape that JSON has for it.
        with open(self.path, "a", encoding="utf-8", errors="backslashreplace") as file:
            for i, request in enumerate(rollout.requests):
                row, g = divmod(i, group)
                line = {
                    "stage": self.stage,
                    "step": step,
                    "id": request.sample.id,
                    "sample": g,
                    "completion": request.completion,
                    "response": request.response,
                    "rewards": {name: as_json(own[i]) for name, own in rollout.scores.items()},
                    "reward": none_if_nan(rollout.rewards[row, g]),
                    "valid": bool(rollout.valid[row, g]),
                    "veto": rollout.vetoed[i],
                    "advantage": float(advantages[row, g]),
                    "tokens": int(rollout.lengths[row, g]),
                    "ended": bool(rollout.ended[row, g]),
                }
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def as_json(score: Score) -> dict:
    return {
        "value": none_if_nan(score.value),
        "raw": none_if_nan(score.raw),
        "valid": score.valid,
        "reason": score.reason,
        **({"detail": score.detail} if score.detail else {}),
    }


def none_if_nan(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
