"""YAML text as plain values, with bounds on what aliases stand for."""

from __future__ import annotations

from typing import Any

import yaml

MAX_VALUES = 1_000_000
"""Values that a text may stand for, where an alias counts as what it repeats: nine lines can stand for billions."""


def parse_yaml(text: str, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """Return the content of YAML text.

    Args:
        text: the text.
        loader: safe loader.

    Raises:
        yaml.MarkedYAMLError: the text is not YAML, is nested too deeply, has a value that its tag does not allow, or
            stands for more than `MAX_VALUES` values.
    """
    try:
        content = yaml.load(text, Loader=loader)
        if _num_values(content, {}) > MAX_VALUES:
            raise yaml.MarkedYAMLError(problem=f"its aliases stand for more than {MAX_VALUES:,} values")
    except RecursionError:
        raise yaml.MarkedYAMLError(problem="it is nested too deeply") from None
    except (ValueError, TypeError, LookupError, AttributeError) as error:  # of tags
        raise yaml.MarkedYAMLError(problem=f"a value cannot be read: {error}") from None
    return content


def _num_values(value: Any, known: dict[int, int]) -> int:
    """Return the number of values in a value; `known` holds those of containers, which aliases share."""
    if not isinstance(value, (dict, list, set, tuple)):
        return 1
    if id(value) not in known:
        parts = [*value, *value.values()] if isinstance(value, dict) else list(value)
        known[id(value)] = 1 + sum(_num_values(part, known) for part in parts)
    return known[id(value)]
