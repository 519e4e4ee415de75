"""Run configurations: `configs/*.py` files, command-line overrides, validation, JSON.

A config file defines `get_config(arg: str = "")` and returns a `ConfigDict`; `configs/base.py`
holds every field with its default and a comment, the others only override it. On the command line
`--config=configs/x.py[:arg]` and `--config.a.b=value`.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import json
import pathlib
import sys
from collections.abc import Sequence

from ml_collections import ConfigDict

from mm_jax.config.errors import ConfigError
from mm_jax.config.files import read_json, write_whole


def flatten(config: ConfigDict, prefix: str = "") -> dict[str, object]:
    """Dotted key -> value of every leaf."""
    out = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            out.update(flatten(value, f"{prefix}{key}."))
        else:
            out[prefix + key] = value
    return out


def load_config(spec: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """The locked config of `path.py[:arg]` with `--config.key=value` strings applied."""
    path, _, arg = spec.partition(":")
    file = pathlib.Path(path)
    if not file.is_file():
        raise ConfigError(f"--config: {path} does not exist")
    for folder in (file.resolve().parent.parent, pathlib.Path(__file__).resolve().parents[1]):
        if str(folder) not in sys.path:  # configs import each other as `from configs import base`
            sys.path.append(str(folder))
    module_spec = importlib.util.spec_from_file_location("mm_jax_run_config", file)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"--config: {path} defines no get_config(arg)")
    config = module.get_config(arg)
    config.lock()
    for override in overrides:
        apply_override(config, override)
    return config


def apply_override(config: ConfigDict, override: str) -> None:
    """Applies "key.path=value"; the value must have the default's type."""
    key, separator, text = override.partition("=")
    if not separator:
        raise ConfigError(f"--config.{key}: expected --config.{key}=VALUE")
    leaves = flatten(config)
    if key not in leaves:
        close = difflib.get_close_matches(key, leaves, n=1, cutoff=0.4)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(f"--config.{key}: no such field{hint}")
    default = leaves[key]
    *parents, last = key.split(".")
    node = config
    for parent in parents:
        node = node[parent]
    node[last] = parse_value(f"--config.{key}", text, default)


def parse_value(name: str, text: str, default: object) -> object:
    """`text` as a value of the default's type. Raises ConfigError."""
    if isinstance(default, str):
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        lowered = {"true": True, "false": False}.get(text.lower())
        value = text if lowered is None else lowered
        if isinstance(default, (tuple, list)):
            value = tuple(part.strip() for part in text.split(",") if part.strip())
    if isinstance(default, bool):
        ok = isinstance(value, bool)
    elif isinstance(default, float):
        ok = isinstance(value, (int, float)) and not isinstance(value, bool)
        value = float(value) if ok else value
    elif isinstance(default, int):
        ok = isinstance(value, int) and not isinstance(value, bool)
    elif isinstance(default, (tuple, list)):
        value = value if isinstance(value, (tuple, list)) else (value,)
        kind = type(default[0]) if len(default) else None
        value = tuple(float(v) if kind is float and isinstance(v, int) else v for v in value)
        ok = kind is None or all(isinstance(v, kind) for v in value)
    else:
        ok = True
    if not ok:
        expected = type(default).__name__
        raise ConfigError(f"{name}: expected {expected} (default {default!r}), got {text!r}")
    return value


def save_config(config: ConfigDict, path: pathlib.Path) -> None:
    """Writes the resolved config as JSON."""
    write_whole(path, json.dumps(config.to_dict(), indent=1))


def read_config(path: pathlib.Path) -> ConfigDict:
    """A config written by `save_config`; lists come back as tuples."""
    if not path.is_file():
        raise ConfigError(f"no config at {path}; expected a run folder written by `train`")

    def tuples(value):
        if isinstance(value, dict):
            return {k: tuples(v) for k, v in value.items()}
        return tuple(tuples(v) for v in value) if isinstance(value, list) else value

    values = read_json(path)
    if not isinstance(values, dict) or "stages" not in values:
        raise ConfigError(f"{path} is no config of a run; expected a run folder written by `train`")
    return ConfigDict(tuples(values))
