"""Errors that name in one line what is wrong with a config or an argument."""

from __future__ import annotations

import contextlib
import re
import urllib.parse
from collections.abc import Iterator, Sequence


class UserError(Exception):
    """An error that commands report in one line, without a traceback."""


class ConfigError(UserError, ValueError):
    """Reports an unknown key, a wrong type or an impossible combination before anything runs."""


def one_of(name: str, value: object, allowed: Sequence[object]) -> None:
    """Raises ConfigError unless `value` is allowed."""
    if value not in allowed:
        raise ConfigError(f"{name}: expected one of {list(allowed)}, got {value!r}")


def check_url(name: str, url: str) -> None:
    """Raises ConfigError unless `url` is an http or https address."""
    try:
        parts = urllib.parse.urlsplit(url)
        fine = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # the port is no number, or out of range
        fine = False
    if not fine or re.search(r"\s", url):
        raise ConfigError(f"{name}: expected http://HOST:PORT or https://..., got {url!r}")


def require(condition: bool, message: str) -> None:
    """Raises ConfigError unless the condition holds."""
    if not condition:
        raise ConfigError(message)


@contextlib.contextmanager
def prefixed(key: str, mark: str = ".") -> Iterator[None]:
    """Puts `key` and `mark` before every line of a ConfigError from inside."""
    try:
        yield
    except ConfigError as error:
        lines = "\n".join(f"{key}{mark}{line}" for line in str(error).splitlines())
        raise ConfigError(lines) from None
