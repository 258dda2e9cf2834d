"""Lookup of named choices and optional packages, with errors that list the options."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import TypeVar

from llava.errors import ConfigError, MissingDependency

T = TypeVar("T")


def lookup(table: Mapping[str, T], name: str, kind: str) -> T:
    """Return `table[name]`.

    Raises:
        ConfigError: `name` is unknown; the message lists the known names.
    """
    try:
        return table[name]
    except KeyError:
        known = ", ".join(sorted(table))
        raise ConfigError(f"unknown {kind} {name!r}; known: {known}") from None


def require(module: str, extra: str) -> ModuleType:
    """Import an optional package.

    Raises:
        MissingDependency: the package is not installed; the message names the extra that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependency(
            f"{module} is required but cannot be imported ({error}); install it with: pip install 'llava[{extra}]'"
        ) from error
