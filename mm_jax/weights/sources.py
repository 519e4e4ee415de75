"""Opens released weights of any layout as tensors and configs of the parts of MultiMood.

Every layout is renamed to the released MultiMood's keys (`keymap.MULTIMOOD`), so that sources can
be joined and one table loads them all. Sizes are read from the source's own configs.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
import re

from mm_jax.models.beats import BeatsConfig
from mm_jax.models.decoder_config import FAMILIES, DecoderConfig
from mm_jax.models.mamba import MambaConfig
from mm_jax.models.siglip import SiglipConfig
from mm_jax.weights.gguf import open_gguf
from mm_jax.weights.tensors import (
    Tensor,
    WeightsError,
    merged,
    read_folder,
    read_json,
    read_safetensors,
    read_torch,
    summary,
)

VIDEOLLAMA2 = "videollama2_"  # before the family of its language model
VISION = "model.vision_tower.vision_tower."
AUDIO = "model.audio_tower."
MAMBA = "model.mamba_compressor.mamba."
MEMORY = "model.mamba_compressor.memory_projection."
# Groups of parameters that are loaded whole or not at all: path prefix -> prefixes of their keys.
GROUPS = {
    ("language_model",): ("model.embed_tokens.", "model.layers.", "model.norm.", "lm_head."),
    ("vision_tower",): ("model.vision_tower.",),
    ("mm_projector",): ("model.mm_projector.",),
    ("audio_tower",): (AUDIO,),
    ("mm_projector_a",): ("model.mm_projector_a.",),
    ("mamba_compressor", "mamba"): (MAMBA,),
    ("mamba_compressor", "memory_projection"): (MEMORY,),
}
# Buffers that some releases store; they hold no weights.
BUFFERS = re.compile(r"\.(position_ids|rotary_emb\.inv_freq)$")
# Module of the model -> section of config.model.
CONFIGS = {
    "language_model": "llm",
    "vision_tower": "vision",
    "audio_tower": "audio",
    "mamba_compressor": "compressor",
}
# Further fields of config.model that a source may give.
FIELDS = ("connector_type", "connector_depth", "vision_select_layer", "audio_projector_type")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?")
HUB_FILES = ("*.json", "*.jinja", "*.safetensors", "*.bin", "*.pt", "merges.txt", "*.model")
# The same weights again, in a layout that is not read.
HUB_LEFT_OUT = ("consolidated*", "original/*")


@dataclasses.dataclass(frozen=True)
class Source:
    """Holds what one source of released weights offers.

    `groups` (of GROUPS) must be complete; `tensors` have MultiMood's keys; `folder` (or GGUF file)
    may hold a tokenizer. `configs` maps a section of config.model (llm, vision, audio, compressor)
    to its config; `fields` are further fields of config.model.
    """

    name: str
    folder: pathlib.Path
    groups: frozenset
    tensors: dict[str, Tensor]
    configs: dict
    fields: dict = dataclasses.field(default_factory=dict)
    merged: bool = False  # with an adapter: the tensors are not those of the folder

    def only(self, module: str) -> Source:
        """Returns the part that belongs to one module of the model. Raises WeightsError."""
        groups = frozenset(g for g in self.groups if g[0] == module)
        if not groups:
            has = sorted({g[0] for g in self.groups})
            raise WeightsError(f"weights: {self.name} has no {module}, only {has}")
        # A key of no group is unexpected; only a source with no other module is blamed for it.
        kept = groups | {None} if groups == self.groups else groups
        tensors = {k: t for k, t in self.tensors.items() if group_of(k) in kept}
        configs = {k: v for k, v in self.configs.items() if k == CONFIGS[module]}
        return Source(self.name, self.folder, groups, tensors, configs)

    @property
    def is_exported(self) -> bool:
        """Tells whether it is a folder of `export --layout transformers`."""
        file = self.folder / "config.json"
        return file.is_file() and read_json(file).get("model_type") == "mm_jax"

    @property
    def has_tokenizer(self) -> bool:
        names = ("tokenizer.json", "tokenizer_config.json")
        return self.folder.suffix == ".gguf" or any((self.folder / n).is_file() for n in names)


def group_of(key: str) -> tuple[str, ...] | None:
    """Returns the group (of GROUPS) that a key belongs to, or None."""
    return next((g for g, starts in GROUPS.items() if key.startswith(starts)), None)


def resolve(where: str, files: tuple[str, ...] = HUB_FILES) -> pathlib.Path:
    """Returns a local path unchanged, or downloads `files` of a hub id (name/name, or
    name/name@revision). Raises FileNotFoundError or WeightsError."""
    path = pathlib.Path(where).expanduser()
    if path.exists():
        return path
    if not HUB_ID.fullmatch(where):
        raise FileNotFoundError(f"weights: {where} does not exist (nor is it a hub id, name/name)")
    import huggingface_hub  # only hub ids need it

    repository, _, revision = where.partition("@")
    try:
        return pathlib.Path(
            huggingface_hub.snapshot_download(
                repository,
                revision=revision or None,
                allow_patterns=list(files),
                ignore_patterns=list(HUB_LEFT_OUT),
            )
        )
    except Exception as error:  # offline, unknown, private: the hub's own classes change often
        raise WeightsError(
            f"weights: {where} is not a local path, and its download from the Hugging Face hub "
            f"failed: {summary(error)}"
        ) from error


def open_source(where: str, module: str | None = None) -> Source:
    """Opens a folder, file or hub id (only the part of `module`, if given); reads only headers.
    Raises WeightsError or FileNotFoundError."""
    source = _open(where, resolve(where), module)
    tensors = {k: t for k, t in source.tensors.items() if not BUFFERS.search(k)}
    source = dataclasses.replace(source, tensors=tensors)
    return source if module is None else source.only(module)


def _open(where: str, path: pathlib.Path, module: str | None) -> Source:
    if path.suffix == ".gguf" and path.is_file():
        llm, tensors = open_gguf(path)
        return Source(where, path, frozenset({("language_model",)}), tensors, {"llm": llm})
    if path.is_file():
        return _beats(where, path)
    file = path / "config.json"
    if not file.is_file():
        files = [p for p in path.glob("*.pt") if p.is_file()]
        if len(files) == 1:
            return _beats(where, files[0])
        raise WeightsError(f"weights: {path} has no config.json")
    config = read_json(file)
    readers = {
        "mamba": _mamba,
        "siglip": _siglip,
        "siglip_vision_model": _siglip,
        **dict.fromkeys(FAMILIES, _decoder),
        "mm_jax": _mm_jax,
        **dict.fromkeys(
            (f"{VIDEOLLAMA2}{family}" for family in FAMILIES),
            functools.partial(_videollama2, module=module),
        ),
    }
    kind = config.get("model_type")
    if kind not in readers:
        adapter = (path / "adapter_config.json").is_file()
        hint = "; it is a PEFT adapter: give it as init_from.adapter" if adapter else ""
        raise WeightsError(
            f"weights: {file}: model_type: expected one of {list(readers)}, got {kind!r}{hint}"
        )
    return readers[kind](where, path, config)


def _config(cls, values: object, where: pathlib.Path):
    """Builds a part's config. Raises WeightsError naming the file."""
    if not isinstance(values, dict):
        raise WeightsError(f"weights: {where}: expected an object, got {values!r}")
    try:
        return cls.from_hf_config(values)
    except ValueError as error:
        raise WeightsError(f"weights: {where}: {error}") from error


def _language_model(config: dict, tensors: dict[str, Tensor], folder: pathlib.Path):
    """Returns the config, and the tensors without the redundant head of a tied embedding."""
    family = config.get("model_type", "").removeprefix(VIDEOLLAMA2)
    llm = _config(DecoderConfig, {**config, "model_type": family}, folder / "config.json")
    table = tensors.get("model.embed_tokens.weight")
    if table is not None and table.shape[0] != llm.vocab_size:
        raise WeightsError(
            f"weights: {folder}: config.json gives vocab_size {llm.vocab_size}, the table of "
            f"embeddings has {table.shape[0]} rows"
        )
    if llm.tie_word_embeddings:
        tensors = {k: t for k, t in tensors.items() if not k.startswith("lm_head.")}
    return llm, tensors


def _decoder(name: str, folder: pathlib.Path, config: dict) -> Source:
    tensors = read_folder(folder)
    if not any(k.startswith("model.") for k in tensors):  # saved from Qwen2Model and the like
        tensors = {k if k.startswith("lm_head.") else f"model.{k}": t for k, t in tensors.items()}
    llm, tensors = _language_model(config, tensors, folder)
    return Source(name, folder, frozenset({("language_model",)}), tensors, {"llm": llm})


def _siglip(name: str, folder: pathlib.Path, config: dict) -> Source:
    text_half = ("text_model.", "logit_scale", "logit_bias")  # of a whole SigLIP
    tensors = {
        f"{VISION}vision_model.{key.removeprefix('vision_model.')}": tensor
        for key, tensor in read_folder(folder).items()
        if not key.startswith(text_half)
    }
    vision = _siglip_config(config, folder / "config.json")
    return Source(name, folder, frozenset({("vision_tower",)}), tensors, {"vision": vision})


def _siglip_config(config: dict, where: pathlib.Path) -> SiglipConfig:
    return _config(SiglipConfig, config.get("vision_config", config), where)


def _mamba(name: str, folder: pathlib.Path, config: dict) -> Source:
    tensors = {
        MAMBA + key.removeprefix("backbone."): tensor
        for key, tensor in read_folder(folder).items()
        if not key.startswith("lm_head.")  # tied; the compressor has no head
    }
    groups = {("mamba_compressor", "mamba")}
    projection = folder / "memory_projection.safetensors"
    if projection.is_file():
        groups.add(("mamba_compressor", "memory_projection"))
        for key, tensor in read_safetensors(projection).items():
            tensors[MEMORY + key.removeprefix("memory_projection.")] = tensor
    compressor = _config(MambaConfig, config, folder / "config.json")
    return Source(name, folder, frozenset(groups), tensors, {"compressor": compressor})


def _beats(name: str, path: pathlib.Path) -> Source:
    """Opens the released BEATs file: {"cfg": ..., "model": ...}."""
    tensors, rest = _torch_part(path, "audio_tower")
    if "cfg" not in rest:
        raise WeightsError(f"weights: {path}: expected a BEATs file with 'cfg' and 'model'")
    config = _with_classifier(_config(BeatsConfig, rest["cfg"], path), tensors)
    return Source(name, path.parent, frozenset({("audio_tower",)}), tensors, {"audio": config})


def _torch_part(path: pathlib.Path, module: str) -> tuple[dict[str, Tensor], dict]:
    """Returns the tensors of a module's torch file with MultiMood's keys, and what else it holds.

    The file's keys may or may not begin with the module's name.
    """
    tensors, rest = read_torch(path)
    prefix = f"{module}."
    tensors = {
        f"model.{prefix}{key.removeprefix('model.').removeprefix(prefix)}": tensor
        for key, tensor in tensors.items()
    }
    return tensors, rest


def _with_classifier(config: BeatsConfig, tensors: dict[str, Tensor]) -> BeatsConfig:
    """Takes the number of classes from the classifier's weight, 0 if there is none.

    The config of a tower that was not fine-tuned may give a number although it has no classifier.
    """
    weight = tensors.get(f"{AUDIO}predictor.weight")
    return dataclasses.replace(config, predictor_class=weight.shape[0] if weight else 0)


def _videollama2(name: str, folder: pathlib.Path, config: dict, module: str | None) -> Source:
    """Opens VideoLLaMA2.1-7B(-AV), or MultiMood, which adds a compressor.

    It looks only for the configs of parts that `module` (None: all) needs.
    """
    llm, tensors = _language_model(config, read_folder(folder), folder)
    groups, configs, fields = {("language_model",)}, {"llm": llm}, {}
    cfg = None  # BEATs' config, inside audio_tower.bin
    for part in ("audio_tower", "mm_projector", "mm_projector_a"):
        file = folder / f"{part}.bin"
        if file.is_file():
            found, rest = _torch_part(file, part)
            tensors = {**found, **tensors}  # the folder's main files take precedence
            if part == "audio_tower":
                cfg = rest.get("cfg")
    if "mm_vision_tower" in config and module in (None, "vision_tower"):
        groups |= {("vision_tower",), ("mm_projector",)}
        configs["vision"] = _vision_config(folder, config)
        lacking = [k for k in ("mm_projector_type", "mm_vision_select_layer") if k not in config]
        if lacking:
            raise WeightsError(f"weights: {folder}/config.json lacks {lacking}")
        fields["connector_type"] = config["mm_projector_type"]
        fields["vision_select_layer"] = config["mm_vision_select_layer"]
        # Not in released configs: their code always builds 4 blocks.
        fields["connector_depth"] = config.get("mm_projector_depth", 4)
    if "mm_audio_tower" in config and module in (None, "audio_tower"):
        groups |= {("audio_tower",), ("mm_projector_a",)}
        audio = _side_config(folder, config, "audio_config", BeatsConfig)
        if audio is None and cfg is None:
            raise _no_config(folder, "audio_config", "BEATs' cfg")
        audio = audio or _config(BeatsConfig, cfg, folder / "audio_tower.bin")
        configs["audio"] = _with_classifier(audio, tensors)
        fields["audio_projector_type"] = config.get("mm_projector_a_type", "linear")
    has_compressor = any(key.startswith("model.mamba_compressor.") for key in tensors)
    if has_compressor and module in (None, "mamba_compressor"):
        groups |= {("mamba_compressor", "mamba"), ("mamba_compressor", "memory_projection")}
        mamba = _side_config(folder, config, "compressor_config", MambaConfig)
        if mamba is None:
            raise _no_config(folder, "compressor_config", "a transformers MambaConfig")
        table = tensors.get(f"{MAMBA}embeddings.weight")  # resized to the tokenizer
        rows = mamba.vocab_size if table is None else table.shape[0]
        configs["compressor"] = dataclasses.replace(mamba, vocab_size=rows)
    return Source(name, folder, frozenset(groups), tensors, configs, fields)


def _mm_jax(name: str, folder: pathlib.Path, config: dict) -> Source:
    """Opens a folder of `export --layout transformers`, also one that transformers saved again."""
    file = folder / "config.json"
    llm, tensors = _language_model(config.get("text_config", {}), read_folder(folder), folder)
    parts = {
        "vision": (SiglipConfig, ("vision_tower", "mm_projector")),
        "audio": (BeatsConfig, ("audio_tower", "mm_projector_a")),
        "compressor": (MambaConfig, ("mamba_compressor",)),
    }
    modules, configs, fields = {"language_model"}, {"llm": llm}, {}
    for part, (cls, own) in parts.items():
        values = config.get(f"{part}_config")
        if values is not None:
            modules |= set(own)
            configs[part] = _config(cls, values, file)
    if "audio" in configs:
        configs["audio"] = _with_classifier(configs["audio"], tensors)
    for field in FIELDS:
        if field not in config:
            raise WeightsError(f"weights: {file} lacks {field}")
        fields[field] = config[field]
    groups = frozenset(g for g in GROUPS if g[0] in modules)
    return Source(name, folder, groups, tensors, configs, fields)


def _side_config(folder: pathlib.Path, config: dict, name: str, cls):
    """Returns the config of a part, from config.json or from a file next to it, or None."""
    file = folder / f"{name}.json"
    if name in config:
        return _config(cls, config[name], folder / "config.json")
    return _config(cls, read_json(file), file) if file.is_file() else None


def _no_config(folder: pathlib.Path, name: str, what: str) -> WeightsError:
    return WeightsError(
        f"weights: {folder} does not say the sizes of a part: put {what} into its config.json as "
        f"{name}, or next to it as {name}.json"
    )


def _vision_config(folder: pathlib.Path, config: dict) -> SiglipConfig:
    found = _side_config(folder, config, "vision_config", SiglipConfig)
    if found is not None:
        return found
    tower = config["mm_vision_tower"]
    try:
        file = folder / tower / "config.json"
        if not file.is_file():
            file = resolve(tower, ("config.json",)) / "config.json"  # without the weights
        return _siglip_config(read_json(file), file)
    except (FileNotFoundError, WeightsError) as error:
        raise WeightsError(
            f"{_no_config(folder, 'vision_config', 'a SiglipVisionConfig')} (its mm_vision_tower, "
            f"{tower}, was not found: {error})"
        ) from error


def join(sources: list[Source]) -> Source:
    """Joins several sources; if two have the same group, the first one takes precedence."""
    groups, tensors, configs, fields = frozenset(), {}, {}, {}
    for source in sources:
        new = {k: t for k, t in source.tensors.items() if group_of(k) not in groups}
        tensors = {**new, **tensors}
        configs = {**source.configs, **configs}
        fields = {**source.fields, **fields}
        groups |= source.groups
    name = " + ".join(s.name for s in sources)
    with_words = [s for s in sources if ("language_model",) in s.groups] or sources
    return Source(name, with_words[0].folder, groups, tensors, configs, fields)


@dataclasses.dataclass(frozen=True)
class Adapter:
    """Holds a LoRA adapter in PEFT's layout; `tensors` have PEFT's keys."""

    name: str
    rank: int
    alpha: float
    rslora: bool
    targets: tuple[str, ...]
    tensors: dict[str, Tensor]

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


PEFT_PREFIX = "base_model.model."
# Values that fields of adapter_config.json must have, if given: anything else is not W + scale B A.
PLAIN_LORA = {
    "peft_type": "LORA",
    "bias": "none",
    "lora_bias": False,
    "use_dora": False,
    "use_qalora": False,
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "alora_invocation_tokens": None,
    "layer_replication": None,
    "trainable_token_indices": None,
    "target_parameters": None,
}
# Other initialisations (PiSSA, OLoRA, ...) change the base weights too.
INITIALISATIONS = (True, False, "gaussian", "orthogonal")


def open_adapter(where: str) -> Adapter:
    """Reads adapter_config.json and the headers of adapter_model.safetensors (or .bin). Raises
    WeightsError for anything but plain LoRA."""
    folder = resolve(where)
    file = folder / "adapter_config.json"
    if not file.is_file():
        raise WeightsError(f"weights: {folder} has no adapter_config.json; expected a PEFT folder")
    c = read_json(file)
    lacking = [k for k in ("r", "lora_alpha", "target_modules") if k not in c]
    if lacking:
        raise WeightsError(f"weights: {file} lacks {lacking}")
    # None, False and empty mean the same: not used.
    wrong = {k: c[k] for k, v in PLAIN_LORA.items() if k in c and c[k] != v and (c[k] or v)}
    if wrong:
        expected = {k: PLAIN_LORA[k] for k in wrong}
        raise WeightsError(f"weights: {file}: expected {expected}, got {wrong}")
    if c.get("init_lora_weights", True) not in INITIALISATIONS:
        raise WeightsError(
            f"weights: {file}: init_lora_weights: expected one of {INITIALISATIONS}, got "
            f"{c['init_lora_weights']!r}, which changes the base weights too"
        )
    targets = c["target_modules"]
    return Adapter(
        where,
        c["r"],
        float(c["lora_alpha"]),
        bool(c.get("use_rslora")),
        (targets,) if isinstance(targets, str) else tuple(sorted(targets)),
        read_folder(folder, "adapter_model", "adapter_model"),
    )


def merge_adapter(tensors: dict[str, Tensor], adapter: Adapter) -> dict[str, Tensor]:
    """Adds an adapter's updates to the weights as they are read.

    Raises WeightsError once, with everything that does not fit.
    """
    out, problems = dict(tensors), []
    for key in sorted(adapter.tensors):
        if not key.endswith((".lora_A.weight", ".lora_B.weight")):
            problems.append(f"{key} is not a LoRA tensor")
            continue
        a_key = key.replace(".lora_B.", ".lora_A.")
        b_key = key.replace(".lora_A.", ".lora_B.")
        base = a_key.removeprefix(PEFT_PREFIX).replace(".lora_A.", ".")
        lacking = [k for k in (a_key, b_key) if k not in adapter.tensors]
        lacking += [] if base in tensors else [base]
        if lacking:
            problems.append(f"{key} needs {', '.join(lacking)}")
            continue
        a, b, weight = adapter.tensors[a_key], adapter.tensors[b_key], tensors[base]
        expected = ((adapter.rank, weight.shape[1]), (weight.shape[0], adapter.rank))
        if (a.shape, b.shape) != expected:
            problems.append(f"{key}: expected shapes {expected}, got {(a.shape, b.shape)}")
            continue
        out[base] = merged(weight, a, b, adapter.scale)
    if problems:
        shown = "; ".join(problems[:20])
        raise WeightsError(f"weights: adapter {adapter.name}: {len(problems)} problems: {shown}")
    if out == tensors:
        raise WeightsError(f"weights: adapter {adapter.name} has no LoRA tensors")
    return out
