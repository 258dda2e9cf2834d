"""Words of a text by position, so that those of a part are counted in a few steps."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right

RUN = re.compile(r"\S+")
LETTERS = re.compile(r"\w+")


class WordIndex:
    """Words of a text: runs without spaces that have a letter or digit.

    A part of the text may begin or end inside of a run; what is left of the run is a word if it has a letter.

    Args:
        text: the text.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        runs = [match.span() for match in RUN.finditer(text) if LETTERS.search(text, *match.span())]
        letters = [match.span() for match in LETTERS.finditer(text)]
        self.starts, self.ends = [start for start, _ in runs], [end for _, end in runs]
        self.letter_starts, self.letter_ends = [start for start, _ in letters], [end for _, end in letters]

    def count(self, begin: int, end: int) -> int:
        """Return the number of words between two positions."""
        return len(self._between(begin, end))

    def _between(self, begin: int, end: int) -> range:
        """Return the runs whose part between two positions is a word."""
        if begin >= end:
            return range(0)
        first, last = bisect_right(self.ends, begin), bisect_left(self.starts, end)
        # Only the outer runs can be cut.
        if first < last and not self._has_letter(begin, min(end, self.ends[first])):
            first += 1
        if first < last and not self._has_letter(max(begin, self.starts[last - 1]), end):
            last -= 1
        return range(first, max(first, last))

    def _has_letter(self, begin: int, end: int) -> bool:
        index = bisect_right(self.letter_ends, begin)
        return index < len(self.letter_ends) and self.letter_starts[index] < end
