"""Events of an event loop that another thread sets, many of them with one wake-up of the loop.

thread: set(event), set(event), ... --one call_soon_threadsafe--> loop: event.set() for each
"""

from __future__ import annotations

import asyncio
import threading


class WakeUps:
    """Events that a thread has set and the loop has not seen yet."""

    # A wake-up is a system call, during which the loop takes Python's lock: one for each of 32 answers would stop the
    # thread, which computes the next step, as many times.

    def __init__(self) -> None:
        """Create an empty set of events."""
        self._lock = threading.Lock()
        self._pending: list[asyncio.Event] = []

    def set(self, loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
        """Set an event soon, in the thread of its loop; all events are of one loop."""
        with self._lock:
            self._pending.append(event)
            is_first = len(self._pending) == 1
        if is_first:
            loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        with self._lock:
            pending, self._pending = self._pending, []
        for event in pending:
            event.set()
