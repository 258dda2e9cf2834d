"""When one rank ends with an error, the others say so in one line instead of a traceback of the network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from llava.errors import LlavaError

SIGNS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
"""How gloo, which has no error class of its own, reports a process that is gone."""


@contextmanager
def lost_ranks_in_one_line() -> Iterator[None]:
    """Name another rank's end where the network would.

    Raises:
        LlavaError: another rank has ended.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not any(sign in str(error) for sign in SIGNS):
            raise
        raise LlavaError(
            "another rank of this run has ended, and its own message says why; this one ends too"
        ) from error
