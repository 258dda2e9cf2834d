"""Classification of questions as open or closed, and yes/no decisions of answers.

Training, data checks and evaluation share these rules.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any

from llava.errors import DataError

DECISIONS = ("yes", "no")
CLOSED_TYPES = frozenset({"closed", "yes/no"})
OPEN_TYPES = frozenset({"open", "other", "number"})
_WORD = re.compile(r"\w+")
_SHORT_WORD = re.compile(r"[a-z][a-z/_-]{0,15}", re.IGNORECASE | re.ASCII)


def unified_text(text: str) -> str:
    """Return a text in one Unicode form: composed, half-width letters, no invisible characters."""
    if text.isascii():
        return text
    composed = unicodedata.normalize("NFKC", text)
    return "".join(character for character in composed if unicodedata.category(character) != "Cf")


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case."""
    return _WORD.findall(unified_text(text).lower())


def first_decision(text: str) -> str | None:
    """Return the first whole word `yes` or `no` of an answer; None if it has neither."""
    return next((word for word in words_of(text) if word in DECISIONS), None)


def is_closed(answer_type: Any, reference: str) -> bool:
    """Return whether a question is closed; without `answer_type`, whether its reference is yes or no.

    Raises:
        DataError: `answer_type` is unknown.
    """
    if answer_type is None:
        return unified_text(reference).strip().strip(".\u3002").lower() in DECISIONS  # or an ideographic full stop
    word = str(answer_type).strip().lower()
    if word in CLOSED_TYPES:
        return True
    if word in OPEN_TYPES:
        return False
    known = ", ".join(sorted(CLOSED_TYPES | OPEN_TYPES))
    # Another text may be about a patient, and messages appear in logs.
    got = repr(answer_type) if _SHORT_WORD.fullmatch(str(answer_type)) else f"a {type(answer_type).__name__}"
    raise DataError(f"answer_type {got} is unknown; expected one of {known} (any case)")
