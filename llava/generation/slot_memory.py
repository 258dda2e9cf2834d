"""Memory for keys and values that requests need at their longest, and the longest answer that fits.

stem: tokens that sequences share, stored once      slot: the rest of the prompt and the answer
tokens = slots x longest slot + stems x longest stem, because both are rectangles
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Hashable, Sequence

from llava.data.encode import Encoded
from llava.generation.protocol import UNLIMITED
from llava.generation.request import Request

MIN_ANSWER = 16
"""Tokens that an answer has room for; a prompt with which fewer fit is refused, unless it asks for fewer."""

OPEN_ANSWER = 1024
"""Tokens for which an answer without a limit may need more than a quarter of the memory."""


def last_image(encoded: Encoded) -> int:
    """Return the number of tokens up to the end of the last image; 0 without one."""
    return encoded.image_spans[-1][1] if encoded.image_spans else 0


def stem_length(encoded: Encoded) -> int:
    """Return the number of tokens in the stem of a single sequence; a stem has at least one token."""
    return max(last_image(encoded), 1)


def most_tokens(requests: Sequence[Request]) -> int:
    """Return the largest number of tokens that encoded requests hold in stems and slots.

    The prompt of the last one is counted twice: until it joins, it is outside the slots.
    """
    stems: dict[Hashable, int] = {}
    slots = []
    for request in requests:
        assert request.encoded is not None
        name, length = request.stem or (request.encoded.images, stem_length(request.encoded))
        stems[name] = length
        slots.append(len(request.encoded.input_ids) - length + request.limit + 1)
    assert requests[-1].encoded is not None
    return len(slots) * max(slots) + len(stems) * max(stems.values()) + len(requests[-1].encoded.input_ids)


def answer_limit(
    request: Request, room: int, kv_bytes: Callable[[Sequence[Request]], int], max_bytes: int | None
) -> int:
    """Return the largest number of tokens of the answer to a request, which ends with `length` there.

    Memory is kept for the longest answer. One without a limit of its own gets at most a quarter of it, so that several
    run at a time, but up to `OPEN_ANSWER` tokens where they fit.

    Args:
        request: the request, encoded.
        room: tokens that the context has for the answer.
        kv_bytes: bytes that requests need at their longest.
        max_bytes: limit of bytes; None: no limit.
    """
    wanted = min(request.sampling.max_new_tokens, room)
    if max_bytes is None:
        return wanted

    def bytes_with(limit: int) -> int:
        request.limit = limit
        return kv_bytes([request])

    if request.sampling.max_new_tokens < UNLIMITED:
        return longest_answer(bytes_with, wanted, max_bytes)
    short = longest_answer(bytes_with, min(wanted, OPEN_ANSWER), max_bytes)
    return max(short, longest_answer(bytes_with, wanted, max_bytes // 4))


def longest_answer(bytes_of: Callable[[int], int], wanted: int, max_bytes: int) -> int:
    """Return the largest number of tokens whose bytes fit, from `MIN_ANSWER` to `wanted`.

    Args:
        bytes_of: bytes that a request needs with an answer of this many tokens; grows with it.
        wanted: largest length of the answer.
        max_bytes: limit.
    """
    if bytes_of(wanted) <= max_bytes:
        return wanted
    return max(min(MIN_ANSWER, wanted), bisect_right(range(1, wanted + 1), max_bytes, key=bytes_of))
