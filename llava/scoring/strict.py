"""Words that the strict scores compare: one spelling per text, keeping every word that has a meaning.

    text --unified--> one spelling of letters, quotes and dashes --articles, marks--> words (numbers, contractions)

The published rules (`llava.scoring.normalize`) delete every `a` and, where a mark stands beside a space, the same mark
inside words; these rules do neither.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from itertools import pairwise

from llava.scoring.decisions import unified_text
from llava.scoring.normalize import CONTRACTIONS, NUMBERS, PUNCTUATION
from llava.utils.typography import APOSTROPHES

_MARKS = re.escape(PUNCTUATION + ":*|")
# A number keeps its comparison (< 5, >=5, but not ->5) and its minus (-1), but not the hyphen of a range (3-5).
_COMPARISON = r"(?:(?<![-=<>])(?:[<>]=?|[\u2264\u2265])\s*(?=-?\.?\d))?"
_MINUS = r"(?:(?<![\w)\]%-])-(?=\.?\d))?"
# A sign that ends a word is part of it (HER2+, ER-), but not the hyphen before another word (X-ray, pre- and post-).
_WORD = re.compile(rf"{_COMPARISON}{_MINUS}[^\s{_MARKS}]+(?:\++(?!\w)|-+(?=\s*(?:$|[,;/)\]])))?")
_COMPARISONS = {"<=": "\u2264", ">=": "\u2265"}
_SIGN = re.compile(r"\++|-+")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_PERIOD = re.compile(r"\.(?!\d)")
_POWER = re.compile("(?<=[0-9])(?=[\u00b2\u00b3\u00b9\u2070\u2074-\u2079])")
_FRACTION = re.compile("(?<=[0-9])(?=[\u00bc-\u00be\u2150-\u215e])")

# An article precedes a word: `a mass`, `a "mass"`. Before these words and before a mark, `a` is a letter: `A or B`.
_A = re.compile(r"(?<![^\s(\[\"'])[aA](?=\s+[(\[\"']*\w)(?!\s+(?:and|or|nor|but|is|was|as|because|since)\b)")
_STARTS_SENTENCE = re.compile(r"(?:^|[.!?:;\n])[\s(\[\"']*$")
_NEAR = 64
"""Number of characters before an `a` that decide whether it is an article."""


def strict_words(text: str, *, letter_after: frozenset[str] = frozenset()) -> list[str]:
    """Return the words of a text that the strict scores compare; empty only for a text without characters.

    Articles are left out, but not a capital A inside a text (`type A dissection`), an `a` that no word follows
    (`hepatitis A`), nor the words of a text that would be left out whole (`A`, `the`, `+`, `?`).

    Args:
        text: a reference or an answer.
        letter_after: lower-case words after which an `a` is never an article.
    """
    plain = _plain(text)
    words = [word for word in _words(_without_articles(plain, letter_after)) if word not in ("an", "the")]
    return words or _words(plain) or _SIGN.findall(plain) or plain.split()


def strict_pair(reference: str, prediction: str) -> tuple[list[str], list[str]]:
    """Return the words of both texts; a letter in one (`type A`) is also a letter in the other (`type a`)."""
    words = strict_words(reference), strict_words(prediction)
    after = frozenset(before for one in words for before, word in pairwise(one) if word == "a")
    if not after:
        return words
    return strict_words(reference, letter_after=after), strict_words(prediction, letter_after=after)


def strict_form(text: str) -> str:
    """Return the words of a text, joined by spaces."""
    return " ".join(strict_words(text))


def _plain(text: str) -> str:
    """Return a text with one spelling of letters, digits, quotes and dashes; case is kept."""
    text = _FRACTION.sub(" ", _POWER.sub("^", text.translate(APOSTROPHES)))  # NFKC would join 10 and its exponent
    return "".join(map(_plain_character, unified_text(text)))


def _plain_character(character: str) -> str:
    if character.isascii():
        return character
    if character in "\u2044\u2215":  # fraction and division slashes
        return "/"
    category = unicodedata.category(character)
    if category == "Pd" or character == "\u2212":
        return "-"
    return " " if category.startswith("P") else character


def _without_articles(text: str, letter_after: frozenset[str]) -> str:
    shouted = text.isupper()

    def replace(found: re.Match[str]) -> str:
        before = text[max(0, found.start() - _NEAR) : found.start()]
        if letter_after and letter_after.intersection(_words(before)[-1:]):
            return found[0]
        is_article = found[0] == "a" or shouted or _STARTS_SENTENCE.search(before) is not None
        return " " if is_article else found[0]

    return _A.sub(replace, text)


def _words(text: str) -> list[str]:
    """Return the words of a plain text, numbers as digits and contractions with their apostrophe."""
    cleaned = _PERIOD.sub("", _THOUSANDS.sub("", text)).casefold()
    words = ("".join(word.split()).strip("'") for word in _WORD.findall(cleaned))
    words = (_COMPARISONS.get(word[:2], word[:2]) + word[2:] for word in words)
    return [CONTRACTIONS.get(word, word) for word in (NUMBERS.get(word, word) for word in words if word)]


def same_words(reference: Sequence[str], prediction: Sequence[str]) -> bool:
    """Return whether an answer equals its reference; an empty answer never does."""
    return bool(prediction) and list(reference) == list(prediction)
