"""What is wrong with a config or an argument, said in one line."""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Sequence


class UserError(Exception):
    """What a command reports in one line, without a traceback."""


class ConfigError(UserError, ValueError):
    """An unknown key, a wrong type or an impossible combination, refused before anything runs."""


def one_of(name: str, value: object, allowed: Sequence[object]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name}: expected one of {list(allowed)}, got {value!r}")


def check_url(name: str, url: str) -> None:
    try:
        parts = urllib.parse.urlsplit(url)
        fine = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # of the port
        fine = False
    if not fine or re.search(r"\s", url):
        raise ConfigError(f"{name}: expected http://HOST:PORT or https://..., got {url!r}")


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
