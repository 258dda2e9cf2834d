"""Negation and uncertainty of the matches in one text, from the cues of their clauses.

text --boundaries--> clauses --cues, repeated at the items of lists--> is_negated, is_hedged
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import cached_property

from llava.symbolic.cue_lists import Cues
from llava.symbolic.words import WordIndex

WORDS_BEFORE = 8
"""Maximum number of words between a cue and the match after it, and of words of an item of a list."""

WORDS_AFTER = 3
"""Maximum number of words between a match and the cue after it."""

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
        ends = _spans(cues.boundary, text)
        self.clause_starts = [0, *(end for _, end in ends)]
        self.clause_ends = [*(start for start, _ in ends), len(text)]
        self.predicates = _spans(cues.predicates, text)
        self.contrasts = _spans(cues.contrasts, text)
        self.hedges = _spans(cues.hedges, text)
        harmless, restarts = _spans(cues.harmless, text), _spans(cues.restarts, text)
        self.before = [cue for cue in _spans(cues.before, text) if not _inside(cue, harmless)]
        self.after = [cue for cue in _spans(cues.after, text) if not (_inside(cue, harmless) or _inside(cue, restarts))]
        if self.before or self.after:
            self._repeat_cues_in_lists()

    @cached_property
    def words(self) -> WordIndex:
        """Words of the text."""
        return WordIndex(self.text)

    def is_negated(self, span: Span) -> bool:
        """Return whether a cue before or after a match, in its clause, negates it."""
        if not self.before and not self.after:
            return False
        begin, end = self._clause(span)
        cue, predicate = last_before(self.before, span[0]), last_before(self.predicates, span[0])
        reach = max(begin, predicate[1]) if predicate else begin
        if cue and reach <= cue[0] and self._num_words(cue[1], span[0]) <= WORDS_BEFORE:
            return True
        cue = first_after(self.after, span[1])
        if cue is None or cue[1] > end or self._num_words(span[1], cue[0]) > WORDS_AFTER:
            return False
        return not self._negates_next(span[1], cue, end)

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

    def _negates_next(self, begin: int, cue: Span, end: int) -> bool:
        """Return whether a cue negates not the match that ends at `begin` but the next one: "AML and not MM"."""
        index = bisect_left(self.matches, cue[1])
        if index == len(self.matches) or self.matches[index] >= end:
            return False
        num_words = self._num_words(cue[1], self.matches[index])
        if self._num_words(begin, cue[0]):
            return num_words <= WORDS_BEFORE and _inside(cue, self.contrasts)
        # "AML (not MM)", in contrast to "AML not seen with MM"
        return num_words <= 1 and self.cues.bare.fullmatch(self.text, *cue) is not None

    def _repeat_cues_in_lists(self) -> None:
        """Repeat the cue of a list at its items: "no AML, MM, or blasts" is "no AML, no MM, or no blasts"."""
        clauses = list(zip(self.clause_starts, self.clause_ends, strict=True))
        commas = [begin > 0 and self.text[begin - 1] == "," for begin, _ in clauses]
        links = [self.cues.links.search(self.text, *clause) for clause in clauses] if any(commas) else []
        before: list[Span] = []
        after: list[Span] = []
        for last, link in enumerate(links):
            if link is None or not commas[last]:
                continue
            begin, end = clauses[last]
            alone = self._num_words(begin, link.start()) == 0  # "A, B, or C", in contrast to "A, B or C"
            in_place = self.cues.places.search(self.text, begin, link.start())
            if not alone and (in_place or not self._is_item(begin, link.start())):
                continue
            first = last - 1
            while commas[first] and links[first] is None and self._is_item(*clauses[first]):
                first -= 1
            middle = last - first > 1
            whole = self._is_item(link.start(), end)  # without a verb after the last item
            adds = self.cues.additions.fullmatch(link.group()) is not None
            closes = not adds or (middle and whole)  # "and" also joins statements: "no debris, AML and blasts are seen"
            if closes and self._opens_list(*clauses[first], with_be=alone and whole and not adds):
                before += [(item, item) for item, _ in clauses[first + 1 : last + 1]]
            elif middle and self._is_item(*clauses[first]) and self._is_denied(link.end(), end):
                after += [(item, item) for _, item in clauses[first:last]]
        self.before = sorted(self.before + before)
        self.after = sorted(self.after + after)

    def _is_item(self, begin: int, end: int) -> bool:
        """Return whether a part of a text can be an item of a list: a few words without a cue or a statement."""
        if not 1 <= self._num_words(begin, end) <= WORDS_BEFORE:
            return False
        return not self.cues.any.search(self.text, begin, end) and not self.cues.ends.search(self.text, begin, end)

    def _opens_list(self, begin: int, end: int, *, with_be: bool) -> bool:
        """Return whether a clause ends with a negated item: "no AML", or `with_be` also "it is not AML"."""
        cue = last_before(self.before, end)
        if cue is None or begin > cue[0]:
            return False
        verbs = [verb.end() for verb in self.cues.verbs.finditer(self.text, cue[1], end)]
        if not (with_be or verbs) and self.cues.both.fullmatch(self.text, *cue):
            return False
        return self._is_item(verbs[-1] if verbs else cue[1], end)

    def _is_denied(self, begin: int, end: int) -> bool:
        """Return whether a cue follows the last item of a list, as in "or blasts are not seen"."""
        cue = first_after(self.after, begin)
        return cue is not None and cue[1] <= end and self._num_words(begin, cue[0]) <= WORDS_AFTER + 1

    def _num_words(self, begin: int, end: int) -> int:
        """Return the number of words between two positions."""
        return self.words.count(begin, end)


def _spans(pattern: re.Pattern[str], text: str) -> list[Span]:
    return [match.span() for match in pattern.finditer(text)]


def last_before(spans: list[Span], position: int) -> Span | None:
    """Return the last of sorted spans that ends at or before a position."""
    index = bisect_right(spans, position, key=lambda span: span[1])
    return spans[index - 1] if index else None


def first_after(spans: list[Span], position: int) -> Span | None:
    """Return the first of sorted spans that begins at or after a position."""
    index = bisect_left(spans, (position, 0))
    return spans[index] if index < len(spans) else None


def _inside(span: Span, others: list[Span]) -> bool:
    index = bisect_right(others, span[0], key=lambda other: other[0])
    return index > 0 and span[1] <= others[index - 1][1]
