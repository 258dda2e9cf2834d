"""Regular expressions of untrusted files; refused if possibly slow on `MAX_TEXT` characters.

Python's engine backtracks, so the number of ways in which a pattern can begin at one position is bounded beforehand: a
repeat has one way if what follows cannot begin with what it repeats, else as many as it has lengths.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from re import _constants as ops  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any

from llava.errors import DataError

MAX_TEXT = 4000
"""Characters of a text that are read."""

MAX_PATTERN = 500
"""Maximum length of a pattern in characters."""

MAX_WAYS = 2 * MAX_TEXT
"""Maximum number of ways to begin at one position; one repeat without an upper bound is allowed to have all lengths."""

OTHER = 256
"""Stands for every character above U+00FF in a set of characters."""

ALL = frozenset(range(OTHER + 1))
END = frozenset[int]()

REPEATS = (ops.MAX_REPEAT, ops.MIN_REPEAT, ops.POSSESSIVE_REPEAT)
REFUSED = {
    ops.ASSERT: "look-around is not allowed",
    ops.ASSERT_NOT: "look-around is not allowed",
    ops.GROUPREF: "back-references are not allowed",
    ops.GROUPREF_EXISTS: "back-references are not allowed",
}
CATEGORIES = {ops.CATEGORY_DIGIT: r"\d", ops.CATEGORY_SPACE: r"\s", ops.CATEGORY_WORD: r"\w"}
NOT_CATEGORIES = {ops.CATEGORY_NOT_DIGIT: r"\D", ops.CATEGORY_NOT_SPACE: r"\S", ops.CATEGORY_NOT_WORD: r"\W"}


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Return a compiled pattern, which ignores case.

    Raises:
        DataError: the pattern is too long, does not compile, or uses look-around, back-references, nested repeats
            without upper bound, or repeats that could take long.
    """
    if len(pattern) > MAX_PATTERN:
        raise DataError(f"pattern of {len(pattern)} characters; at most {MAX_PATTERN} are allowed")
    try:
        tree = _parser.parse(pattern, re.IGNORECASE)
        _refuse(list(tree), inside=False)
        ways = _ways(list(tree), END)
        if ways > MAX_WAYS:
            raise DataError("it could take too long; use fewer open repeats, or bounded ones such as {0,40}")
        # Texts are in lower case; without the flag the engine can search for the first letters of a pattern.
        cased = re.sub(r"\\.", "", pattern) != re.sub(r"\\.", "", pattern).lower()
        return re.compile(pattern, re.IGNORECASE if cased else 0)
    except (re.error, OverflowError, RecursionError, ValueError) as error:
        problem = str(error) if isinstance(error, DataError) else f"does not compile: {error}"
        raise DataError(f"pattern {pattern!r}: {problem}") from None


def required_texts(pattern: str) -> frozenset[str]:
    """Return lower-case texts of which every match of a pattern contains one; empty if unknown."""
    return _required(list(_parser.parse(pattern, re.IGNORECASE)))


def _required(items: Sequence[Any]) -> frozenset[str]:
    """Return the required texts of a sequence: those of the part whose shortest one is longest."""
    parts: list[frozenset[str]] = []
    run = ""
    for op, argument in [*items, (None, None)]:
        if op is ops.LITERAL and argument < 128:
            run += chr(argument).lower()
            continue
        if op is ops.AT:  # it has no width, so the characters around it are adjacent
            continue
        parts.append(frozenset({run} if run else ()))
        run = ""
        if op is ops.SUBPATTERN:
            parts.append(_required(list(argument[3])))
        elif op in REPEATS and argument[0] > 0:
            parts.append(_required(list(argument[2])))
        elif op is ops.BRANCH:
            branches = [_required(list(part)) for part in argument[1]]
            parts.append(frozenset().union(*branches) if all(branches) else frozenset())
    return max(parts, key=lambda texts: min(map(len, texts), default=0), default=frozenset())


def _refuse(items: Sequence[Any], *, inside: bool) -> None:
    """Raise if a pattern uses what is not allowed; `inside` an unbounded repeat."""
    for op, argument in items:
        if op in REFUSED:
            raise DataError(REFUSED[op])
        if op in REPEATS:
            unbounded = argument[1] is ops.MAXREPEAT
            body = list(argument[2])
            if unbounded and _has_open_repeat(body) and not _is_separated(body):
                raise DataError("nested repeats without upper bound are not allowed")
            _refuse(body, inside=inside or unbounded)
        else:
            for part in _parts(op, argument):
                _refuse(part, inside=inside)


def _parts(op: Any, argument: Any) -> list[list[Any]]:
    """Return the sequences inside of an item that is no repeat."""
    if op is ops.BRANCH:
        return [list(part) for part in argument[1]]
    if op is ops.SUBPATTERN:
        return [list(argument[3])]
    if op is ops.ATOMIC_GROUP:
        return [list(argument)]
    return []


def _has_open_repeat(items: Sequence[Any]) -> bool:
    for op, argument in items:
        if op in REPEATS and (argument[1] is ops.MAXREPEAT or _has_open_repeat(list(argument[2]))):
            return True
        if any(_has_open_repeat(part) for part in _parts(op, argument)):
            return True
    return False


def _is_separated(body: Sequence[Any]) -> bool:
    """Return whether each repetition is a separator, then one repeat of characters without it: `( \\w+)*`."""
    items = _flat(body)
    if len(items) < 2 or _characters(*items[0]) is None:
        return False
    separator = _characters(*items[0]) or END
    for op, argument in items[1:]:
        inner = list(argument[2]) if op in REPEATS else [(op, argument)]
        characters = _characters(*inner[0]) if len(inner) == 1 else None
        if characters is None or characters & separator:
            return False
    return sum(op in REPEATS and argument[1] is ops.MAXREPEAT for op, argument in items) == 1


def _flat(items: Sequence[Any]) -> list[Any]:
    """Return the items of a sequence without the groups around them."""
    flat: list[Any] = []
    for op, argument in items:
        flat += _flat(list(argument[3])) if op is ops.SUBPATTERN else [(op, argument)]
    return flat


def _characters(op: Any, argument: Any) -> frozenset[int] | None:
    """Return the characters that an item of one character matches, None for other items."""
    if op is ops.LITERAL:
        return _both_cases(argument)
    if op is ops.NOT_LITERAL:
        return ALL - _both_cases(argument) | {OTHER}
    if op is ops.ANY:
        return ALL
    if op is not ops.IN:
        return None
    negated = bool(argument) and argument[0][0] is ops.NEGATE
    found: set[int] = set()
    for kind, value in argument:
        if kind is ops.LITERAL:
            found |= _both_cases(value)
        elif kind is ops.RANGE:
            low, high = value
            found |= {code for n in range(low, min(high, OTHER - 1) + 1) for code in _both_cases(n)}
            found |= {OTHER} if high >= OTHER else set()
        elif kind is ops.CATEGORY:
            text = {**CATEGORIES, **NOT_CATEGORIES}.get(value)
            found |= ALL if text is None else {n for n in range(OTHER) if re.match(text, chr(n))} | {OTHER}
    return frozenset(ALL - found | {OTHER}) if negated else frozenset(found)


def _both_cases(code: int) -> frozenset[int]:
    letter = chr(code)
    codes = {ord(form) for form in (letter, letter.lower(), letter.upper()) if len(form) == 1}
    return frozenset(min(c, OTHER) for c in codes)


def _first(items: Sequence[Any], follow: frozenset[int]) -> frozenset[int]:
    """Return the characters with which a match of the items, or what follows them, can begin."""
    found: frozenset[int] = END
    for op, argument in items:
        if op is ops.AT:
            continue
        first, empty = _first_of(op, argument)
        found |= first
        if not empty:
            return found
    return found | follow


def _first_of(op: Any, argument: Any) -> tuple[frozenset[int], bool]:
    """Return the first characters of one item, and whether it can match nothing."""
    characters = _characters(op, argument)
    if characters is not None:
        return characters, False
    marker = frozenset({-1})
    bodies = [list(argument[2])] if op in REPEATS else _parts(op, argument)
    if not bodies:
        return ALL, True
    first = frozenset[int]().union(*(_first(body, marker) for body in bodies))
    empty = -1 in first or (op in REPEATS and argument[0] == 0)
    return first - marker, empty


def _ways(items: Sequence[Any], follow: frozenset[int]) -> float:
    """Return an upper bound of the ways in which the items can match from one position."""
    total = 1.0
    for index, (op, argument) in enumerate(items):
        rest = list(items[index + 1 :])
        after = _first(rest, follow)
        # Before a zero-width assertion, even a final repeat may be retried with other lengths.
        tested = any(op is ops.AT for op, _ in rest[:1])
        if op in REPEATS:
            total *= _repeat_ways(argument, ALL if tested else after)
        elif op is ops.BRANCH:
            total *= _branch_ways([list(part) for part in argument[1]], after)
        else:
            for part in _parts(op, argument):
                total *= _ways(part, ALL if tested and part and part[-1][0] in REPEATS else after)
        if total > 1e12:
            return float("inf")
    return total


def _repeat_ways(argument: Any, after: frozenset[int]) -> float:
    low, high, body = argument[0], argument[1], list(argument[2])
    first = _first(body, END)
    lengths = MAX_TEXT if high is ops.MAXREPEAT else min(high, MAX_TEXT) - min(low, MAX_TEXT) + 1
    choices = float(lengths) if first & after else 1.0
    inner = _ways(body, after | first)
    if _has_open_repeat(body) and _is_separated(body):
        inner = 1.0
    if inner <= 1:
        return choices
    steps = MAX_TEXT if high is ops.MAXREPEAT else min(high, MAX_TEXT)
    return float("inf") if steps > 40 else choices * inner**steps


def _branch_ways(parts: list[list[Any]], after: frozenset[int]) -> float:
    """Return the ways of alternatives.

    Those of one if at most one can begin at a position, else their sum.
    """
    words = [tuple(argument for _, argument in part) for part in parts]
    literal = all(op is ops.LITERAL for part in parts for op, _ in part)
    if literal:
        ordered = sorted(words)
        return sum(a == b[: len(a)] for a, b in pairwise(ordered)) + 1.0
    ways = [_ways(part, after) for part in parts]
    firsts = [_first(part, after) for part in parts]
    disjoint = sum(map(len, firsts)) == len(frozenset[int]().union(*firsts))
    return max(ways) if disjoint else sum(ways)
