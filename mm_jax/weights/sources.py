"""Released weights, whatever their layout, as tensors and configs of MultiMood's parts.

Every layout is renamed to the released MultiMood's keys (`keymap.MULTIMOOD`), so that sources can
be joined and one table loads them all. Sizes are read from the source's own configs.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import re

from mm_jax.models.beats import BeatsConfig
from mm_jax.models.mamba import MambaConfig
from mm_jax.models.qwen2 import Qwen2Config
from mm_jax.models.siglip import SiglipConfig
from mm_jax.weights.tensors import (
    Tensor,
    WeightsError,
    merged,
    read_folder,
    read_json,
    read_safetensors,
    read_torch,
)

VISION = "model.vision_tower.vision_tower."
AUDIO = "model.audio_tower."
MAMBA = "model.mamba_compressor.mamba."
MEMORY = "model.mamba_compressor.memory_projection."
# What is loaded whole or not at all -> how its keys begin.
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
MODEL_TYPES = {
    "qwen2": "qwen2",
    "siglip": "siglip",
    "siglip_vision_model": "siglip",
    "mamba": "mamba",
    "videollama2_qwen2": "videollama2",
}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?")
HUB_FILES = ("*.json", "*.safetensors", "*.bin", "*.pt", "merges.txt", "*.model")


@dataclasses.dataclass(frozen=True)
class Source:
    """One place of released weights.

    `configs` and `fields` are what it says of the model: part of config.model (llm, vision, audio,
    compressor) -> its config, and further fields of config.model. `groups` (of GROUPS) are what it
    must have whole; `tensors` have MultiMood's keys; `folder` may hold a tokenizer.
    """

    name: str
    folder: pathlib.Path
    groups: frozenset
    tensors: dict[str, Tensor]
    configs: dict
    fields: dict

    def only(self, module: str) -> Source:
        """The part of it that belongs to one module of the model. Raises WeightsError."""
        groups = frozenset(g for g in self.groups if g[0] == module)
        if not groups:
            has = sorted({g[0] for g in self.groups})
            raise WeightsError(f"weights: {self.name} has no {module}, only {has}")
        part = {
            "language_model": "llm",
            "vision_tower": "vision",
            "audio_tower": "audio",
            "mamba_compressor": "compressor",
        }[module]
        return dataclasses.replace(
            self,
            groups=groups,
            tensors={
                k: t
                for k, t in self.tensors.items()
                if group_of(k) in groups or (group_of(k) is None and groups == self.groups)
            },
            configs={k: v for k, v in self.configs.items() if k == part},
            fields={},
        )

    @property
    def has_tokenizer(self) -> bool:
        names = ("tokenizer.json", "tokenizer_config.json")
        return self.folder.is_dir() and any((self.folder / n).is_file() for n in names)


def group_of(key: str) -> tuple[str, ...] | None:
    return next((g for g, starts in GROUPS.items() if key.startswith(starts)), None)


def resolve(where: str) -> pathlib.Path:
    """A local path as it is; a hub id (name/name, or name/name@revision) downloaded."""
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
                repository, revision=revision or None, allow_patterns=list(HUB_FILES)
            )
        )
    except Exception as error:  # offline, unknown, private: the hub's own classes change often
        reason = (str(error).strip().splitlines() or [""])[0]
        raise WeightsError(
            f"weights: {where} is no local path, and the Hugging Face hub did not give it: "
            f"{type(error).__name__}: {reason}"
        ) from error


def open_source(where: str, module: str | None = None) -> Source:
    """Opens a folder, file or hub id (only `module`'s part of it, where given); only headers are
    read. Raises WeightsError or FileNotFoundError."""
    source = _open(where, resolve(where), module)
    tensors = {k: t for k, t in source.tensors.items() if not BUFFERS.search(k)}
    source = dataclasses.replace(source, tensors=tensors)
    return source if module is None else source.only(module)


def _open(where: str, path: pathlib.Path, module: str | None) -> Source:
    if path.is_file():
        return _beats(where, path)
    config_file = path / "config.json"
    if not config_file.is_file():
        files = [p for p in path.glob("*.pt") if p.is_file()]
        if len(files) == 1:
            return _beats(where, files[0])
        raise WeightsError(f"weights: {path} has no config.json")
    config = read_json(config_file)
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        hint = ""
        if (path / "adapter_config.json").is_file():
            hint = "; it is a PEFT adapter: give it as init_from.adapter"
        raise WeightsError(
            f"weights: {config_file}: model_type: expected one of {sorted(MODEL_TYPES)}, got "
            f"{kind!r}{hint}"
        )
    if MODEL_TYPES[kind] == "videollama2":
        return _videollama2(where, path, config, module)
    read = {"qwen2": _qwen2, "siglip": _siglip, "mamba": _mamba}[MODEL_TYPES[kind]]
    return read(where, path, config)


def _config(cls, values: object, where: pathlib.Path):
    """A part's config. Raises WeightsError naming the file."""
    if not isinstance(values, dict):
        raise WeightsError(f"weights: {where}: expected an object, got {values!r}")
    try:
        return cls.from_hf_config(values)
    except ValueError as error:
        raise WeightsError(f"weights: {where}: {error}") from error


def _language_model(config: dict, tensors: dict[str, Tensor], where: pathlib.Path):
    """(config, tensors without the copy of a tied embedding that some folders store)."""
    llm = _config(Qwen2Config, config, where / "config.json")
    table = tensors.get("model.embed_tokens.weight")
    if table is not None and table.shape[0] != llm.vocab_size:
        raise WeightsError(
            f"weights: {where}: config.json gives vocab_size {llm.vocab_size}, the table of "
            f"embeddings has {table.shape[0]} rows"
        )
    if llm.tie_word_embeddings:
        tensors = {k: t for k, t in tensors.items() if not k.startswith("lm_head.")}
    return llm, tensors


def _qwen2(name: str, folder: pathlib.Path, config: dict) -> Source:
    tensors = read_folder(folder)
    if not any(k.startswith("model.") for k in tensors):  # saved from Qwen2Model
        tensors = {k if k.startswith("lm_head.") else f"model.{k}": t for k, t in tensors.items()}
    llm, tensors = _language_model(config, tensors, folder)
    return Source(name, folder, frozenset({("language_model",)}), tensors, {"llm": llm}, {})


def _siglip(name: str, folder: pathlib.Path, config: dict) -> Source:
    tensors = {}
    for key, tensor in read_folder(folder).items():
        if key.startswith("text_model.") or key in ("logit_scale", "logit_bias"):
            continue  # the other half of a whole SigLIP
        key = key if key.startswith("vision_model.") else f"vision_model.{key}"
        tensors[VISION + key] = tensor
    vision = _siglip_config(config, folder / "config.json")
    return Source(name, folder, frozenset({("vision_tower",)}), tensors, {"vision": vision}, {})


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
    return Source(name, folder, frozenset(groups), tensors, {"compressor": compressor}, {})


def _beats(name: str, path: pathlib.Path) -> Source:
    """The released BEATs file: {"cfg": ..., "model": ...}."""
    tensors, config = _audio_file(path)
    if config is None:
        raise WeightsError(f"weights: {path}: expected a BEATs file with 'cfg' and 'model'")
    groups = frozenset({("audio_tower",)})
    return Source(name, path.parent, groups, tensors, {"audio": config}, {})


def _audio_file(path: pathlib.Path) -> tuple[dict[str, Tensor], BeatsConfig | None]:
    """Tensors of a BEATs file with MultiMood's keys, and its config where it holds one."""
    tensors, rest = read_torch(path)
    out = {}
    for key, tensor in tensors.items():
        key = key.removeprefix("model.").removeprefix("audio_tower.")
        out[AUDIO + key] = tensor
    config = None
    if "cfg" in rest:
        config = _with_classifier(_config(BeatsConfig, rest["cfg"], path), out)
    return out, config


def _with_classifier(config: BeatsConfig, tensors: dict[str, Tensor]) -> BeatsConfig:
    """A tower that was not fine-tuned may give a number of classes, but has no classifier."""
    weight = tensors.get(f"{AUDIO}predictor.weight")
    return dataclasses.replace(config, predictor_class=weight.shape[0] if weight else 0)


def _videollama2(name: str, folder: pathlib.Path, config: dict, module: str | None) -> Source:
    """VideoLLaMA2.1-7B(-AV), and MultiMood, which adds a compressor. The configs of parts are
    looked for where `module` (None: all) needs them."""

    def needed(part: str) -> bool:
        return module in (None, part)

    llm, tensors = _language_model(config, read_folder(folder), folder)
    groups, configs, fields = {("language_model",)}, {"llm": llm}, {}
    beats = None
    beside: dict[str, Tensor] = {}  # torch files that hold what the folder's main files may lack
    for file in ("audio_tower.bin", "mm_projector.bin", "mm_projector_a.bin"):
        if (folder / file).is_file():
            if file == "audio_tower.bin":
                found, beats = _audio_file(folder / file)
            else:
                prefix = f"model.{file.removesuffix('.bin')}."
                found = {
                    k if k.startswith(prefix) else prefix + k.removeprefix(prefix[6:]): t
                    for k, t in read_torch(folder / file)[0].items()
                }
            beside.update(found)
    tensors = {**beside, **tensors}
    if "mm_vision_tower" in config and needed("vision_tower"):
        groups |= {("vision_tower",), ("mm_projector",)}
        configs["vision"] = _vision_config(folder, config)
        lacking = [k for k in ("mm_projector_type", "mm_vision_select_layer") if k not in config]
        if lacking:
            raise WeightsError(f"weights: {folder}/config.json lacks {lacking}")
        fields["connector_type"] = config["mm_projector_type"]
        fields["vision_select_layer"] = config["mm_vision_select_layer"]
    if "mm_audio_tower" in config and needed("audio_tower"):
        groups |= {("audio_tower",), ("mm_projector_a",)}
        audio = _side_config(folder, config, "audio_config", BeatsConfig) or beats
        if audio is None:
            raise _no_config(folder, "audio_config", "BEATs' cfg")
        configs["audio"] = _with_classifier(audio, tensors)
        fields["audio_projector_type"] = config.get("mm_projector_a_type", "linear")
    has_compressor = any(key.startswith("model.mamba_compressor.") for key in tensors)
    if has_compressor and needed("mamba_compressor"):
        groups |= {("mamba_compressor", "mamba"), ("mamba_compressor", "memory_projection")}
        mamba = _side_config(folder, config, "compressor_config", MambaConfig)
        if mamba is None:
            raise _no_config(folder, "compressor_config", "a transformers MambaConfig")
        table = tensors.get(f"{MAMBA}embeddings.weight")  # resized to the tokenizer
        rows = mamba.vocab_size if table is None else table.shape[0]
        configs["compressor"] = dataclasses.replace(mamba, vocab_size=rows)
    return Source(name, folder, frozenset(groups), tensors, configs, fields)


def _side_config(folder: pathlib.Path, config: dict, name: str, cls):
    """The config of a part, inside config.json or in a file of its own beside it."""
    beside = folder / f"{name}.json"
    if name in config:
        return _config(cls, config[name], folder / "config.json")
    return _config(cls, read_json(beside), beside) if beside.is_file() else None


def _no_config(folder: pathlib.Path, name: str, what: str) -> WeightsError:
    return WeightsError(
        f"weights: {folder} does not say the sizes of a part: put {what} into its config.json as "
        f"{name}, or beside it as {name}.json"
    )


def _vision_config(folder: pathlib.Path, config: dict) -> SiglipConfig:
    found = _side_config(folder, config, "vision_config", SiglipConfig)
    if found is not None:
        return found
    tower = config["mm_vision_tower"]
    near = folder / tower
    try:
        place = near if (near / "config.json").is_file() else resolve_config(tower)
        return _siglip_config(read_json(place / "config.json"), place / "config.json")
    except (FileNotFoundError, WeightsError) as error:
        raise WeightsError(
            f"{_no_config(folder, 'vision_config', 'a SiglipVisionConfig')} (its mm_vision_tower, "
            f"{tower}, was not found: {error})"
        ) from error


def resolve_config(where: str) -> pathlib.Path:
    """The folder with the config.json of a local folder or hub id; weights are not downloaded."""
    path = pathlib.Path(where).expanduser()
    if (path / "config.json").is_file():
        return path
    if not HUB_ID.fullmatch(where):
        raise FileNotFoundError(f"weights: {where} has no config.json")
    import huggingface_hub

    try:
        return pathlib.Path(huggingface_hub.hf_hub_download(where, "config.json")).parent
    except Exception as error:
        raise WeightsError(f"{type(error).__name__}: {str(error).strip()[:200]}") from error


def join(sources: list[Source]) -> Source:
    """Several sources as one; where two have the same group, the first one's counts."""
    groups, tensors, configs, fields = frozenset(), {}, {}, {}
    for source in sources:
        new = source.groups - groups
        known = {k: t for k, t in source.tensors.items() if group_of(k) not in groups}
        tensors.update({k: t for k, t in known.items() if k not in tensors})
        configs = {**source.configs, **configs}
        fields = {**source.fields, **fields}
        groups |= new
    name = " + ".join(s.name for s in sources)
    with_words = [s for s in sources if ("language_model",) in s.groups] or sources
    return Source(name, with_words[0].folder, groups, tensors, configs, fields)


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A LoRA adapter in PEFT's layout; `tensors` have PEFT's keys."""

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
# Fields of adapter_config.json that must be so, where they are there at all: W + scale B A alone.
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
PLAIN_STARTS = (True, False, "gaussian", "orthogonal")


def open_adapter(where: str) -> Adapter:
    """Reads adapter_config.json and the headers of adapter_model.safetensors (or .bin). Raises
    WeightsError for what plain LoRA is not."""
    folder = resolve(where)
    if not (folder / "adapter_config.json").is_file():
        raise WeightsError(f"weights: {folder} has no adapter_config.json; expected a PEFT folder")
    file = folder / "adapter_config.json"
    c = read_json(file)
    lacking = [k for k in ("r", "lora_alpha", "target_modules") if k not in c]
    if lacking:
        raise WeightsError(f"weights: {file} lacks {lacking}")
    wrong = {k: c[k] for k, v in PLAIN_LORA.items() if k in c and c[k] != v and (c[k] or v)}
    if wrong:
        expected = {k: PLAIN_LORA[k] for k in wrong}
        raise WeightsError(f"weights: {file}: expected {expected}, got {wrong}")
    if c.get("init_lora_weights", True) not in PLAIN_STARTS:
        raise WeightsError(
            f"weights: {file}: init_lora_weights: expected one of {PLAIN_STARTS}, got "
            f"{c['init_lora_weights']!r}, which changes the base weights too"
        )
    file = folder / "adapter_model.safetensors"
    if file.is_file():
        tensors = read_safetensors(file)
    else:
        file = folder / "adapter_model.bin"
        if not file.is_file():
            raise FileNotFoundError(f"weights: no adapter_model.safetensors or .bin in {folder}")
        tensors = read_torch(file)[0]
    targets = c["target_modules"]
    return Adapter(
        where,
        c["r"],
        float(c["lora_alpha"]),
        bool(c.get("use_rslora")),
        (targets,) if isinstance(targets, str) else tuple(sorted(targets)),
        tensors,
    )


def merge_adapter(tensors: dict[str, Tensor], adapter: Adapter) -> dict[str, Tensor]:
    """The weights with an adapter's updates added, tensor by tensor as they are read. Raises
    WeightsError once, with all that does not fit."""
    out, problems = dict(tensors), []
    for key in sorted(adapter.tensors):
        a_key = key.replace(".lora_B.", ".lora_A.")
        b_key = key.replace(".lora_A.", ".lora_B.")
        if not key.endswith((".lora_A.weight", ".lora_B.weight")):
            problems.append(f"{key} is no LoRA tensor")
            continue
        base = key.removeprefix(PEFT_PREFIX).replace(".lora_A.", ".").replace(".lora_B.", ".")
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
