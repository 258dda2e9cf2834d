"""Negation and uncertainty of the matches in one text, from the cues of their clauses.

text --boundaries--> clauses --commas of lists--> lists --cues--> is_negated, is_hedged
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import cached_property

from llava.symbolic.cue_lists import Cues
from llava.symbolic.words import WordIndex

WORDS_BEFORE = 8
"""Maximum number of words between a cue and the match after it, and of words of an item of a list."""

WORDS_AFTER = 3
"""Maximum number of words between a match and the cue after it."""

ENDS_LIST = ("subjects", "verbs", "statements")
"""Lists of words that no item of a list has."""

Span = tuple[int, int]


class ClauseContext:
    """Clauses, lists and cues of one text.

    Args:
        text: normalized text.
        cues: cue lists of its language.
        matches: sorted positions at which matches of a node begin.
    """

    def __init__(self, text: str, cues: Cues, matches: Sequence[int]) -> None:
        self.text = text
        self.cues = cues
        self.matches = matches
        self.before: list[Span] = []
        self.after: list[Span] = []
        self.hedges: list[Span] = []
        if not any(part in text for part in cues.parts) or cues.any.search(text) is None:
            return
        ends = [match.span() for match in cues.boundary.finditer(text)]
        self.clause_starts = [0, *(end for _, end in ends)]
        self.clause_ends = [*(start for start, _ in ends), len(text)]
        harmless = [match.span() for match in cues.harmless.finditer(text)]
        self.before = [match.span() for match in cues.before.finditer(text) if not _inside(match.span(), harmless)]
        self.after = [match.span() for match in cues.after.finditer(text) if not _inside(match.span(), harmless)]
        self.hedges = [match.span() for match in cues.hedges.finditer(text)]
        self.listed, self.denied = self._lists() if self.before or self.after else ([], [])

    @cached_property
    def words(self) -> WordIndex:
        """Words of the text."""
        return WordIndex(self.text)

    @cached_property
    def subjects(self) -> list[Span]:
        """Subjects of statements."""
        return [match.span() for match in self.cues.words["subjects"].finditer(self.text)]

    @cached_property
    def links(self) -> list[Span]:
        """Words that continue what was said with something else."""
        return [match.span() for match in self.cues.words["links"].finditer(self.text)]

    def is_negated(self, span: Span) -> bool:
        """Return whether a cue before or after a match, in its clause or list, negates it."""
        if not self.before and not self.after:
            return False
        index = bisect_right(self.clause_starts, span[0]) - 1
        begin, end = self._clause(span)
        cue = last_before(self.before, span[0])
        if cue and begin <= cue[0] and self._num_words(cue[1], span[0]) <= WORDS_BEFORE:
            return True
        if self.listed[index] and self._num_words(begin, span[0]) <= WORDS_BEFORE:
            return True
        cue = first_after(self.after, span[1])
        if cue and cue[1] <= end and self._num_words(span[1], cue[0]) <= WORDS_AFTER:
            return not self._negates_later(span[1], cue, end)
        return self.denied[index]

    def is_hedged(self, span: Span) -> bool:
        """Return whether the clause of a match has a hedge outside of the match."""
        if not self.hedges:
            return False
        begin, end = self._clause(span)
        before, after = last_before(self.hedges, span[0]), first_after(self.hedges, span[1])
        return bool(before and begin <= before[0]) or bool(after and after[1] <= end)

    def _clause(self, span: Span) -> Span:
        """Return the clause of a match, from where it begins to where its last part ends."""
        begin = self.clause_starts[bisect_right(self.clause_starts, span[0]) - 1]
        return begin, self.clause_ends[bisect_left(self.clause_ends, span[1])]

    def _negates_later(self, begin: int, cue: Span, end: int) -> bool:
        """Return whether a cue after a match that ends at `begin` negates a later match instead."""
        words = self.cues.words
        if not words["also_before"].fullmatch(self.text, *cue):
            return False
        if _is_between(self.subjects, begin, cue[0]):
            return True
        later = bisect_left(self.matches, cue[1])
        if later == len(self.matches) or self.matches[later] >= end:
            return False
        direct = any(words["be"].fullmatch(word) for word in self.words.last(begin, cue[1], 2))
        return not direct or _is_between(self.links, begin, cue[0])

    def _lists(self) -> tuple[list[bool], list[bool]]:
        """Return, by clause, whether a list carries a negation to it from before, and from after it."""
        spans = list(zip(self.clause_starts, self.clause_ends, strict=True))
        commas = [begin > 0 and self.text[begin - 1] == "," for begin, _ in spans]
        listed, denied = [False] * len(spans), [False] * len(spans)
        if not any(commas):
            return listed, denied
        items = [self._is_item(*span) for span in spans]
        closed = [
            self._closing_item(*span, middle=commas[index - 1] and items[index - 1]) if commas[index] else None
            for index, span in enumerate(spans)
        ]
        continued = [False] * (len(spans) + 1)
        for index in reversed(range(len(spans))):
            if items[index] and continued[index + 1]:
                last = closed[index + 1]
                denied[index] = denied[index + 1] if last is None else self._is_denied(last)
            continued[index] = commas[index] and (closed[index] is not None or (items[index] and continued[index + 1]))
        for index in range(1, len(spans)):
            inside = listed[index - 1] and closed[index - 1] is None
            listed[index] = continued[index] and (inside or self._opens_list(*spans[index - 1]))
        return listed, denied

    def _is_item(self, begin: int, end: int) -> bool:
        """Return whether a part can be an item of a list: a few words without a cue or statement."""
        if not 1 <= self._num_words(begin, end) <= WORDS_BEFORE or self.cues.any.search(self.text, begin, end):
            return False
        return not any(self.cues.words[key].search(self.text, begin, end) for key in ENDS_LIST)

    def _opens_list(self, begin: int, end: int) -> bool:
        """Return whether a clause ends with a negated item, as "no AML" does; "no" alone is an answer."""
        cue = last_before(self.before, end)
        if cue is None or begin > cue[0]:
            return False
        verb = self.cues.words["verbs"].match(self.text, cue[1] + 1)
        return self._is_item(verb.end() if verb else cue[1], end)

    def _closing_item(self, begin: int, end: int, *, middle: bool) -> Span | None:
        """Return the last item of a list, after "or" or "and", if a clause has one.

        Args:
            begin: begin of the clause.
            end: end of the clause.
            middle: whether the clause before is a further item; without one, "and" begins a statement.
        """
        words = self.cues.words
        found = [words[key].search(self.text, begin, end) for key in ("alternatives", "additions")]
        addition = found[1]
        link = min((match for match in found if match), key=lambda match: match.start(), default=None)
        if link is None or not self._num_words(link.end(), end):
            return None
        first = self._num_words(begin, link.start()) > 0
        if first and not self._is_item(begin, link.start()):
            return None
        next_word = link.end() + 1
        if words["subjects"].search(self.text, link.end(), end) or words["also_before"].match(self.text, next_word):
            return None
        if link is addition and (words["articles"].match(self.text, next_word) or not (first or middle)):
            return None
        return link.end(), end

    def _is_denied(self, item: Span) -> bool:
        """Return whether a cue after the last item negates a list, as in "or blasts are not seen"."""
        cue = first_after(self.after, item[0])
        return cue is not None and cue[1] <= item[1] and 1 <= self._num_words(item[0], cue[0]) <= WORDS_AFTER + 1

    def _num_words(self, begin: int, end: int) -> int:
        """Return the number of words between two positions."""
        return self.words.count(begin, end)


def last_before(spans: list[Span], position: int) -> Span | None:
    """Return the last of sorted spans that ends at or before a position."""
    index = bisect_right(spans, position, key=lambda span: span[1])
    return spans[index - 1] if index else None


def first_after(spans: list[Span], position: int) -> Span | None:
    """Return the first of sorted spans that begins at or after a position."""
    index = bisect_left(spans, (position, 0))
    return spans[index] if index < len(spans) else None


def _is_between(spans: list[Span], begin: int, end: int) -> bool:
    """Return whether one of sorted spans is between two positions."""
    found = first_after(spans, begin)
    return found is not None and found[1] <= end


def _inside(span: Span, others: list[Span]) -> bool:
    index = bisect_right(others, span[0], key=lambda other: other[0])
    return index > 0 and span[1] <= others[index - 1][1]
