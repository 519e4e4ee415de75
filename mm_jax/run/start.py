"""Starts runs from released weights (`config.init_from`): sizes, tokenizer and parameters."""

from __future__ import annotations

import dataclasses
import logging
import pathlib
from collections.abc import Callable

import jax
import numpy as np
from flax import nnx

from mm_jax.config.errors import require
from mm_jax.config.schema import Config, InitFrom
from mm_jax.config.stage import Lora, Stage
from mm_jax.models import lora
from mm_jax.models.abstract import AbstractModel, init_params
from mm_jax.run import build
from mm_jax.weights import keymap
from mm_jax.weights.load import load_state, param_shapes
from mm_jax.weights.sources import (
    FIELDS,
    MAMBA,
    Adapter,
    Source,
    group_of,
    join,
    merge_adapter,
    open_adapter,
    open_source,
)
from mm_jax.weights.tensors import grown

log = logging.getLogger(__name__)

NAMES = ("model", "language_model", "vision_tower", "audio_tower", "mamba_compressor", "adapter")
SINGLE = ("language_model", "vision_tower", "audio_tower", "mamba_compressor")
TABLES = ("model.embed_tokens.weight", "lm_head.weight", f"{MAMBA}embeddings.weight")
# Fields that the run's own config decides: they concern training, or follow from the tokenizer.
OURS = ("residual_dropout", "vocab_padding", "layer_wise_gradient_decay_ratio")


def read_sources(named: InitFrom) -> Source | None:
    """Opens everything that `init_from` names as one source, or returns None if it names nothing.

    Reads only headers. Raises ConfigError, WeightsError or FileNotFoundError.
    """
    single = [(getattr(named, module), module) for module in SINGLE]
    sources = [open_source(where, module) for where, module in single if where]
    if named.model:
        sources.append(open_source(named.model))
    if not sources:
        require(not named.adapter, "init_from.adapter needs init_from.language_model or .model")
        return None
    source = join(sources)
    if named.adapter:
        tensors = merge_adapter(source.tensors, open_adapter(named.adapter))
        source = dataclasses.replace(source, tensors=tensors, merged=True)
    return source


def apply_sources(config: Config) -> Config:
    """Returns the config with sizes and tokenizer of the sources, and with absolute local paths.

    Checks the adapters that stages start from. Raises as `read_sources` does.
    """
    values = config.model_dump()
    for name in NAMES:
        values["init_from"][name] = absolute(values["init_from"][name])
    for name in config.stages:
        settings = values["stage"][name]["lora"]
        settings["init_from"] = absolute(settings["init_from"])
        if settings["init_from"]:
            check_adapter(name, config.stage[name].lora, open_adapter(settings["init_from"]))
    source = read_sources(InitFrom(**values["init_from"]))
    if source is not None:
        for part, found in source.configs.items():
            sizes = {k: v for k, v in dataclasses.asdict(found).items() if k not in OURS}
            values["model"][part].update(sizes)
        values["model"].update(source.fields)
        if not config.data.tokenizer and ("language_model",) in source.groups:
            require(
                source.has_tokenizer,
                f"data.tokenizer: {source.name} has no tokenizer; name the folder of its own",
            )
            values["data"]["tokenizer"] = str(source.folder)
    return Config(**values)


def check_adapter(name: str, wanted: Lora, found: Adapter) -> None:
    """Raises ConfigError if a stage's LoRA settings are not those of the adapter it starts from."""
    ours = (wanted.rank, wanted.alpha, tuple(sorted(wanted.targets)), False)
    theirs = (found.rank, found.alpha, found.targets, found.rslora)
    require(
        ours == theirs,
        f"stage.{name}.lora: expected the adapter's (rank, alpha, targets, rslora) {theirs}, got "
        f"{ours}",
    )


def absolute(where: str) -> str:
    """Makes a local path absolute; returns a hub id (or a path that does not exist) unchanged."""
    path = pathlib.Path(where).expanduser()
    return str(path.absolute()) if where and path.exists() else where


def adopt_sources(config: Config, before: Config) -> Config | None:
    """Returns the config with what `apply_sources` put into the run's saved config, `before`.

    A run can then continue without its sources once its first stage is done. Returns None if
    `init_from` differs.
    """
    now, then = config.init_from, before.init_from
    named = {name: getattr(now, name) for name in NAMES}
    kept_names = {name: getattr(then, name) for name in NAMES}
    same = all(
        kept_names[name] in (where, str(pathlib.Path(where).absolute()))
        for name, where in named.items()
    )
    if not same or not any(named.values()):
        return None
    values = config.model_dump()
    values["init_from"].update(kept_names)
    known = before.model_dump()
    for part in ("llm", "vision", "audio", "compressor"):
        kept = {k: v for k, v in known["model"][part].items() if k not in (*OURS, "vocab_multiple")}
        values["model"][part].update(kept)
    for field in FIELDS:
        values["model"][field] = known["model"][field]
    values["data"]["tokenizer"] = config.data.tokenizer or before.data.tokenizer
    return Config(**values)


def start_params(
    config: Config,
    create: Callable[[nnx.Rngs], nnx.Module],
    abstract: AbstractModel,
    dtype: Callable[[tuple, np.dtype], np.dtype] | None = None,
) -> nnx.State:
    """Returns a run's parameters before its first step: those of `init_from`, the rest random.

    `dtype(path, the tensor's dtype)` chooses a loaded parameter's dtype (default: float32).
    """
    source = read_sources(config.init_from)
    if source is None:
        return init_params(create, abstract, config.seed)

    def loaded(path, _=None) -> bool:
        return any(path[: len(group)] == group for group in source.groups)

    flat = nnx.to_flat_state(abstract.params)
    wanted = nnx.from_flat_state([(path, v) for path, v in flat if loaded(path)])
    names = {path[0] for path, _ in flat}
    unused = sorted({g[0] for g in source.groups} - names)
    tensors = {}
    for key, tensor in source.tensors.items():
        group = group_of(key)
        if group is None or (group in source.groups and group[0] in names):
            tensors[key] = tensor
    shapes = param_shapes(wanted)
    for e in keymap.entries(shapes, keymap.MULTIMOOD):
        key = e.keys[0]
        rows = e.torch_shape(shapes[e.path])[0] if key in TABLES else 0
        if key in tensors and tensors[key].shape[0] < rows:
            log.info("%s: %d rows grow to %d", key, tensors[key].shape[0], rows)
            tensors[key] = grown(tensors[key], rows, config.init_from.new_row_noise, config.seed)
    random = {path[0] for path, _ in flat if not loaded(path)}
    log.info("weights of %s; random: %s", source.name, sorted(random) or "none")
    if unused:
        log.info("not in this model (see model.parts), left out: %s", unused)
    read = load_state(
        wanted,
        keymap.MULTIMOOD,
        tensors,
        name=source.name,
        shardings=abstract.shardings,
        dtype=dtype,
    )
    if not random:
        return read
    fresh = init_params(create, abstract, config.seed, keep=lambda path: not loaded(path))
    return nnx.merge_state(read, fresh)


def training_dtype(config: Config, stage: Stage) -> Callable[[tuple, np.dtype], np.dtype]:
    """Returns a function that chooses a loaded parameter's dtype.

    float32 if the stage trains the parameter, else the compute type.
    """
    frozen = build.dtypes(config).compute
    adapted = ("language_model",) if stage.lora.rank else ()

    def dtype(path: tuple, _) -> np.dtype:
        trained = path[0] in stage.trainable and path[0] not in adapted
        return np.dtype(np.float32) if trained else np.dtype(frozen)

    return dtype


def start_adapters(where: str, params: nnx.State, shardings: nnx.State) -> nnx.State:
    """Returns an adapted model's parameters with the adapters of a PEFT folder."""
    adapter = open_adapter(where)

    def chosen(state: nnx.State) -> nnx.State:
        own = [(p, v) for p, v in nnx.to_flat_state(state) if lora.is_adapter(p)]
        return nnx.from_flat_state(own)

    abstract = jax.eval_shape(lambda: chosen(params))
    read = load_state(
        abstract, keymap.PEFT, adapter.tensors, name=adapter.name, shardings=chosen(shardings)
    )
    return nnx.merge_state(params, read)
