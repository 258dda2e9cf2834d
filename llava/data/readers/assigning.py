"""Groups to splits by a hash: equal group, fractions and seed give the same split, whatever else is there.

SHA-256(seed, group) --first 8 bytes as a number in [0, 1)--> the split whose share of [0, 1) it falls into
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

from llava.errors import ConfigError


def unit_hash(group: str, *, seed: int) -> float:
    """Return a number in [0, 1) that depends on the group and the seed only."""
    digest = hashlib.sha256(f"{seed}\n{group}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / (1 << 53)


def place_of(group: str, fractions: Mapping[str, float], *, seed: int) -> str:
    """Return the split of a group; `fractions` sum to 1."""
    return split_at(unit_hash(group, seed=seed), fractions)


def split_at(place: float, fractions: Mapping[str, float]) -> str:
    """Return the split whose share of [0, 1) holds a number; shares follow each other in the order given."""
    upper, last = 0.0, ""
    for split, share in fractions.items():
        upper += share
        last = split if share > 0 else last
        if place < upper:
            return split
    return last  # shares may sum to a little less than 1


def parse_fractions(text: str) -> dict[str, float]:
    """Read `train=0.8,val=0.1,test=0.1`.

    Raises:
        ConfigError: not names with numbers, a name twice, a share below 0, or a sum that is not 1.
    """
    fractions: dict[str, float] = {}
    for part in text.split(","):
        name, equals, number = part.strip().partition("=")
        try:
            share = float(number)
        except ValueError:
            share = math.nan
        name = name.strip()
        if not equals or not name.isidentifier() or not 0 <= share <= 1 or name in fractions:
            raise ConfigError(
                f"fractions: got {text!r}, expected distinct names with shares: train=0.8,val=0.1,test=0.1"
            )
        fractions[name] = share
    if not math.isclose(sum(fractions.values()), 1.0, abs_tol=1e-6):
        raise ConfigError(f"fractions: {text!r} sum to {sum(fractions.values()):g}, expected 1")
    return fractions
