"""Waiting for what another thread or process does, however slow the machine is."""

from __future__ import annotations

import time
from collections.abc import Callable

MOST_SECONDS = 120.0
"""Time after which a condition counts as one that never holds; no test waits that long unless it fails."""


def until(condition: Callable[[], bool], seconds: float = MOST_SECONDS) -> bool:
    """Return whether a condition holds within a time; it is asked again and again."""
    limit = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > limit:
            return condition()
        time.sleep(0.005)
    return True
