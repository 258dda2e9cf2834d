"""What a field that names a patient or a study says, however a table wrote it."""

from __future__ import annotations

import math
from typing import Any

NOBODY = frozenset({"", "nan", "none", "null", "unknown", "na", "n/a", "-"})
"""Values that name no one, in lower case."""


def written_name(value: Any) -> str:
    """Return a name as text, empty where the value is no name: `12`, `"12"` and `12.0` are one.

    Tables that hold numbers and gaps turn whole numbers into fractions.
    """
    if isinstance(value, float):
        value = int(value) if math.isfinite(value) and value.is_integer() else None
    return str(value).strip() if isinstance(value, str | int) and not isinstance(value, bool) else ""


def names_someone(name: str) -> bool:
    """Say whether a text of `written_name` names a person, and not that nobody is known."""
    return name.lower() not in NOBODY
