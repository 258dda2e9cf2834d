"""Answers usable in a preference: complete, not empty, not a refusal, and different from each other."""

from __future__ import annotations

import re

from llava.instruct.preferences.rows import Answered
from llava.scoring.decisions import unified_text
from llava.utils.typography import plain_typography

_VERBS = "answer|assist|help|comply|provide|view|interpret|diagnose|process|analy[sz]e"
_REFUSAL = re.compile(
    rf"\W*(?:(?:i'?m |i am )?(?:very |really |truly )?sorry|(?:i'?m |i am )?(?:unable|not able) to (?:{_VERBS})|"
    rf"i (?:cannot|can not|can'?t|won'?t) (?:{_VERBS})|as an? (?:ai|language model|artificial intelligence))\b",
    re.IGNORECASE,
)


def is_refusal(answer: str) -> bool:
    """Return whether an answer refuses to answer: it begins with an apology or says that it cannot."""
    return _REFUSAL.match(plain_typography(unified_text(answer))) is not None


def left_out(one: Answered) -> dict[int, str]:
    """Return why answers are left out, by place; of equal answers the first one stays."""
    reasons: dict[int, str] = {}
    seen: set[str] = set()
    for place, text in enumerate(one.answers):
        form = " ".join(text.split())
        if not form:
            reasons[place] = "empty"
        elif place in one.unfinished:
            reasons[place] = "unfinished"
        elif is_refusal(text):
            reasons[place] = "refusal"
        elif form in seen:
            reasons[place] = "equal"
        seen.add(form)
    return reasons
