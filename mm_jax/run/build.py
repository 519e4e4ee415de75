"""From a run's config to its objects: tokenizer, prompter, model, mesh. Checks what must agree."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from mm_jax.config.errors import ConfigError, one_of, require
from mm_jax.config.files import read_json
from mm_jax.config.load import flatten
from mm_jax.data import prompts, tokenizer
from mm_jax.data.batch import Buckets
from mm_jax.data.datasets.common import SampleSource
from mm_jax.data.history import HISTORY_REGIMES, MemoryBudget
from mm_jax.data.media import MediaSpec
from mm_jax.data.pipeline import ModalityChoice, Task
from mm_jax.data.records import LABEL_SPACES, STRATEGY
from mm_jax.models.beats import BeatsConfig
from mm_jax.models.layers import REMAT, Dtypes
from mm_jax.models.lora import NF4_BLOCK, LoraConfig
from mm_jax.models.mamba import MambaConfig
from mm_jax.models.multimood import AUDIO_PROJECTORS, MultiMood, MultiMoodConfig
from mm_jax.models.qwen2 import Qwen2Config
from mm_jax.models.siglip import SiglipConfig
from mm_jax.models.stc import PADDING
from mm_jax.ops.attention import ATTENTION
from mm_jax.rewards.build import validate_rewards
from mm_jax.rl.advantages import SCALES
from mm_jax.rl.losses import REDUCTIONS
from mm_jax.rl.policy import PolicyOptions

PARTS = ("vision", "audio", "compressor")
OBJECTIVES = ("sft", "compressor", "preference", "grpo", "ppo")
# Least values of numbers.
LEAST = {
    "data": dict(
        previous_labels=0,
        max_length=0,
        token_bucket=1,
        fbank_bucket=1,
        history_bucket=1,
        memory_bucket=1,
        reader_threads=1,
        reader_processes=0,
        prefetch=1,
    ),
    "predict": dict(batch_size=1, max_new_tokens=1, temperature=0, top_k=0),
}
MODULES = {
    "language_model": None,
    "vision_tower": "vision",
    "mm_projector": "vision",
    "audio_tower": "audio",
    "mm_projector_a": "audio",
    "mamba_compressor": "compressor",
}


def validate(c: ConfigDict) -> None:
    """Refuses unknown choices, impossible combinations and missing fields. Raises ConfigError."""
    try:
        validate_fields(c)
    except (AttributeError, KeyError) as error:
        raise ConfigError(
            f"config: {str(error).strip()}; a run folder of another version of mm_jax? Use that "
            "version, or train anew"
        ) from error


def validate_fields(c: ConfigDict) -> None:
    for key, value in flatten(c).items():
        numbers = value if isinstance(value, (tuple, list)) else (value,)
        for number in numbers:
            require(
                not isinstance(number, float) or math.isfinite(number),
                f"{key}: expected finite numbers, got {value}",
            )
    one_of("data.label_space", c.data.label_space, sorted(LABEL_SPACES))
    one_of("data.template", c.data.template, sorted(prompts.SYSTEM))
    one_of("data.history_labels", c.data.history_labels, HISTORY_REGIMES)
    one_of("precision", c.precision, ("auto", "float32", "bfloat16"))
    one_of("model.audio_projector_type", c.model.audio_projector_type, AUDIO_PROJECTORS)
    one_of("model.connector_type", c.model.connector_type, sorted(PADDING))
    one_of("model.remat", c.model.remat, list(REMAT))
    one_of("model.attention", c.model.attention, ATTENTION)
    one_of("predict.labels", c.predict.labels, ("scored", "generated"))
    for part in c.model.parts:
        one_of("model.parts", part, PARTS)
    if c.data.history_labels == "predicted":
        require(
            bool(c.data.history_predictions),
            "data.history_labels=predicted needs data.history_predictions, a predictions.jsonl "
            "with the train and val splits",
        )
    for section, bounds in LEAST.items():
        for field, least in bounds.items():
            value = c[section][field]
            require(value >= least, f"{section}.{field}: expected at least {least}, got {value}")
    require(0 < c.predict.top_p <= 1, f"predict.top_p: expected in (0, 1], got {c.predict.top_p}")
    try:
        MambaConfig(**{**c.model.compressor, "vocab_size": c.model.compressor.vocab_size or 1})
    except ValueError as error:
        raise ConfigError(f"model.compressor: {error}") from error
    require(
        c.data.previous_labels == 0 or "compressor" in c.model.parts or c.data.history_text,
        f"data.previous_labels={c.data.previous_labels} needs 'compressor' in model.parts: a model "
        "without it reads no history",
    )
    require(
        not (c.data.history_text and "compressor" in c.model.parts),
        "data.history_text: the prompt holds the history itself; expected model.parts without "
        f"'compressor', got {tuple(c.model.parts)}",
    )
    memory_budget(c)
    require(len(c.stages) > 0, "stages: expected at least one")
    for name in c.stages:
        one_of("stages", name, sorted(c.stage))
        s = c.stage[name]
        one_of(f"stage.{name}.objective", s.objective, OBJECTIVES)
        require(
            s.unit_utterances >= 0,
            f"stage.{name}.unit_utterances: expected at least 0, got {s.unit_utterances}",
        )
        for task in s.balanced_tasks:
            one_of(f"stage.{name}.balanced_tasks", task, prompts.answer_tasks(c.data.label_space))
        one_of(f"stage.{name}.select_by", s.select_by, ("loss", "labels"))
        existing = [m for m, part in MODULES.items() if part is None or part in c.model.parts]
        require(len(s.trainable) > 0, f"stage.{name}.trainable: expected at least one part")
        for module in s.trainable:
            one_of(f"stage.{name}.trainable", module, sorted(MODULES))
        require(
            any(m in existing for m in s.trainable),
            f"stage.{name}.trainable: none of {s.trainable} exists in a model with parts "
            f"{c.model.parts}",
        )
        if s.objective == "compressor":
            require(
                "compressor" in c.model.parts,
                f"stage.{name}.objective=compressor needs 'compressor' in model.parts",
            )
        require(
            s.select_by == "loss" or s.objective == "sft",
            f"stage.{name}.select_by=labels needs objective=sft: the others predict no labels",
        )
        for field in (
            "eval_examples",
            "eval_reconstructions",
            "eval_every",
            "checkpoint_every",
            "steps",
            "weight_decay",
        ):
            require(s[field] >= 0, f"stage.{name}.{field}: expected at least 0, got {s[field]}")
        for field in ("batch_size", "accumulation"):
            require(s[field] >= 1, f"stage.{name}.{field}: expected at least 1, got {s[field]}")
        require(
            s.batch_size % s.accumulation == 0,
            f"stage.{name}: batch_size {s.batch_size} is not a multiple of accumulation "
            f"{s.accumulation}",
        )
        for field in ("token_dropout", "history_label_dropout", "ema_decay", "b2"):
            require(
                0 <= s[field] < 1, f"stage.{name}.{field}: expected 0 <= value < 1, got {s[field]}"
            )
        for field in ("warmup", "final_learning_rate"):
            require(0 <= s[field] <= 1, f"stage.{name}.{field}: expected 0 to 1, got {s[field]}")
        # A label that weighs 0 is no target, but prompt.
        for field in ("learning_rate", "label_weight", "clip_norm"):
            require(s[field] > 0, f"stage.{name}.{field}: expected above 0, got {s[field]}")
        require(
            s.compressor_learning_rate == 0 or "mamba_compressor" in s.trainable,
            f"stage.{name}.compressor_learning_rate needs 'mamba_compressor' in trainable",
        )
        require(s.steps > 0 or s.epochs > 0, f"stage.{name}: expected steps or epochs > 0")
        one_of(f"stage.{name}.optimizer", s.optimizer, ("adamw", "adafactor"))
        one_of(f"stage.{name}.momentum_dtype", s.momentum_dtype, ("float32", "bfloat16"))
        require(
            s.lora.rank == 0 or "language_model" in s.trainable,
            f"stage.{name}.lora.rank={s.lora.rank} needs 'language_model' in its trainable parts",
        )
        widths = (c.model.llm.hidden_size, c.model.llm.intermediate_size)
        require(
            s.lora.rank == 0 or s.lora.base != "nf4" or not any(n % NF4_BLOCK for n in widths),
            f"stage.{name}.lora.base=nf4: expected model.llm.hidden_size and intermediate_size to "
            f"be multiples of {NF4_BLOCK}, got {widths[0]} and {widths[1]}",
        )
        validate_start(c, name)
        if s.objective in ("grpo", "ppo"):
            validate_policy(c, name)
        if s.objective == "preference":
            validate_sampling(c, name)
        try:
            lora_config(s)
            ModalityChoice(tuple(s.modality_probs), s.text_only_prob)
        except ValueError as error:
            raise ConfigError(f"stage.{name}: {error}") from error


def stage_before(c: ConfigDict, name: str) -> str:
    """The stage that a stage starts from; "": random weights."""
    return c.stage[name].init_from or next(iter(reversed(policies_before(c, name))), "")


def policies_before(c: ConfigDict, name: str) -> list[str]:
    """The earlier stages that train the model itself."""
    earlier = c.stages[: c.stages.index(name)]
    return [stage for stage in earlier if c.stage[stage].objective != "preference"]


def reward_stage(c: ConfigDict, name: str) -> str:
    """The preference stage whose model rewards stage `name`; "" where there is none."""
    earlier = c.stages[: c.stages.index(name)]
    found = [stage for stage in earlier if c.stage[stage].objective == "preference"]
    return found[-1] if found else ""


def validate_start(c: ConfigDict, name: str) -> None:
    if c.stage[name].init_from:
        one_of(f"stage.{name}.init_from", c.stage[name].init_from, policies_before(c, name))


def validate_policy(c: ConfigDict, name: str) -> None:
    """A stage with objective grpo or ppo."""
    s, key = c.stage[name], f"stage.{name}.rl"
    rl = s.rl
    one_of(f"{key}.rollout_weights", rl.rollout_weights, ("gathered", "training"))
    one_of(f"{key}.level", rl.level, ("token", "sequence"))
    one_of(f"{key}.reduction", rl.reduction, REDUCTIONS)
    one_of(f"{key}.advantage_scale", rl.advantage_scale, SCALES)
    one_of(f"{key}.truncated", rl.truncated, ("mask", "keep", "zero"))
    one_of(f"{key}.critic", rl.critic, ("shared", "own"))
    one_of(f"{key}.kl_in", rl.kl_in, ("reward", "loss"))
    for field in ("max_new_tokens", "chunks", "inner_epochs", "minibatches"):
        require(rl[field] >= 1, f"{key}.{field}: expected at least 1, got {rl[field]}")
    for field in (
        "beta",
        "clip_low",
        "clip_high",
        "clip_max",
        "kl_target",
        "std_ddof",
        "std_eps",
        "value_clip",
        "value_coef",
    ):
        require(rl[field] >= 0, f"{key}.{field}: expected at least 0, got {rl[field]}")
    for field in ("gamma", "gae_lambda"):
        require(0 <= rl[field] <= 1, f"{key}.{field}: expected 0 to 1, got {rl[field]}")
    require(rl.kl_horizon > 0, f"{key}.kl_horizon: expected above 0, got {rl.kl_horizon}")
    require(
        rl.std_ddof < max(rl.group, 2) or s.objective == "ppo",
        f"{key}.std_ddof: expected less than group={rl.group}, got {rl.std_ddof}",
    )
    require(
        rl.clip_max == 0 or rl.clip_max > 1 + rl.clip_high,
        f"{key}.clip_max: expected 0 or more than 1 + clip_high, got {rl.clip_max}",
    )
    require(
        len(rl.length_window) == 2
        and (not rl.length_window[1] or rl.length_window[0] <= rl.length_window[1]),
        f"{key}.length_window: expected (least, most) words, got {rl.length_window}",
    )
    require(
        rl.kl_target == 0 or (s.objective == "ppo" and rl.kl_in == "reward" and rl.beta > 0),
        f"{key}.kl_target={rl.kl_target} adapts the KL in ppo's reward: it needs objective=ppo, "
        "kl_in=reward and beta > 0",
    )
    for field, none in (
        ("ema_decay", 0.0),
        ("label_weight", 1.0),
        ("with_response", True),
        ("balanced_tasks", ()),
    ):
        require(
            s[field] == none,
            f"stage.{name}.{field}: expected {none} for {s.objective}, got {s[field]}",
        )
    validate_rewards(c.reward)
    require(
        c.reward.combination == "sum" or rl.group > 1,
        f"reward.combination={c.reward.combination} compares the responses of a group: expected "
        f"{key}.group above 1, got {rl.group}",
    )
    require(
        c.reward.learned == 0 or bool(reward_stage(c, name)),
        f"reward.learned={c.reward.learned} needs a stage with objective=preference before {name}",
    )
    validate_sampling(c, name)


def validate_sampling(c: ConfigDict, name: str) -> None:
    """What every stage that samples answers needs."""
    s, key = c.stage[name], f"stage.{name}.rl"
    require(
        STRATEGY in LABEL_SPACES[c.data.label_space],
        f"stage.{name}.objective={s.objective}: label space {c.data.label_space} has no responses",
    )
    require(
        s.token_dropout == 0,
        f"stage.{name}.token_dropout: expected 0 for {s.objective}, got {s.token_dropout}",
    )
    require(
        s.lora.dropout == 0 or s.lora.rank == 0,
        f"stage.{name}.lora.dropout: expected 0 for {s.objective}, got {s.lora.dropout}",
    )
    try:
        policy_options(c, s, Stops(0, 0))
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from error


class Stops(NamedTuple):
    """The ids of a tokenizer that sampling needs."""

    end_id: int
    pad_id: int


def policy_options(c: ConfigDict, stage: ConfigDict, tok) -> PolicyOptions:
    """`tok`: a tokenizer, or its `Stops`."""
    rl, ppo = stage.rl, stage.objective == "ppo"
    return PolicyOptions(
        group=rl.group,
        max_new_tokens=rl.max_new_tokens,
        stop_ids=(tok.end_id,),
        pad_id=tok.pad_id,
        temperature=rl.temperature,
        critic=rl.critic if ppo else "none",
        shared_prefix=rl.shared_prefix,
        reduction=rl.reduction,
        clip_low=rl.clip_low,
        clip_high=rl.clip_high,
        clip_max=rl.clip_max or None,
        level=rl.level,
        beta=rl.beta if not ppo or rl.kl_in == "loss" else 0.0,
        value_clip=rl.value_clip,
        value_coef=rl.value_coef,
    )


def data_spec(folder: str | pathlib.Path) -> MediaSpec:
    """The media specification a data set was built with."""
    report = pathlib.Path(folder) / "build_report.json"
    if not report.is_file():
        raise ConfigError(
            f"data.folder: no built data set at {folder}; run `python -m mm_jax prepare` and pass "
            "the folder it prints"
        )
    return MediaSpec(**read_json(report)["spec"])


def run_tokenizer(c: ConfigDict, workdir: pathlib.Path) -> tokenizer.Tokenizer:
    """The run's tokenizer in `workdir/tokenizer`, copied or trained on the train split at first."""

    def texts():
        for sample in SampleSource(c.data.folder, "train", light=True):
            yield from (f" {t}" for t in (sample.client_text, sample.response) if t)
        space = LABEL_SPACES[c.data.label_space]
        # Labels and template words often enough to become whole tokens.
        words = [f" {label}" for labels in space.values() for label in labels]
        words += [*prompts.ANSWER_FIELDS.values(), prompts.RESPONSE_FIELD]
        words += ["Client", "Therapist", *(f"({label})" for ls in space.values() for label in ls)]
        words += [prompts.SYSTEM[c.data.template], prompts.COMPRESSOR_SYSTEM[c.data.template]]
        words += ["system", "user", "assistant", "\n", "Answer:", "Client:"]
        yield from words * 500
        if "compressor" in c.model.parts:  # the numbers of a reconstruction's lines
            yield from [f"{number}:" for number in range(1, 100)] * 100

    try:
        return tokenizer.copy_or_train(
            c.data.tokenizer, workdir / "tokenizer", texts(), c.data.vocab_size
        )
    except ValueError as error:
        raise ConfigError(f"data.tokenizer: {error}") from error


def model_config(c: ConfigDict, tok: tokenizer.Tokenizer) -> MultiMoodConfig:
    """The network's config; vocabulary sizes and placeholder ids follow the tokenizer."""
    llm = c.model.llm.to_dict()
    multiple, rows = llm.pop("vocab_multiple"), llm.pop("vocab_size")
    if rows < len(tok):
        rows = -(-len(tok) // multiple) * multiple
    compressor = c.model.compressor.to_dict()
    memory_rows = compressor.pop("vocab_size")
    if memory_rows < tok.text_rows:
        memory_rows = len(tok)
    parts = c.model.parts
    try:
        return MultiMoodConfig(
            llm=Qwen2Config(vocab_size=rows, vocab_padding=rows - len(tok), **llm),
            vision=SiglipConfig(**c.model.vision) if "vision" in parts else None,
            audio=BeatsConfig(**c.model.audio) if "audio" in parts else None,
            compressor=MambaConfig(vocab_size=memory_rows, **compressor)
            if "compressor" in parts
            else None,
            connector_type=c.model.connector_type,
            vision_select_layer=c.model.vision_select_layer,
            audio_projector_type=c.model.audio_projector_type,
            video_token_id=tok.video_id,
            audio_token_id=tok.audio_id,
            history_token_id=tok.history_id,
        )
    except ValueError as error:
        raise ConfigError(f"model: {error}") from error


def lora_config(stage: ConfigDict) -> LoraConfig | None:
    """The adapters of a stage; None where its rank is 0."""
    if stage.lora.rank == 0:
        return None
    values = {k: v for k, v in stage.lora.items() if k != "init_from"}
    return LoraConfig(**{**values, "targets": tuple(values["targets"])})


def sequence_plan(config: MultiMoodConfig) -> prompts.SequencePlan:
    side = config.vision.patches_per_side if config.vision else 0
    return prompts.SequencePlan(side, PADDING[config.connector_type])


def check_media(folder: str | pathlib.Path, config: MultiMoodConfig) -> None:
    """The data set's frames must have the model's size."""
    if config.vision is not None:
        size = data_spec(folder).image_size
        require(
            size == config.vision.image_size,
            f"model.vision.image_size is {config.vision.image_size}, but the data set at "
            f"{folder} was built with image_size {size}",
        )


def prompter(c: ConfigDict, config: MultiMoodConfig, tok: tokenizer.Tokenizer) -> prompts.Prompter:
    return prompts.Prompter(
        tok,
        sequence_plan(config),
        label_space=c.data.label_space,
        template=c.data.template,
        max_length=c.data.max_length,
        parts=tuple(c.model.parts),
        previous_labels=c.data.previous_labels,
        budget=memory_budget(c),
        history_text=c.data.history_text,
    )


def memory_budget(c: ConfigDict) -> MemoryBudget:
    try:
        return MemoryBudget(c.data.memory_vectors, c.data.memory_utterances)
    except ValueError as error:
        raise ConfigError(f"data.memory_vectors, data.memory_utterances: {error}") from error


def stage_prompter(
    base: prompts.Prompter, stage: ConfigDict, train: SampleSource
) -> prompts.Prompter:
    """The run's prompter with a stage's answers and loss weights; `train` gives label shares."""
    balance = {
        task: prompts.balancing_weights([sample.target(task) for sample in train])
        for task in stage.balanced_tasks
    }
    return dataclasses.replace(
        base,
        label_weight=stage.label_weight,
        balance=balance,
        with_response=stage.with_response,
    )


def buckets(c: ConfigDict) -> Buckets:
    d = c.data
    return Buckets(d.token_bucket, d.fbank_bucket, d.history_bucket, d.memory_bucket)


def stage_task(c: ConfigDict, stage: ConfigDict) -> Task:
    return Task(
        unit={"sft": "sample", "compressor": "history"}.get(stage.objective, "prompt"),
        utterances=stage.unit_utterances,
        regime=c.data.history_labels,
        label_dropout=stage.history_label_dropout,
        modality=ModalityChoice(tuple(stage.modality_probs), stage.text_only_prob),
        predictions=read_label_predictions(c.data.history_predictions),
    )


def read_label_predictions(path: str) -> dict[str, dict[str, str]] | None:
    """Sample id -> predicted labels of a predictions.jsonl; None where no path is given."""
    if not path:
        return None
    found = {}
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                found[row["id"]] = dict(row["predicted"])
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(
                    f"data.history_predictions: {path} line {number}: expected one of `predict`'s "
                    f"predictions.jsonl, got {line[:60]!r}"
                ) from error
    return found


def dtypes(c: ConfigDict, param=jnp.float32) -> Dtypes:
    compute = c.precision
    if compute == "auto":
        compute = "bfloat16" if jax.default_backend() == "gpu" else "float32"
    return Dtypes(param=param, compute=jnp.dtype(compute))


def create_model(c: ConfigDict, config: MultiMoodConfig):
    """`rngs -> MultiMood` for `nnx.eval_shape` and jitted initialisation."""

    def create(rngs: nnx.Rngs) -> MultiMood:
        return MultiMood(
            config,
            dtypes=dtypes(c),
            rngs=rngs,
            remat=c.model.remat,
            attention=c.model.attention,
        )

    return create


def describe(config: MultiMoodConfig) -> dict:
    """The network's config as plain JSON values."""
    return dataclasses.asdict(config)
