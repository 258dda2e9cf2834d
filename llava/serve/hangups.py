"""SIGHUP before a server listens: ignored, and its keys are read again when it begins to listen."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator


@contextlib.contextmanager
def hangups_ignored() -> Iterator[None]:
    """Ignore SIGHUP, which ends a process by default, until the server handles it.

    Example::

        with hangups_ignored():
            load_model()
    """
    before = None
    with contextlib.suppress(ValueError):  # not in the main thread, as in tests
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGHUP, before)
