"""Normalization of answers: the rules of the VQA evaluation as LLaVA-Med applies them.

    text -> punctuation -> periods -> words (numbers, articles, contractions) -> text

The published rules have quirks. The one that is clearly a mistake has a switch (`all_periods`); the others are kept,
since all published figures depend on them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
"""Punctuation marks that are deleted or replaced by a space, in this order."""

MAX_PERIODS = 32
"""Maximum number of periods that the original deletes, because it passes a regex flag as the count."""

_DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {word: str(value) for value, word in enumerate(_DIGIT_WORDS)} | {"none": "0"}

ARTICLES = frozenset({"a", "an", "the"})

_NOT_VERBS = (
    "ai are ca could did does do had has have is might must need ought sha should was were wo would"  # with "n't"
)
_HAVE_VERBS = "could might must should would not"  # with "'ve"
_DOUBLE_VERBS = "could had might should would"  # with "n't've"
_WOULD_HAVE_WORDS = "he i it she somebody someone something there they we who you"  # with "'d've"
# Only endings for which the word without its apostrophe is not another English word ("its", "were", "shell" are kept).
_ENDINGS = {
    "he": "d s",
    "how": "d ll s",
    "i": "m ve",
    "it": "d ll",
    "let": "s",
    "somebody": "d ll s",
    "someone": "d ll s",
    "something": "d ll",
    "that": "s",
    "there": "d re s",
    "they": "d ll re ve",
    "we": "ve",
    "what": "ll re s ve",
    "when": "s",
    "where": "d s ve",
    "who": "d ll s ve",
    "why": "ll re s",
    "y'all": "ll",
    "you": "d ll re ve",
}
_IRREGULAR = {"maam": "ma'am", "oclock": "o'clock", "twas": "'twas", "yall": "y'all"}

_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")


def _contractions() -> Iterator[tuple[str, str]]:
    """Yield contractions without an apostrophe, each with its correct form."""
    for verb in _NOT_VERBS.split():
        yield f"{verb}nt", f"{verb}n't"
    for verb in _HAVE_VERBS.split():
        yield f"{verb}ve", f"{verb}'ve"
    for verb in _DOUBLE_VERBS.split():
        for written in (f"{verb}nt've", f"{verb}n'tve"):
            yield written, f"{verb}n't've"
    for word in _WOULD_HAVE_WORDS.split():
        for written in (f"{word}d've", f"{word}'dve"):
            yield written, f"{word}'d've"
    for word, endings in _ENDINGS.items():
        for ending in endings.split():
            yield f"{word}{ending}", f"{word}'{ending}"
    yield from _IRREGULAR.items()


CONTRACTIONS = dict(_contractions())
"""Correct forms of contractions, by the form without an apostrophe."""


def normalize_answer(text: str, *, all_periods: bool = False) -> str:
    """Return the form of a text that the medical VQA scores compare.

    Args:
        text: a reference or an answer.
        all_periods: delete every period that is not followed by a digit, not only the first 32.
    """
    cleaned = _without_punctuation(text)
    cleaned = _PERIOD.sub("", cleaned, count=0 if all_periods else MAX_PERIODS)
    words = (NUMBERS.get(word, word) for word in cleaned.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES).replace(",", "")


def _without_punctuation(text: str) -> str:
    """Return a text in which marks that occur next to a space are deleted and all others are spaces."""
    # As published, a digit, a comma and a digit anywhere in the text cause all marks to be deleted.
    number_with_comma = _DIGIT_COMMA_DIGIT.search(text) is not None
    cleaned = text
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if beside_space or number_with_comma else " ")
    return cleaned
