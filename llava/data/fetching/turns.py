"""Politeness: how often a host is asked, by all threads together.

thread --wait(host)--> its turn        429 / 503 with Retry-After --pause(host)--> nobody's turn until then
"""

from __future__ import annotations

import threading
import time

from llava.errors import ConfigError


class HostTurns:
    """Spreads the requests to each host evenly over time.

    Args:
        per_second: requests a second and host; 0 does not limit.
        stopped: set when the program ends; nobody waits any longer then.
    """

    def __init__(self, per_second: float, stopped: threading.Event) -> None:
        if per_second < 0:
            raise ConfigError(f"the rate of requests must not be negative, got {per_second}")
        self._interval = 1.0 / per_second if per_second else 0.0
        self._stopped = stopped
        self._next: dict[str, float] = {}
        self._lock = threading.Lock()

    def wait(self, host: str) -> None:
        """Return when it is the caller's turn to ask `host`."""
        while not self._stopped.is_set():
            with self._lock:
                now = time.monotonic()
                turn = self._next.get(host, now)
                if turn <= now:
                    self._next[host] = now + self._interval
                    return
            self._stopped.wait(turn - now)

    def pause(self, host: str, seconds: float) -> None:
        """Let nobody ask `host` for so long."""
        with self._lock:
            self._next[host] = max(self._next.get(host, 0.0), time.monotonic() + seconds)
