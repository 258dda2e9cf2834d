"""Upper bound of the steps of a regular expression at a position of a text, the mean over all.

Texts have up to `MAX_TEXT` characters. Python's engine backtracks. Two numbers bound how often it reaches a part of a
pattern: the ways from one start, and the starts and ways that lead to one position of the text. A repeat multiplies the
first by its lengths only if what follows can begin with what it repeats, and the second only if what stands before can
end with it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise, takewhile
from re import _constants as ops  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any, NamedTuple

from llava.symbolic.pattern_sets import (
    ALL,
    END,
    REPEATS,
    WORD,
    Characters,
    all_characters,
    characters_of,
    codes_of,
    edge_of,
    edge_of_item,
    has_open_repeat,
    is_separated,
    parts_of,
)

MAX_TEXT = 4000
"""Characters of a text that are read."""

MEAN_TEXT = MAX_TEXT // 2
"""Characters from a position to the end of a text, the mean over all positions."""

MAX_STEPS = 16_000
"""Maximum number of steps at a position, of a pattern and of all patterns of a file: 0.5 to 0.9 s for `MAX_TEXT`."""

MAX_GROWING = 40
"""Maximum number of repetitions that each have several ways to match."""

MAX_OPENINGS, MAX_OPENING = 32, 32
"""Maximum number of texts with which a pattern begins, and of their characters that are compared."""

READ, READ_SET, SET, ANCHOR, REPEAT, GROUP, BRANCH, ALTERNATIVE = 0.25, 1.5, 2.0, 2.0, 2.0, 2.5, 0.5, 0.125
"""Steps of what is no comparison with one character, which takes about 8 ns: as measured.

In this order: a character that a repeat reads, one of a set that it reads, one that is compared with a set, an anchor,
the begin of a repeat, a repetition of a group, the begin of alternatives, and an alternative that cannot begin.
"""


class _Rest(NamedTuple):
    """What follows: characters with which it can begin, and steps until it is known not to begin."""

    characters: Characters
    steps: float


@dataclass(slots=True)
class _Reached:
    """How often the engine reaches a place of a pattern.

    Attributes:
        ways: from one start.
        starts: at one position of the text, from all starts.
        before: characters that can stand before it.
        length: characters that a repeat without upper bound reads.
        origin: the last place that can only be reached behind other characters than those `read` since, if any.
        read: characters that can stand between the origin and this place.
    """

    ways: float = 1.0
    starts: float = 1.0
    before: Characters = ALL
    length: float = MEAN_TEXT
    origin: _Reached | None = None
    read: Characters = END

    @property
    def times(self) -> float:
        """Visits of this place, the mean over all positions of a text."""
        return min(self.ways, self.starts)

    def in_one_run(self, characters: Characters) -> float:
        """Return how often a run of characters is read from this place; infinite if it may begin anywhere."""
        if not characters & self.before:
            return self.starts
        if self.origin is None or characters & self.origin.before or not self.read <= characters:
            return float("inf")
        return self.origin.starts * self.ways / self.origin.ways


@lru_cache(maxsize=4096)
def pattern_steps(pattern: str) -> float:
    """Return the largest number of steps of a pattern at a position, from 1; infinite if unknown."""
    items = list(_parser.parse(pattern, re.IGNORECASE))
    texts, _ = _openings(items)
    is_word = items[:1] == [(ops.AT, ops.AT_BOUNDARY)] and codes_of("".join(texts)) <= WORD
    # Words that begin at a boundary have a mark between them.
    reached = _Reached(ways=1 / (min(map(len, texts)) + 1 if is_word else _distance(texts)))
    return max(1.0, ALTERNATIVE * len(texts) + _steps(items, reached, _Rest(END, 0.0)))


def _openings(items: Sequence[Any]) -> tuple[list[str], bool]:
    """Return texts with one of which every match begins, and whether the items are these texts only."""
    texts = [""]
    for op, argument in items:
        if op is ops.AT:
            continue
        if op is ops.LITERAL:
            texts = [text + chr(argument).lower() for text in texts]
            continue
        found = [_openings(part) for part in parts_of(op, argument)]
        more = [text for part, _ in found for text in part]
        if not found or len(texts) * len(more) > MAX_OPENINGS:
            return texts, False
        texts = [text + other for text in texts for other in more]
        if not all(whole for _, whole in found):
            return texts, False
    return texts, True


def _distance(texts: Sequence[str]) -> int:
    """Return the smallest distance at which two of the texts can begin."""
    texts = [text[:MAX_OPENING] for text in texts]
    if "" in texts:
        return 1

    def meets(rest: str) -> bool:
        return any(text.startswith(rest) or rest.startswith(text) for text in texts)

    return min(next(shift for shift in range(1, len(text) + 1) if meets(text[shift:])) for text in texts)


def _steps(items: Sequence[Any], reached: _Reached, rest: _Rest) -> float:
    """Return the steps of a sequence before `rest`, and move `reached` behind it."""
    rests = _rests(items, rest)
    total = 0.0
    place = 0
    while place < len(items):
        op, argument = items[place]
        if op is ops.LITERAL:
            run = [code for _, code in takewhile(lambda item: item[0] is ops.LITERAL, items[place:])]
            total += reached.times * _compared(run)
            place += len(run)
            _pass_text(run, reached)
            continue
        if op is ops.AT:
            total += reached.times * ANCHOR
            _pass_anchor(argument, reached, rests[place].characters)
        else:
            total += _item_steps(op, argument, reached, rests[place])
        place += 1
    return total


def _rests(items: Sequence[Any], rest: _Rest) -> list[_Rest]:
    """Return what follows each item.

    Before an anchor, which is tested at every length of a repeat, it begins with any character.
    """
    rests: list[_Rest] = []
    for op, argument in reversed(items):
        rests.append(rest)
        if op is ops.AT:
            rest = _Rest(ALL, ANCHOR + rest.steps)
            continue
        characters, is_empty = edge_of_item(op, argument)
        steps = _refusal(op, argument)
        rest = _Rest(characters | rest.characters, steps + rest.steps) if is_empty else _Rest(characters, steps)
    return rests[::-1]


def _refusal(op: Any, argument: Any) -> float:
    """Return the steps until it is known that an item cannot begin at a position."""
    if op in REPEATS:
        body = list(argument[2])
        return REPEAT if _only_characters(body) is not None else GROUP + _refusal_of(body)
    if op is ops.BRANCH:
        parts = parts_of(op, argument)
        return BRANCH + sum(ALTERNATIVE if part and part[0][0] is ops.LITERAL else _refusal_of(part) for part in parts)
    if parts := parts_of(op, argument):
        return _refusal_of(parts[0])
    return SET if op is ops.IN else 1.0


def _refusal_of(items: Sequence[Any]) -> float:
    """Return the same of a sequence."""
    return _rests([(ops.AT, None), *items], _Rest(END, 0.0))[0].steps


def _pass_anchor(anchor: Any, reached: _Reached, follow: Characters) -> None:
    """Move `reached` behind an anchor, before which only some characters can stand."""
    before = reached.before
    if anchor in (ops.AT_BEGINNING, ops.AT_BEGINNING_STRING):
        reached.before = END
    elif anchor is ops.AT_BOUNDARY and follow <= WORD:
        reached.before = before - WORD
    elif anchor is ops.AT_BOUNDARY and not follow & WORD:
        reached.before = before & WORD
    if reached.before != before and reached.ways < float("inf"):
        reached.origin, reached.read = replace(reached, origin=None), END


def _pass_text(run: Sequence[int], reached: _Reached) -> None:
    """Move `reached` behind a plain text; runs of word characters begin after its last mark."""
    for code in run:
        own = characters_of(ops.LITERAL, code) or END
        reached.before, reached.read = own, reached.read | own
        if not own & WORD and reached.ways < float("inf"):
            reached.origin, reached.read = replace(reached, origin=None), END


def _compared(run: Sequence[int]) -> float:
    """Return the mean number of comparisons of a plain text at a position: its length over its period."""
    most = 1.0
    matched = [0]
    for place in range(1, len(run)):
        length = matched[-1]
        while length and run[place] != run[length]:
            length = matched[length - 1]
        matched.append(length + (run[place] == run[length]))
        most = max(most, (place + 1) / (place + 1 - matched[-1]))
    return most


def _item_steps(op: Any, argument: Any, reached: _Reached, rest: _Rest) -> float:
    """Return the steps of an item that is no literal, before `rest`, and move `reached` behind it."""
    own, is_empty = edge_of_item(op, argument, back=True)
    ways = reached.ways * _item_ways(op, argument, rest.characters, back=False)
    starts = reached.starts * _item_ways(op, argument, reached.before, back=True)
    if op in REPEATS:
        steps, limit = _repeat_steps(op, argument, reached, rest)
        starts = min(starts, limit)
    elif parts := parts_of(op, argument):
        ends = [replace(reached) for _ in parts]
        each = [_steps(part, end, rest) for part, end in zip(parts, ends, strict=True)]
        steps = max(each) if _are_disjoint(parts, rest.characters) else sum(each)
        steps += reached.times * (BRANCH + ALTERNATIVE * len(parts)) if op is ops.BRANCH else 0.0
        from_all = [end.starts for end in ends]
        starts = min(starts, max(from_all) if _are_disjoint(parts, reached.before, back=True) else sum(from_all))
    else:
        steps = reached.times * (SET if op is ops.IN else 1.0)
    reached.ways, reached.starts = ways, starts
    reached.before = own | (reached.before if is_empty else END)
    reached.read |= all_characters(op, argument)
    return steps


def _are_disjoint(parts: Sequence[Sequence[Any]], beyond: Characters, *, back: bool = False) -> bool:
    """Return whether at most one of the alternatives can begin, or end, with a character."""
    edges = [edge_of(part, beyond, back=back) for part in parts]
    return sum(map(len, edges)) == len(END.union(*edges))


def _limits(argument: Any) -> tuple[int, int]:
    """Return the fewest and the most repetitions on a text."""
    low = min(argument[0], MAX_TEXT)
    return low, max(low, MEAN_TEXT if argument[1] is ops.MAXREPEAT else min(argument[1], MAX_TEXT))


def _repeat_steps(op: Any, argument: Any, reached: _Reached, rest: _Rest) -> tuple[float, float]:
    """Return the steps of a repeat, and a limit of the starts that reach one position behind it."""
    low, most = _limits(argument)
    if is_last := rest.characters == END:  # nothing can fail after it, so longer ones are a part of the match
        most = low + 1
    body = list(argument[2])
    characters = _only_characters(body)
    if characters is None:
        return _group_steps(argument, most, reached, rest), float("inf")
    length = min(most, reached.length) if argument[1] is ops.MAXREPEAT else most
    # Runs with different beginnings are together no longer than the text.
    limit = reached.in_one_run(characters)
    read = (READ_SET if body[0][0] is ops.IN else READ) + (op is ops.MIN_REPEAT)
    # What follows is refused at every length, or counted later as often as it is reached.
    refused = 0.0 if is_last or characters & rest.characters else rest.steps
    return reached.times * REPEAT + min(limit, reached.times * length) * (read + refused), limit


def _only_characters(body: Sequence[Any]) -> Characters | None:
    """Return the characters of a body of one character, None for another one."""
    return characters_of(*body[0]) if len(body) == 1 else None


def _group_steps(argument: Any, most: int, reached: _Reached, rest: _Rest) -> float:
    """Return the steps of a repeat of a group, at most `most` times."""
    body = list(argument[2])
    near = edge_of(body, END) | rest.characters
    last = edge_of(body, END, back=True) | reached.before
    forward, backward = _ways(body, near), _ways(body, last, back=True)
    if has_open_repeat(body) and is_separated(body):
        forward = backward = 1.0
    if min(forward, backward) > 1 and most > MAX_GROWING:
        return float("inf")
    inside = _Reached(reached.ways * _grown(forward, most), reached.starts * _grown(backward, most), last)
    open_num: int = MEAN_TEXT // max(1, argument[2].getwidth()[0]) + 1
    num = min(most, open_num) if argument[1] is ops.MAXREPEAT else min(most, 2 * open_num)
    whole = 0.0
    if has_open_repeat(body) and argument[1] is ops.MAXREPEAT:  # the repetitions read one text after another
        inside.length, whole = 1.0, reached.times * MEAN_TEXT * READ_SET
    refused = 0.0 if inside.length == 1.0 else GROUP + _refusal_of(body) + rest.steps
    return whole + num * (inside.times * GROUP + _steps(body, inside, _Rest(near, refused)))


def _grown(ways: float, most: int) -> float:
    """Return the ways to reach the last of some repetitions."""
    if ways <= 1:
        return 1.0
    return float("inf") if most > MAX_GROWING + 1 else float(ways) ** (most - 1)


def _ways(items: Sequence[Any], beyond: Characters, *, back: bool = False) -> float:
    """Return the ways in which a sequence can match from one position, or up to one position.

    Args:
        items: the sequence.
        beyond: characters that can follow it, or stand before it.
        back: whether the end of the match is given.
    """
    total = 1.0
    for (op, argument), near in zip(items, _neighbors(items, beyond, back=back), strict=True):
        total *= _item_ways(op, argument, near, back=back)
    return total


def _neighbors(items: Sequence[Any], beyond: Characters, *, back: bool = False) -> list[Characters]:
    """Return the characters that can follow each item, or stand before it; all before an anchor.

    An anchor is tested at every length of the repeat before it.

    Args:
        items: a sequence.
        beyond: characters that can follow it, or stand before it.
        back: whether the characters before each item are meant.
    """
    found: list[Characters] = []
    is_tested = False
    for op, argument in items if back else reversed(items):
        found.append(ALL if is_tested else beyond)
        is_tested = op is ops.AT and not back
        if op is not ops.AT:
            own, is_empty = edge_of_item(op, argument, back=back)
            beyond = own | (beyond if is_empty else END)
    return found if back else found[::-1]


def _item_ways(op: Any, argument: Any, beyond: Characters, *, back: bool) -> float:
    """Return the ways of one item; see `_ways`."""
    parts = parts_of(op, argument)
    if op is ops.BRANCH:
        if all(item is ops.LITERAL for part in parts for item, _ in part):
            words = sorted([code for _, code in part][:: -1 if back else 1] for part in parts)
            return sum(a == b[: len(a)] for a, b in pairwise(words)) + 1.0
        ways = [_ways(part, beyond, back=back) for part in parts]
        return max(ways) if _are_disjoint(parts, beyond, back=back) else sum(ways)
    if op not in REPEATS:
        return _ways(parts[0], beyond, back=back) if parts else 1.0
    low, most = _limits(argument)
    body = list(argument[2])
    near = edge_of(body, END, back=back)
    lengths = most - low + 1.0 if near & beyond else 1.0
    inner = _ways(body, beyond | near, back=back)
    if inner <= 1 or (has_open_repeat(body) and is_separated(body)):
        return lengths
    most = low if beyond == END and not back else most
    return float("inf") if most > MAX_GROWING else lengths * float(inner**most)
