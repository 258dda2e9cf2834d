"""Answers in one spelling: the normalisation of the VQA evaluation as LLaVA-Med applies it.

    text -> punctuation -> full stops -> words (numbers, articles, contractions) -> text

The published rules have quirks; the one that is plainly a mistake has a switch (`all_periods`), the others are part of
what every published figure means.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
"""Marks that are deleted or become a space, in this order."""

MAX_PERIODS = 32
"""How many full stops the original deletes at most: a regex flag handed over in the place of a count."""

_DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {word: str(value) for value, word in enumerate(_DIGIT_WORDS)} | {"none": "0"}

ARTICLES = frozenset({"a", "an", "the"})

_NOT_VERBS = (
    "ai are ca could did does do had has have is might must need ought sha should was were wo would"  # with "n't"
)
_HAVE_VERBS = "could might must should would not"  # with "'ve"
_DOUBLE_VERBS = "could had might should would"  # with "n't've"
_WOULD_HAVE_WORDS = "he i it she somebody someone something there they we who you"  # with "'d've"
# Endings only where the word without its apostrophe is no other English word ("its", "were", "shell" stay as they are).
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
    """Yield contractions that lost an apostrophe, each with its right form."""
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
"""Contractions without their apostrophe, and the right form of each."""


def normalize(text: str, *, all_periods: bool = False) -> str:
    """Return the text as the medical VQA scores compare it.

    Args:
        text: a reference or an answer.
        all_periods: delete every full stop that no digit follows, not only the first 32.
    """
    cleaned = _without_punctuation(text)
    cleaned = _PERIOD.sub("", cleaned, count=0 if all_periods else MAX_PERIODS)
    words = (NUMBERS.get(word, word) for word in cleaned.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES).replace(",", "")


def _without_punctuation(text: str) -> str:
    """Delete a mark that stands beside a space anywhere in the text, turn any other into a space.

    A digit, a comma and a digit anywhere in the text make every mark a deleted one: as published.
    """
    number_with_comma = _DIGIT_COMMA_DIGIT.search(text) is not None
    cleaned = text
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if beside_space or number_with_comma else " ")
    return cleaned
