"""Classification of questions as open or closed, and yes/no decisions of answers.

Training, data checks and evaluation share these rules.
"""

from __future__ import annotations

import re
from typing import Any

from llava.errors import DataError

DECISIONS = ("yes", "no")
CLOSED_TYPES = frozenset({"closed", "yes/no"})
OPEN_TYPES = frozenset({"open", "other", "number"})
_WORD = re.compile(r"\w+")


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case."""
    return _WORD.findall(text.lower())


def first_decision(text: str) -> str | None:
    """Return the first whole word `yes` or `no` of an answer; None if it has neither."""
    return next((word for word in words_of(text) if word in DECISIONS), None)


def is_closed(answer_type: Any, reference: str) -> bool:
    """Return whether a question is closed; without `answer_type`, whether its reference is yes or no.

    Raises:
        DataError: `answer_type` is unknown.
    """
    if answer_type is None:
        return reference.strip().strip(".").lower() in DECISIONS
    word = str(answer_type).strip().lower()
    if word in CLOSED_TYPES:
        return True
    if word in OPEN_TYPES:
        return False
    known = ", ".join(sorted(CLOSED_TYPES | OPEN_TYPES))
    raise DataError(f"answer_type {answer_type!r} is unknown; expected one of {known} (any case)")
