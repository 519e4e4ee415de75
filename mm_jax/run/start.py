"""Released weights as the start of a run (`config.init_from`): its sizes, tokenizer, parameters."""

from __future__ import annotations

import dataclasses
import logging
import pathlib
from collections.abc import Callable

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from mm_jax.config.errors import require
from mm_jax.models import lora
from mm_jax.models.abstract import Abstract, init_params
from mm_jax.run import build
from mm_jax.weights import keymap
from mm_jax.weights.load import load_state, param_shapes
from mm_jax.weights.sources import (
    MAMBA,
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
PARTS = ("language_model", "vision_tower", "audio_tower", "mamba_compressor")
TABLES = ("model.embed_tokens.weight", "lm_head.weight", f"{MAMBA}embeddings.weight")
# Fields of a released config that say how it was trained, not what it computes.
OURS = ("residual_dropout", "vocab_padding", "layer_wise_gradient_decay_ratio")


def read_sources(c: ConfigDict) -> Source | None:
    """What `init_from` names, as one source; None where it names nothing. Only headers are read.
    Raises ConfigError, WeightsError or FileNotFoundError."""
    named = c.init_from
    sources = [open_source(named[part], part) for part in PARTS if named[part]]
    if named.model:
        sources.append(open_source(named.model))
    if not sources:
        require(not named.adapter, "init_from.adapter needs init_from.language_model or .model")
        return None
    source = join(sources)
    if named.adapter:
        tensors = merge_adapter(source.tensors, open_adapter(named.adapter))
        source = dataclasses.replace(source, tensors=tensors)
    return source


def apply_sources(c: ConfigDict) -> None:
    """Puts the sizes and the tokenizer of `init_from`'s sources into the config, local paths made
    absolute, and checks the adapters that stages start from. Raises as `read_sources` does."""
    require(
        c.init_from.new_row_noise >= 0,
        f"init_from.new_row_noise: expected at least 0, got {c.init_from.new_row_noise}",
    )
    for name in NAMES:
        c.init_from[name] = absolute(c.init_from[name])
    source = read_sources(c)
    if source is not None:
        with c.unlocked():
            for part, config in source.configs.items():
                values = {k: v for k, v in dataclasses.asdict(config).items() if k not in OURS}
                c.model[part].update(values)
            c.model.update(source.fields)
            if not c.data.tokenizer and ("language_model",) in source.groups:
                require(
                    source.has_tokenizer,
                    f"data.tokenizer: {source.name} has no tokenizer; name the folder of its own",
                )
                c.data.tokenizer = str(source.folder)
    for name in c.stages:
        wanted = c.stage[name].lora
        wanted.init_from = absolute(wanted.init_from)
        if wanted.init_from:
            require(wanted.rank > 0, f"stage.{name}.lora.init_from needs lora.rank > 0")
            found = open_adapter(wanted.init_from)
            ours = (wanted.rank, float(wanted.alpha), tuple(sorted(wanted.targets)), False)
            theirs = (found.rank, found.alpha, found.targets, found.rslora)
            require(
                ours == theirs,
                f"stage.{name}.lora: expected the adapter's (rank, alpha, targets, rslora) "
                f"{theirs}, got {ours}",
            )


def absolute(where: str) -> str:
    """A local path made absolute; a hub id (or what does not exist) as it is."""
    path = pathlib.Path(where).expanduser()
    return str(path.absolute()) if where and path.exists() else where


def adopt_sources(c: ConfigDict, before: ConfigDict) -> bool:
    """Takes what `apply_sources` put into the config of the same run before, so that a run goes on
    without its sources once its first stage is done. False where `init_from` is another."""
    same = all(
        before.init_from[name]
        in (c.init_from[name], str(pathlib.Path(c.init_from[name]).absolute()))
        for name in NAMES
    )
    if not same or not any(c.init_from[name] for name in NAMES):
        return False
    with c.unlocked():
        for name in NAMES:
            c.init_from[name] = before.init_from[name]
        for part in ("llm", "vision", "audio", "compressor"):
            kept = {
                k: v for k, v in before.model[part].items() if k not in (*OURS, "vocab_multiple")
            }
            c.model[part].update(kept)
        for field in ("connector_type", "vision_select_layer", "audio_projector_type"):
            c.model[field] = before.model[field]
        c.data.tokenizer = c.data.tokenizer or before.data.tokenizer
    return True


def start_params(
    c: ConfigDict,
    create: Callable[[nnx.Rngs], nnx.Module],
    abstract: Abstract,
    dtype: Callable[[tuple, np.dtype], np.dtype] | None = None,
) -> nnx.State:
    """A run's parameters before its first step: those of `init_from`, random ones for the rest.

    `dtype(path, the tensor's)` is that of a loaded parameter (default: float32).
    """
    source = read_sources(c)
    if source is None:
        return init_params(create, abstract, c.seed)

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
            tensors[key] = grown(tensors[key], rows, c.init_from.new_row_noise, c.seed)
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
    fresh = init_params(create, abstract, c.seed, keep=lambda path: not loaded(path))
    return nnx.merge_state(read, fresh)


def training_dtype(c: ConfigDict, stage: ConfigDict) -> Callable[[tuple, np.dtype], np.dtype]:
    """float32 for what a stage trains, the compute type for what it freezes."""
    frozen = build.dtypes(c).compute
    adapted = ("language_model",) if stage.lora.rank else ()

    def dtype(path: tuple, _) -> np.dtype:
        trained = path[0] in stage.trainable and path[0] not in adapted
        return np.dtype(np.float32) if trained else np.dtype(frozen)

    return dtype


def start_adapters(where: str, params: nnx.State, shardings: nnx.State) -> nnx.State:
    """The parameters of an adapted model with the adapters of a PEFT folder."""
    adapter = open_adapter(where)

    def chosen(state: nnx.State) -> nnx.State:
        own = [(p, v) for p, v in nnx.to_flat_state(state) if lora.is_adapter(p)]
        return nnx.from_flat_state(own)

    abstract = jax.eval_shape(lambda: chosen(params))
    read = load_state(
        abstract, keymap.PEFT, adapter.tensors, name=adapter.name, shardings=chosen(shardings)
    )
    return nnx.merge_state(params, read)
