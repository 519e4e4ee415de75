"""Defines the reward model, a Bradley-Terry model of pairs (reference answer, low-ROUGE sample),
and the stage that trains it (objective preference).

A value head on the language model reads the last token of an answer after its prompt, media and
history. The worse side of a training pair is, of several answers sampled from the model the stage
starts from, the one with the lowest ROUGE-L against the reference reply.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import pathlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mm_jax.config.errors import require
from mm_jax.config.files import write_whole
from mm_jax.data.answers import parse_answer
from mm_jax.data.batch import Responses
from mm_jax.data.datasets.common import SampleSource
from mm_jax.data.pipeline import BatchRows, EvalBatch, Loader, split_batches
from mm_jax.data.prompts import Prompter
from mm_jax.data.records import Sample
from mm_jax.generation import engine
from mm_jax.models.abstract import AbstractModel, adapt_params, adapted_model
from mm_jax.models.multimood import MultiMood
from mm_jax.models.sharding import batch_sharding, fetch, put_batch
from mm_jax.rewards.similarity import rouge_l
from mm_jax.rl import losses
from mm_jax.rl.policy import Policy, add_critic
from mm_jax.rl.rollout import seeds_of
from mm_jax.run import build
from mm_jax.run.build import Run
from mm_jax.training import hosts, supervised
from mm_jax.training.checkpoint import load_stage
from mm_jax.training.runner import initial_params, stage_data, stage_seed
from mm_jax.training.state import Remainder, StageModel, cast
from mm_jax.training.step import Validation
from mm_jax.training.supervised import Evaluation, Objective, SetUp, evaluation_shapes

log = logging.getLogger(__name__)

LENGTH_BUCKET = 16  # answers are padded to a multiple of this
Pairs = dict[str, tuple[list[int], list[int]]]  # sample id -> tokens of (chosen, rejected)


# ---- the model and its loss --------------------------------------------------------------------


def with_head(plain: AbstractModel) -> AbstractModel:
    """Returns the model of a preference stage."""
    return adapted_model(plain, add_critic)


def reward_values(model: MultiMood, responses: Responses) -> jax.Array:
    """Computes the value of every response at its last token, float32[B, G]."""
    lm = model.language_model
    prompt = model.embed(responses.batch, responses.features)
    tails = lm.embed(responses.tokens)
    _, hidden = lm.shared_prefix(prompt, responses.batch.mask, tails, responses.mask)
    last = jnp.maximum(jnp.sum(responses.mask, axis=2) - 1, 0)
    states = jnp.take_along_axis(hidden, last[..., None, None], axis=2)[:, :, 0]
    return model.value_head(states.astype(jnp.float32))[..., 0]


def preference_loss(
    trainable: nnx.State,
    rest: Remainder,
    responses: Responses,
    dropout_key: jax.Array | None = None,
    token_dropout: float = 0.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Sums the Bradley-Terry loss of pairs [B, 2, R] (chosen, rejected), and what metrics need.

    A row with empty answers is padding. There is no dropout.
    """
    del dropout_key, token_dropout
    chosen, rejected = jnp.moveaxis(reward_values(rest.model(trainable), responses), 1, 0)
    real = jnp.any(responses.mask, axis=(1, 2))
    count = jnp.sum(real, dtype=jnp.float32)
    loss, found = losses.preference_loss(chosen, rejected, real)
    return loss * count, {
        "weight": count,
        "right": found["pair_accuracy"] * count,
        "margin": found["margin"] * count,
        "tokens": jnp.sum(responses.batch.mask) + jnp.sum(responses.mask, dtype=jnp.float32),
    }


def preference_metrics(sums: dict[str, jax.Array]) -> dict[str, jax.Array]:
    pairs = jnp.maximum(sums["weight"], 1)
    return {
        "pair_accuracy": sums["right"] / pairs,
        "margin": sums["margin"] / pairs,
        "tokens": sums["tokens"],
    }


PAIRS = Objective(preference_loss, preference_metrics)


def load(run: Run, name: str) -> Callable[[Responses], np.ndarray] | None:
    """Loads the reward model of reinforcement stage `name` as `responses -> float32[B, G]` on the
    host; None where its reward has no weight."""
    config = run.config
    if "reward_model" not in config.reward.weights:
        return None
    abstract = with_head(run.abstract)
    params, _ = load_stage(run, config.reward_model_stage(name), abstract=abstract)
    params = cast(params, build.dtypes(config).compute)
    jitted = jax.jit(
        lambda params, responses: reward_values(nnx.merge(abstract.graph, params), responses),
        out_shardings=batch_sharding(abstract.mesh),
    )

    def values(responses: Responses) -> np.ndarray:
        with jax.set_mesh(abstract.mesh):
            return fetch(jitted(params, responses._replace(features=None)))

    return values


# ---- pairs -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class PairLoader:
    """Loads (ids, Responses [B, 2, `length`]) for this host's rows."""

    loader: Loader
    pairs: Pairs
    length: int

    def __call__(self, rows: BatchRows) -> tuple[tuple[str, ...], Responses]:
        ids, batch = self.loader(rows)
        pad = self.loader.prompter.tokenizer.pad_id
        tokens = np.full((len(ids), 2, self.length), pad, np.int32)
        mask = np.zeros(tokens.shape, bool)
        for row, name in enumerate(ids):
            for side, answer in enumerate(self.pairs[name]):
                tokens[row, side, : len(answer)] = answer
                mask[row, side, : len(answer)] = True
        return ids, Responses(batch, None, tokens, mask)


def padded_length(pairs: Sequence[Pairs]) -> int:
    longest = max(len(answer) for split in pairs for pair in split.values() for answer in pair)
    return -(-longest // LENGTH_BUCKET) * LENGTH_BUCKET


def collect_pairs(run: Run, name: str, splits: dict[str, SampleSource]) -> dict[str, Pairs]:
    """Returns the pairs of every split, sampled once and kept in `preferences_NAME.jsonl`."""
    path = run.workdir / f"preferences_{name}.jsonl"
    if not path.is_file():
        rows = sample_splits(run, name, splits)
        hosts.on_first(functools.partial(write_pairs, path, rows))
    pairs = {s: read_pairs(path, s, list(source), run.prompter) for s, source in splits.items()}
    for split, found in pairs.items():
        require(len(found) > 0, f"{path}: no pair of the {split} split")
    return pairs


def sample_splits(run: Run, name: str, splits: dict[str, SampleSource]) -> dict[str, list[dict]]:
    """Samples the rejected answers of every split from the model that the stage starts from."""
    config, stage = run.config, run.config.stage[name]
    compute, seed = build.dtypes(config).compute, stage_seed(config, name)
    policy = Policy(run.abstract, stage.model_copy(update={"lora": type(stage.lora)()}),
                    run.tokenizer, compute, seed, 1)  # fmt: skip
    data = stage_data(run, name, splits["train"])
    recipe = data.recipe.without_dropout()
    weights, rows = policy.to_rollout(initial_params(run, name)), {}
    for split, light in splits.items():
        loader = dataclasses.replace(
            data.loader, source=SampleSource(config.data.folder, split), recipe=recipe
        )
        batches = split_batches(
            light,
            recipe,
            run.prompter,
            stage.batch_size,
            stage.eval_modality,
            data.schedule.shapes.extended,
        )
        log.info("%s: sampling answers to %d batches of %s", name, len(batches), split)
        samples = [[light[item.record] for item in batch.rows.items] for batch in batches]
        rows[split] = sample_pairs(policy, weights, batches, samples, loader, run)
    return rows


def sample_pairs(
    policy: Policy,
    weights: nnx.State,
    batches: Sequence[EvalBatch],
    samples: Sequence[Sequence[Sample]],
    loader: Loader,
    run: Run,
) -> list[dict]:
    """Returns one row per sample with a reference reply: of `rl.group` sampled answers, the one
    whose reply has the lowest ROUGE-L against it."""
    found, group, space = [], policy.stage.rl.group, run.prompter.label_space
    kept: dict[tuple[int, int], Sample] = {}

    key = jax.random.fold_in(jax.random.key(policy.seed), 0)

    def block(number: int, rows: BatchRows, real: int, own: Sequence[Sample]):
        asked: list[engine.Request | None] = [None] * len(own)
        for row, (sample, seeds) in enumerate(zip(own, seeds_of(own, group), strict=True)):
            if row < real and sample.response:
                kept[number, row] = sample
                asked[row] = engine.Request((number, row), seeds)
        return policy.read(weights, put_batch(loader(rows)[1], policy.mesh))[1], asked, key

    blocks = (
        block(number, rows, real, own)
        for number, ((rows, real), own) in enumerate(zip(batches, samples, strict=True))
        if any(sample.response for sample in own[:real])
    )
    results = {told.name: told.result for told in policy.engine.finished(weights, blocks)}
    for name, sample in kept.items():
        got = results[name]
        answers = [got.tokens[g, : got.lengths[g]] for g in range(group)]
        texts = [run.tokenizer.decode(answer) for answer in answers]
        replies = [parse_answer(text, space).response for text in texts]
        scores = [rouge_l(sample.response, reply) if reply else 0.0 for reply in replies]
        worst = int(np.argmin(scores))
        found.append(
            {
                "id": sample.id,
                "rejected": [int(t) for t in answers[worst]],
                "text": texts[worst],
                "rouge_l": round(100 * scores[worst], 2),
            }
        )
    return found


def write_pairs(path: pathlib.Path, rows: dict[str, list[dict]]) -> None:
    """Writes split -> rows of `sample_pairs` atomically, one JSON line per row."""
    lines = [{"split": split, **row} for split, own in rows.items() for row in own]
    write_whole(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def read_pairs(
    path: pathlib.Path, split: str, samples: Sequence[Sample], prompter: Prompter
) -> Pairs:
    """Reads a split's pairs, leaving out those whose two answers are the same."""
    by_id = {s.id: s for s in samples}
    pairs = {}
    with open(path, encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            if row["split"] == split:
                chosen, _ = prompter.answer(by_id[row["id"]])
                if chosen != row["rejected"]:
                    pairs[row["id"]] = (chosen, row["rejected"])
    return pairs


# ---- the stage ---------------------------------------------------------------------------------


def make_evaluation(
    run: Run, name: str, val: SampleSource, abstract: AbstractModel, pairs: Pairs, length: int
) -> Evaluation:
    """Evaluates on the pairs of val."""
    config, stage = run.config, run.config.stage[name]
    recipe = build.stage_recipe(config, stage).without_dropout()
    source = SampleSource(config.data.folder, "val")
    loader = PairLoader(Loader(source, recipe, run.prompter), pairs, length)
    batches = split_batches(
        val,
        recipe,
        run.prompter,
        stage.batch_size // stage.accumulation,
        stage.eval_modality,
        evaluation_shapes(run),
        stage.eval_examples,
        pairs,
    )
    validate = Validation(abstract, preference_loss, loader, batches, blank_rows)

    def evaluate(params: nnx.State) -> dict[str, float]:
        sums = validate(params)
        loss, margin = (sums[k] / sums["weight"] for k in ("loss", "margin"))
        right = sums["right"] / sums["weight"]
        return {"loss": loss, "pair_accuracy": right, "margin": margin, "score": -loss}

    return Evaluation(evaluate, (validate.compile,))


def blank_rows(responses: Responses, real: int) -> None:
    responses.mask[real:] = False


def set_up(run: Run, name: str, splits: dict[str, SampleSource]) -> SetUp:
    """Sets up a preference stage; its pairs are sampled first."""
    config, stage = run.config, run.config.stage[name]
    pairs = collect_pairs(run, name, splits)
    length = padded_length(list(pairs.values()))
    data = stage_data(run, name, splits["train"], only=pairs["train"])
    headed, compute = with_head(run.abstract), build.dtypes(config).compute
    model = StageModel(headed, stage, data.schedule.steps, compute, head_modules=("value_head",))
    return SetUp(
        data.schedule,
        PairLoader(data.loader, pairs["train"], length),
        data.loader.hosts,
        model,
        functools.partial(headed_params, run, name, headed),
        PAIRS,
        make_evaluation(run, name, splits["val"], headed, pairs["val"], length),
    )


def headed_params(run: Run, name: str, headed: AbstractModel) -> nnx.State:
    """Returns the parameters a preference stage starts from, with a value head."""
    plain = initial_params(run, name)
    return adapt_params(
        run.abstract, headed, add_critic, plain, stage_seed(run.config, name), donate=False
    )


# Trains a reward model in the loop of the supervised stages.
train = functools.partial(supervised.train, set_up=set_up)
