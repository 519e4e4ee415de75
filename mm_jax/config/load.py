"""Loads configs from `configs/*.py`, command-line overrides, and the JSON of a run folder.

A config file defines `get_config(arg: str = "")`, which returns a ConfigDict built from
`defaults()`. On the command line: `--config=configs/x.py[:arg]` and `--config.a.b=value`. `resolve`
turns a ConfigDict into the frozen `Config` that code reads.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import pathlib
import sys
from collections.abc import Sequence

from ml_collections import ConfigDict

from mm_jax.config.errors import ConfigError
from mm_jax.config.files import read_json, write_whole
from mm_jax.config.model import RopeScaling
from mm_jax.config.schema import Config
from mm_jax.config.section import Section, nearest

# Fields that run folders of mm_jax 0.1 lack; their defaults are what those runs did.
ADDED = (
    "data.history_tokens",
    "data.shapes",
    "model.connector_depth",
    "model.llm.family",
    "model.llm.head_dim",
    *(f"model.llm.rope_scaling.{name}" for name in RopeScaling.model_fields),
    "reward.limits.breaker_waits",
    *(
        f"reward.{judge}.{name}"
        for judge in ("judge", "second_judge")
        for name in ("history_turns", "max_units", "max_characters", "temperature")
    ),
)


def defaults(section: type[Section] = Config) -> ConfigDict:
    """Returns a section's defaults, for a config file to change."""
    return ConfigDict(section().model_dump())


def resolve(config: ConfigDict) -> Config:
    """Checks a config and freezes it. Raises ConfigError."""
    return Config(**tuples(config.to_dict()))


def tuples(value):
    """Returns JSON values with tuples in place of lists."""
    if isinstance(value, dict):
        return {k: tuples(v) for k, v in value.items()}
    return tuple(map(tuples, value)) if isinstance(value, (list, tuple)) else value


def flatten(config: dict, prefix: str = "") -> dict[str, object]:
    """Flattens a config: maps the dotted key of every leaf to its value."""
    out = {}
    for key, value in config.items():
        if isinstance(value, (dict, ConfigDict)):
            out.update(flatten(value, f"{prefix}{key}."))
        else:
            out[prefix + key] = value
    return out


def load_config(spec: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Loads `path.py[:arg]` and applies overrides "key.path=value". Raises ConfigError."""
    path, _, arg = spec.partition(":")
    config = module_of("--config", path, "get_config").get_config(arg)
    config.lock()
    for override in overrides:
        apply_override(config, override)
    return config


def module_of(option: str, path: str, function: str):
    """Runs a Python file that defines `function`. Raises ConfigError."""
    file = pathlib.Path(path)
    if not file.is_file():
        raise ConfigError(f"{option}: {path} does not exist")
    for folder in (file.resolve().parent.parent, pathlib.Path(__file__).resolve().parents[2]):
        if str(folder) not in sys.path:  # configs import each other as `from configs import base`
            sys.path.append(str(folder))
    module_spec = importlib.util.spec_from_file_location("mm_jax_run_config", file)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, function):
        raise ConfigError(f"{option}: {path} defines no {function}(arg)")
    return module


def apply_override(config: ConfigDict, override: str) -> None:
    """Applies "key.path=value"; the value must have the type of the current one."""
    key, separator, text = override.partition("=")
    if not separator:
        raise ConfigError(f"--config.{key}: expected --config.{key}=VALUE")
    leaves = flatten(config)
    if key not in leaves:
        raise ConfigError(f"--config.{key}: no such field{nearest(key, leaves)}")
    *parents, last = key.split(".")
    node = config
    for parent in parents:
        node = node[parent]
    node[last] = parse_value(f"--config.{key}", text, leaves[key])


def parse_value(name: str, text: str, before: object) -> object:
    """Parses `text` as a value of the type of `before`. Raises ConfigError."""
    if isinstance(before, str):
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = {"true": True, "false": False}.get(text.lower(), text)
    if isinstance(before, tuple):
        if isinstance(value, str):
            value = tuple(part.strip() for part in text.split(",") if part.strip())
        value = tuple(value) if isinstance(value, (tuple, list)) else (value,)
        if before and isinstance(before[0], float):
            value = tuple(float(v) if type(v) is int else v for v in value)
    elif isinstance(before, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(before):
        expected = type(before).__name__
        raise ConfigError(f"{name}: expected {expected} (now {before!r}), got {text!r}")
    return value


def save_config(config: Config, path: pathlib.Path) -> None:
    """Writes the resolved config as JSON."""
    write_whole(path, json.dumps(config.model_dump(), indent=1))


def read_config(path: pathlib.Path) -> Config:
    """Reads the config of a run folder. Raises ConfigError."""
    if not path.is_file():
        raise ConfigError(f"no config at {path}; expected a run folder written by `train`")
    values = read_json(path)
    if not isinstance(values, dict) or "stages" not in values:
        raise ConfigError(
            f"{path} is not the config of a run; expected a run folder written by `train`"
        )
    data = values.get("data", {})
    if "history_text" in data:  # the earlier form of `history`
        data["history"] = "text" if data.pop("history_text") else "memory"
    for name in ("token", "fbank", "history", "memory"):  # before `shapes`
        data.pop(f"{name}_bucket", None)
    reward = values.get("reward", {})
    if "learned" in reward:  # the earlier name of `reward_model`
        reward["reward_model"] = reward.pop("learned")
    other = "; a run folder of another version of mm_jax? Use that version, or train again"
    try:
        config = Config(**tuples(values))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}{other}") from error
    missing = sorted(set(flatten(config.model_dump())) - {*flatten(values), *ADDED})
    if missing:
        raise ConfigError(f"{path}: no {', '.join(missing)}{other}")
    return config


def overridden(config: Config, overrides: Sequence[str]) -> Config:
    """Returns a resolved config with overrides "key.path=value" applied. Raises ConfigError."""
    changed = ConfigDict(config.model_dump())
    for override in overrides:
        apply_override(changed, override)
    return resolve(changed)
