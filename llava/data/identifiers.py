"""Patterns for personal identifiers: dates, record numbers, phone numbers, e-mail addresses and names.

    text --patterns--> names of the rules that match

The patterns are heuristics: names without a title are missed, and a lot number may match as a record number. Functions
return names of rules only, never the matched text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_MONTHS = "jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?"
_MONTHS += "|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?"

_DATE = re.compile(
    r"(?<![\d./-])"
    r"(?:[0-3]?\d([/.-])[0-3]?\d\1(?:19|20)\d\d|[0-3]?\d([/.])[0-3]?\d\2\d\d|(?:19|20)\d\d([/.-])[01]?\d\3[0-3]?\d)"
    r"(?![\d/-]|\.\d)"
)
_DATE_IN_WORDS = re.compile(
    rf"\b(?:[0-3]?\d(?:st|nd|rd|th)?(?: of)? (?:{_MONTHS})\b\.?,? (?:19|20)\d\d"
    rf"|(?:{_MONTHS})\b\.? (?:[0-3]?\d(?:st|nd|rd|th)?,? )?(?:19|20)\d\d)\b",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"(?<![\w.,/-])\d{7,12}(?![\w/-]|[.,]\d)")
_NAMED_NUMBER = re.compile(
    r"\b(?:mrn|medical record|patient id|patient no|hospital no|accession(?: no| number)?)\b[^\w\n]{0,4}"
    r"(?:number|no)?[^\w\n]{0,3}[a-z]{0,4}-?\d{3,}",
    re.IGNORECASE,
)
_PHONE = re.compile(
    r"(?<![\w.,-])(?:\+\d{1,3}[ .-]?(?:\(?\d{1,4}\)?[ .-]?){2,5}\d{2,4}"
    r"|\(\d{3}\) ?\d{3}[ .-]\d{4}|\d{3}([ .-])\d{3}\1\d{4}|\d{3}-\d{2}-\d{4})(?![\w-])"
)
_EMAIL = re.compile(r"[\w.+-]{1,64}@[\w-]{1,64}\.[a-z]{2,}", re.IGNORECASE)
_NAME = re.compile(
    r"\b(?:Mr|Mrs|Ms|Miss|Dr|Prof|MR|MRS|MS|DR)\b\.? (?!(?:The|In|On|An?|I)\b)[A-Z][a-z]{2,}"
    r"|\b(?:[Pp]atient(?:'s)? [Nn]ame|[Nn]ame of (?:the )?patient|[Rr]eferring [Pp]hysician|[Dd]octor)"
    r"(?:: ?| is |\s)[A-Z][a-z]+"
)
_TITLE = re.compile(r"M[rsR]|Miss|D[rR]|Prof|ame|hysician|octor")
_URL = re.compile(r"\bhttps?://\S+|\bwww\.\S+|\b(?:doi:? ?)?10\.\d{4,9}/\S+", re.IGNORECASE)
"""URLs and DOIs, which are public and contain many digits."""


def identifier_rules(texts: Iterable[str]) -> list[str]:
    """Return the sorted names of the rules (`identifier-date`, ...) that any of the texts matches."""
    found: set[str] = set()
    for text in texts:
        found.update(_rules(text))
    return sorted(found)


def _rules(text: str) -> Iterable[str]:
    """Yield the names of the rules that a text matches."""
    # Cheap tests come first, as almost no text matches.
    if "//" in text or "www." in text or "10." in text:
        text = _URL.sub(" ", text)
    if "@" in text and _EMAIL.search(text):
        yield "identifier-email"
    if not text.isalpha() and _has_digits(text):
        if _DATE.search(text) or _DATE_IN_WORDS.search(text):
            yield "identifier-date"
        if _NUMBER.search(text) or _NAMED_NUMBER.search(text):
            yield "identifier-number"
        if _PHONE.search(text):
            yield "identifier-phone"
    if _TITLE.search(text) and _NAME.search(text):
        yield "identifier-name"


_DIGITS = re.compile(r"\d{3}|\d[/.-]\d{1,2}[/.-]")


def _has_digits(text: str) -> bool:
    """Return whether a text has enough consecutive digits for a date or a number."""
    return _DIGITS.search(text) is not None
