"""Typographic characters, and the ones of a keyboard that mean the same."""

from __future__ import annotations


def _table(characters: str, plain: str) -> dict[int, str]:
    return dict.fromkeys(map(ord, characters), plain)


APOSTROPHES = _table("\u2018\u2019\u201a\u201b\u2032\u00b4\u02bc\u02b9\uff07", "'")

INVISIBLE = _table("\u00ad\u200b\u200c\u200d\u2060\ufeff", "")
"""Soft hyphen, characters without width, and the mark at the start of some files."""

_PLAIN = {
    **{full: chr(full - 0xFEE0) for full in range(0xFF01, 0xFF5F)},  # full-width forms of ASCII
    **APOSTROPHES,
    **_table("\u201c\u201d\u201e\u201f\u2033\u00ab\u00bb", '"'),
    **_table("\u2010\u2011\u2012\u2013\u2014\u2015\u2212", "-"),
    **_table("\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000", " "),
}


def plain_typography(text: str) -> str:
    """Return a text with plain quotes, hyphens, spaces and half-width forms, of the same length.

    >>> plain_typography("I\u2019m sorry\u2009\u2013\u2009no")
    "I'm sorry - no"
    """
    return text if text.isascii() else text.translate(_PLAIN)
