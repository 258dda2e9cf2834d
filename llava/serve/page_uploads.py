"""Uploads of the page: read into memory, removed from disk, and shared by sessions that sent them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

KEPT_SECONDS = 60.0
"""Time for which another session may still ask for a file that was removed from the disk."""


@dataclass
class _Taken:
    content: bytes
    when: float
    sessions: set[str]


class Uploads:
    """Files between the upload folder and the conversations; all methods may be called from any thread."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        """Start without files.

        Args:
            now: seconds of a clock.
        """
        self._now = now
        self._lock = threading.Lock()
        # Gradio names an upload by its content: two sessions that send one file at a time have one path between them.
        self._taken: dict[str, _Taken] = {}

    def take(self, paths: Sequence[str], session: str) -> list[tuple[str, bytes]]:
        """Return names and bytes of files that a session uploaded, and remove them from the disk.

        A path that the session took before, and did not upload again, is left out: one change of the field may be
        reported twice. The folders stay until the page ends, since a second upload may be on its way there.
        """
        found = []
        with self._lock:
            self._drop_old()
            for path in map(Path, paths):
                taken = self._taken.get(str(path))
                if path.is_file():
                    taken = self._taken[str(path)] = _Taken(path.read_bytes(), self._now(), {session})
                    path.unlink(missing_ok=True)
                elif taken is None or session in taken.sessions:
                    continue
                taken.sessions.add(session)
                found.append((path.name, taken.content))
        return found

    def forget(self, session: str) -> None:
        """Drop what a closed session sent."""
        with self._lock:
            self._taken = {path: taken for path, taken in self._taken.items() if session not in taken.sessions}
            self._drop_old()

    def _drop_old(self) -> None:
        oldest = self._now() - KEPT_SECONDS
        self._taken = {path: taken for path, taken in self._taken.items() if taken.when >= oldest}
