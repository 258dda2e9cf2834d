"""Kinds of failures while answering, and the messages about them."""

from __future__ import annotations

import torch

from llava.errors import LlavaError

MEGABYTE = 1 << 20


def refusal(error: Exception) -> str:
    """Return why a request cannot be read, without quoting its content."""
    if isinstance(error, LlavaError):
        return str(error)
    return f"the request cannot be read: {type(error).__name__}"


def named(error: BaseException) -> str:
    """Return type and first line of an error."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def is_lost(error: BaseException) -> bool:
    """Return whether an error leaves the device unusable, so that every later computation would fail."""
    return isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out, on any device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return "out of memory" in text or "can't allocate memory" in text or "not enough memory" in text


def no_memory(error: BaseException) -> str:
    """Return the message for a request that does not fit the memory."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"out of memory ({reason}); use fewer slots, a shorter prompt or a smaller max_new_tokens"


def beyond_limit(needed: int, limit: int) -> str:
    """Return the message for a request whose keys and values exceed a limit in bytes."""
    return (
        f"the keys and values of this prompt and its answer need {needed / MEGABYTE:.1f} MB, but the limit is "
        f"{limit / MEGABYTE:.1f} MB; raise --kv-cache-mb or shorten the prompt"
    )
