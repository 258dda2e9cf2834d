"""Error handling for ranks that fail: the other ranks report it in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from llava.errors import LlavaError

SIGNS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
"""Messages of gloo, which has no error class, when a process has ended."""


@contextmanager
def lost_ranks_in_one_line() -> Iterator[None]:
    """Turn communication errors into one line that says that another rank has ended.

    Raises:
        LlavaError: another rank has ended.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not any(sign in str(error) for sign in SIGNS):
            raise
        raise LlavaError(
            "another rank of this run has ended, so this rank ends too; see the message of that rank for the reason"
        ) from error
