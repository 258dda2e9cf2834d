"""Texts as 64-bit numbers: what is compared is kept as a hash, eight bytes each.

Two of ten million different texts have the same number with a chance of about three in a million.
"""

from __future__ import annotations

from hashlib import blake2b

from llava.constants import IMAGE_TOKEN
from llava.scoring.decisions import words

NOTHING = 0
"""Stands for "there is none"; no text has this number."""


def digest_bytes(content: bytes) -> int:
    """Return a number of 64 bits, never 0, for some bytes."""
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little") or 1


def digest(text: str) -> int:
    """Return a number of 64 bits, never 0, for a text."""
    return digest_bytes(text.encode("utf-8", "surrogatepass"))


def question_digest(text: str) -> int:
    """Return the number of a question's words in lower case, punctuation and place holders aside; 0 if it has none."""
    found = words(text.replace(IMAGE_TOKEN, " "))
    return digest(" ".join(found)) if found else NOTHING
