"""Builds a run's objects from its config: tokenizer, prompter, network, mesh."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from mm_jax.config.errors import ConfigError, one_of, require
from mm_jax.config.files import parse_json, read_json, read_text
from mm_jax.config.schema import Config, Mesh
from mm_jax.config.stage import Stage
from mm_jax.data import prompts, tokenizer
from mm_jax.data.batch import Shape
from mm_jax.data.datasets.common import BUILD_REPORT, SampleSource
from mm_jax.data.history import MemoryBudget
from mm_jax.data.labels import (
    BUILT_IN,
    LABELS_FILE,
    RESPONSE_FIELD,
    LabelSpace,
    built_in,
    read_labels,
)
from mm_jax.data.media import MediaSpec
from mm_jax.data.pipeline import ModalityChoice, Recipe
from mm_jax.data.shapes import Shapes, choose
from mm_jax.models.abstract import AbstractModel, abstract_model
from mm_jax.models.beats import BeatsConfig
from mm_jax.models.decoder_config import DecoderConfig
from mm_jax.models.layers import Dtypes
from mm_jax.models.mamba import MambaConfig
from mm_jax.models.multimood import MultiMood, MultiMoodConfig
from mm_jax.models.sharding import make_mesh
from mm_jax.models.siglip import SiglipConfig
from mm_jax.models.stc import PADDING
from mm_jax.run import flops
from mm_jax.run.host_memory import bound_kept_memory, give_back_compiler_memory

Create = Callable[[nnx.Rngs], MultiMood]


@dataclasses.dataclass(frozen=True)
class Run:
    """A run folder and its model without values, as every command needs them."""

    config: Config
    workdir: pathlib.Path
    tokenizer: tokenizer.Tokenizer
    model_config: MultiMoodConfig
    prompter: prompts.Prompter
    abstract: AbstractModel
    create: Create

    @classmethod
    def open(cls, config: Config, workdir: pathlib.Path) -> Run:
        """Builds what the config names; reads the tokenizer in `workdir`, or puts one there."""
        space = label_space(config, workdir)
        check_label_space(config, space)
        give_back_compiler_memory()
        bound_kept_memory()
        tok = run_tokenizer(config, workdir, space)
        network = model_config(config, tok)
        create = create_model(config, network)
        return cls(
            config,
            workdir,
            tok,
            network,
            prompter(config, network, tok, space),
            abstract_model(create, mesh_of(config.mesh)),
            create,
        )


def mesh_of(mesh: Mesh) -> jax.sharding.Mesh:
    """Builds the mesh over all devices. Raises ConfigError."""
    try:
        return make_mesh(mesh.model_dump())
    except ValueError as error:
        raise ConfigError(str(error)) from error


def label_space(config: Config, workdir: pathlib.Path | None = None) -> LabelSpace:
    """Returns the label space of a run: that in its folder, the one that the config names, or that
    of its data set. Raises ConfigError."""
    if workdir is not None and (workdir / LABELS_FILE).is_file():
        return read_labels(workdir / LABELS_FILE)
    named = config.data.label_space
    if named in BUILT_IN:
        return built_in(named)
    if named:
        path = pathlib.Path(named)
        require(
            path.is_file(),
            f"data.label_space: expected {', '.join(BUILT_IN)} or a labels.json, got {named!r}",
        )
        return read_labels(path)
    return data_labels(config.data.folder)


def data_labels(folder: str | pathlib.Path) -> LabelSpace:
    """Reads the label space of a built data set. Raises ConfigError."""
    report, path = data_report(folder), pathlib.Path(folder) / LABELS_FILE
    if path.is_file():
        return read_labels(path)
    # Data sets built before 2026-11-30 do not describe their labels.
    name = report["dataset"].partition("/")[0]
    require(name in ("mesc", "dfew", "synthetic"), f"data.folder: {folder} has no {LABELS_FILE}")
    return built_in("dfew" if name == "dfew" else "mesc")


def check_label_space(config: Config, space: LabelSpace) -> None:
    """Raises ConfigError if a stage needs what the label space lacks."""
    for name in config.stages:
        stage = config.stage[name]
        for task in stage.balanced_tasks:
            one_of(f"stage.{name}.balanced_tasks", task, space.names)
        require(
            space.reply or not stage.samples,
            f"stage.{name}.objective={stage.objective}: label space {space.name} has no responses",
        )


def check_labels(config: Config, space: LabelSpace) -> LabelSpace:
    """Returns the label space under the data set's name for it. Raises ConfigError if it is not
    that of the data set, but for its guidance and other spellings."""
    found = data_labels(config.data.folder)
    ours, theirs = (
        [(t.name, t.caption, t.about, t.labels) for t in s.tasks] for s in (space, found)
    )
    require(
        (ours, space.reply) == (theirs, found.reply),
        f"data.label_space={config.data.label_space or space.name}: the data set at "
        f"{config.data.folder} has other labels or tasks: {found.name} with "
        f"{', '.join(found.names)}; leave data.label_space empty, or choose another data.folder",
    )
    return dataclasses.replace(space, name=found.name)


def dataset_name(config: Config) -> str:
    """Returns the name of the run's data set: "mesc", "dfew", "synthetic"."""
    parts = pathlib.Path(config.data.folder).parts  # .../name/options/version
    return parts[-3] if len(parts) > 2 else ""


def data_report(folder: str | pathlib.Path) -> dict:
    """Reads what the build of a data set reported. Raises ConfigError."""
    report = pathlib.Path(folder) / BUILD_REPORT
    if not report.is_file():
        raise ConfigError(
            f"data.folder: no built data set at {folder}; run `python -m mm_jax prepare` and pass "
            "the folder it prints"
        )
    return read_json(report)


def data_spec(folder: str | pathlib.Path) -> MediaSpec:
    """Reads the media specification that a data set was built with."""
    return MediaSpec(**data_report(folder)["spec"])


def check_media(folder: str | pathlib.Path, network: MultiMoodConfig) -> None:
    """Raises ConfigError if the data set's frames do not have the network's image size."""
    # A data set that was built without media has an image size that means nothing.
    if network.vision is not None and data_report(folder)["media"]:
        size = data_spec(folder).image_size
        require(
            size == network.vision.image_size,
            f"model.vision.image_size is {network.vision.image_size}, but the data set at "
            f"{folder} was built with image_size {size}",
        )


def run_tokenizer(config: Config, workdir: pathlib.Path, space: LabelSpace) -> tokenizer.Tokenizer:
    """Returns the tokenizer in `workdir/tokenizer`, which it first copies, or trains on train."""

    def texts():
        for sample in SampleSource(config.data.folder, "train", light=True):
            yield from (f" {t}" for t in (sample.client_text, sample.response) if t)
        labels = [label for task in space.tasks for label in task.labels]
        # Labels and template words, often enough for BPE to make whole tokens of them.
        words = [f" {label}" for label in labels]
        words += [*(task.field for task in space.tasks), RESPONSE_FIELD]
        # As histories write them: a label after " (" is cut out as another word than after "(".
        words += [text for x in labels for text in (f"Client ({x})", f"Therapist({x})")]
        template = config.data.template
        words += [prompts.SYSTEM[template], prompts.COMPRESSOR_SYSTEM[template]]
        words += ["system", "user", "assistant", "\n", "Answer:", "Client:"]
        yield from words * 500

    # Line numbers of reconstructions: cut into pieces, they would share their digits.
    numbers = [f"{number}:" for number in range(10, 100)]
    try:
        return tokenizer.copy_or_train(
            config.data.tokenizer,
            workdir / "tokenizer",
            texts(),
            config.data.vocab_size,
            numbers if "compressor" in config.model.parts else (),
        )
    except ValueError as error:
        raise ConfigError(f"data.tokenizer: {error}") from error


def model_config(config: Config, tok: tokenizer.Tokenizer) -> MultiMoodConfig:
    """Builds the network's config; vocabulary sizes and placeholder ids follow the tokenizer."""
    c = config.model
    rows = c.llm.vocab_size
    if rows < len(tok):
        rows = -(-len(tok) // c.llm.vocab_multiple) * c.llm.vocab_multiple
    memory_rows = c.compressor.vocab_size
    if memory_rows < tok.text_rows:
        memory_rows = len(tok)
    sizes = c.llm.model_dump(exclude={"vocab_size", "vocab_multiple"})
    sizes["rope_scaling"] = c.llm.rope_scaling
    mamba = c.compressor.model_dump(exclude={"vocab_size"})
    try:
        return MultiMoodConfig(
            llm=DecoderConfig(**sizes, vocab_size=rows, vocab_padding=rows - len(tok)),
            vision=SiglipConfig(**c.vision.model_dump()) if "vision" in c.parts else None,
            audio=BeatsConfig(**c.audio.model_dump()) if "audio" in c.parts else None,
            compressor=MambaConfig(**mamba, vocab_size=memory_rows)
            if "compressor" in c.parts
            else None,
            connector_type=c.connector_type,
            connector_depth=c.connector_depth,
            vision_select_layer=c.vision_select_layer,
            audio_projector_type=c.audio_projector_type,
            video_token_id=tok.video_id,
            audio_token_id=tok.audio_id,
            history_token_id=tok.history_id,
        )
    except ValueError as error:
        raise ConfigError(f"model: {error}") from error


def dtypes(config: Config) -> Dtypes:
    """Returns the types of parameters (float32) and of computation."""
    compute = config.precision
    if compute == "auto":
        compute = "bfloat16" if jax.default_backend() == "gpu" else "float32"
    return Dtypes(param=jnp.float32, compute=jnp.dtype(compute))


def create_model(config: Config, network: MultiMoodConfig) -> Create:
    """Returns a function `rngs -> MultiMood`, for `nnx.eval_shape` and jitted initialisation."""

    def create(rngs: nnx.Rngs) -> MultiMood:
        return MultiMood(
            network,
            dtypes=dtypes(config),
            rngs=rngs,
            remat=config.model.remat,
            attention=config.model.attention,
        )

    return create


def span_lengths(network: MultiMoodConfig) -> prompts.SpanLengths:
    side = network.vision.patches_per_side if network.vision else 0
    return prompts.SpanLengths(side, PADDING[network.connector_type])


def memory_budget(config: Config) -> MemoryBudget:
    return MemoryBudget(config.data.memory_vectors, config.data.memory_utterances)


def shapes(
    config: Config, network: MultiMoodConfig, lengths: Sequence[Shape], count: int = 0
) -> Shapes:
    """Chooses what rows of these lengths are padded to: `count` shapes, by default data.shapes."""
    return choose(lengths, count or config.data.shapes, flops.row_cost(network))


def prompter(
    config: Config, network: MultiMoodConfig, tok: tokenizer.Tokenizer, space: LabelSpace
) -> prompts.Prompter:
    return prompts.Prompter(
        tok,
        span_lengths(network),
        label_space=space,
        template=config.data.template,
        max_length=config.data.max_length,
        parts=config.model.parts,
        previous_labels=config.data.previous_labels,
        budget=memory_budget(config),
        history=config.data.history,
        history_tokens=config.data.history_tokens,
    )


def stage_prompter(base: prompts.Prompter, stage: Stage, train: SampleSource) -> prompts.Prompter:
    """Returns the run's prompter with a stage's answers and loss weights.

    The labels' shares in `train` give the balancing weights.
    """
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


def stage_recipe(config: Config, stage: Stage) -> Recipe:
    """Returns the recipe for a stage's examples."""
    return Recipe(
        unit={"sft": "sample", "compressor": "history"}.get(stage.objective, "prompt"),
        utterances=stage.unit_utterances,
        regime=config.data.history_labels,
        label_dropout=stage.history_label_dropout,
        modality=ModalityChoice(stage.modality_probs, stage.text_only_prob),
        predictions=read_label_predictions(config.data.history_predictions),
    )


def read_label_predictions(path: str) -> dict[str, dict[str, str]] | None:
    """Maps sample ids to the predicted labels in a predictions.jsonl; None without a path."""
    if not path:
        return None
    found = {}
    for number, line in enumerate(read_text(pathlib.Path(path)).strip().split("\n"), 1):
        try:
            row = parse_json(line)
            found[row["id"]] = dict(row["predicted"])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"data.history_predictions: {path} line {number}: expected one of `predict`'s "
                f"predictions.jsonl, got {line[:60]!r}"
            ) from error
    return found
