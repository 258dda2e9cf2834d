"""Wait times before retries: from server headers, or exponential backoff."""

from __future__ import annotations

import math
import random
import re
import time
from email.utils import parsedate_to_datetime

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")


def retry_after_seconds(value: str | None) -> float | None:
    """Return the seconds of a Retry-After header (a number or a date); None if it is missing or invalid."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, OverflowError, TypeError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def duration_seconds(value: str | None) -> float | None:
    """Return the seconds of a text such as `6m0s`, `1.5s`, `20ms` or `3`; None if it is invalid."""
    text = (value or "").strip()
    parts = _PART.findall(text)
    if parts and "".join(number + unit for number, unit in parts) == text:
        return sum(float(number) * _UNITS[unit] for number, unit in parts)
    try:
        seconds = float(text)
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) and seconds >= 0.0 else None


def backoff_seconds(attempt: int, *, first: float, most: float) -> float:
    """Return the seconds to wait after failed attempt `attempt`, counted from 1.

    The wait doubles from `first` up to `most`; jitter draws from its upper half.
    """
    # Without jitter, requests that failed together would be retried together.
    longest = min(most, first * 2.0 ** min(attempt - 1, 30))
    return random.uniform(longest / 2.0, longest)
