"""Characters that the parts of a parsed regular expression match, and with which they begin and end."""

from __future__ import annotations

import re
from collections.abc import Sequence
from re import _constants as ops  # type: ignore[attr-defined]
from typing import Any

Characters = frozenset[int]
"""Set of character codes."""

OTHER_WORD, OTHER_MARK = 256, 257
"""Stand for the characters above U+00FF in a set: those that `\\w` matches, and the others."""

OTHERS = frozenset({OTHER_WORD, OTHER_MARK})
ALL = frozenset(range(OTHER_MARK + 1))
END: Characters = frozenset()

REPEATS = (ops.MAX_REPEAT, ops.MIN_REPEAT, ops.POSSESSIVE_REPEAT)


def _class(pattern: str, *others: int) -> Characters:
    """Return the characters of a class, with the given ones above U+00FF."""
    return frozenset({code for code in range(OTHER_WORD) if re.match(pattern, chr(code))} | set(others))


WORD = _class(r"\w", OTHER_WORD)
"""Letters, digits and `_`."""

CLASSES: dict[Any, tuple[Characters, Characters]] = {
    ops.CATEGORY_WORD: (WORD, frozenset({OTHER_WORD})),
    ops.CATEGORY_NOT_WORD: (ALL - WORD, frozenset({OTHER_MARK})),
    ops.CATEGORY_DIGIT: (_class(r"\d", OTHER_WORD), END),
    ops.CATEGORY_NOT_DIGIT: (_class(r"\D", *OTHERS), frozenset({OTHER_MARK})),
    ops.CATEGORY_SPACE: (_class(r"\s", OTHER_MARK), END),
    ops.CATEGORY_NOT_SPACE: (_class(r"\S", *OTHERS), frozenset({OTHER_WORD})),
}
"""Characters of a class, and those above U+00FF of which it has all, so that its negation has none."""


def parts_of(op: Any, argument: Any) -> list[list[Any]]:
    """Return the sequences inside of an item that is no repeat."""
    if op is ops.BRANCH:
        return [list(part) for part in argument[1]]
    if op is ops.SUBPATTERN:
        return [list(argument[3])]
    if op is ops.ATOMIC_GROUP:
        return [list(argument)]
    return []


def has_open_repeat(items: Sequence[Any]) -> bool:
    """Return whether a sequence has a repeat without upper bound."""
    for op, argument in items:
        if op in REPEATS and (argument[1] is ops.MAXREPEAT or has_open_repeat(list(argument[2]))):
            return True
        if any(has_open_repeat(part) for part in parts_of(op, argument)):
            return True
    return False


def is_separated(body: Sequence[Any]) -> bool:
    """Return whether each repetition is a separator, then one repeat of characters without it: `( \\w+)*`."""
    items = _flat(body)
    if len(items) < 2 or characters_of(*items[0]) is None:
        return False
    separator = characters_of(*items[0]) or END
    for op, argument in items[1:]:
        inner = list(argument[2]) if op in REPEATS else [(op, argument)]
        characters = characters_of(*inner[0]) if len(inner) == 1 else None
        if characters is None or characters & separator:
            return False
    return sum(op in REPEATS and argument[1] is ops.MAXREPEAT for op, argument in items) == 1


def _flat(items: Sequence[Any]) -> list[Any]:
    """Return the items of a sequence without the groups around them."""
    flat: list[Any] = []
    for op, argument in items:
        flat += _flat(list(argument[3])) if op is ops.SUBPATTERN else [(op, argument)]
    return flat


def characters_of(op: Any, argument: Any) -> Characters | None:
    """Return the characters that an item of one character matches, None for other items."""
    if op is ops.LITERAL:
        return _both_cases(argument)
    if op is ops.NOT_LITERAL:
        return ALL - _both_cases(argument) | OTHERS
    if op is ops.ANY:
        return ALL
    if op is not ops.IN:
        return None
    negated = bool(argument) and argument[0][0] is ops.NEGATE
    found: Characters = END
    whole: Characters = END
    for kind, value in argument:
        if kind is ops.LITERAL:
            found |= _both_cases(value)
        elif kind is ops.RANGE:
            low, high = value
            found = found.union(*map(_both_cases, range(low, min(high, OTHER_WORD - 1) + 1)))
            found |= OTHERS if high >= OTHER_WORD else END
        elif kind is ops.CATEGORY:
            some, every = CLASSES.get(value, (ALL, END))
            found, whole = found | some, whole | every
    return (ALL - found) | (OTHERS - whole) if negated else found


def _both_cases(code: int) -> Characters:
    letter = chr(code)
    return codes_of("".join(form for form in (letter, letter.lower(), letter.upper()) if len(form) == 1))


def codes_of(text: str) -> Characters:
    """Return the characters of a text."""
    codes = {ord(letter) for letter in text}
    others = {OTHER_WORD if re.match(r"\w", chr(code)) else OTHER_MARK for code in codes if code >= OTHER_WORD}
    return frozenset({code for code in codes if code < OTHER_WORD} | others)


def edge_of(items: Sequence[Any], beyond: Characters, *, back: bool = False) -> Characters:
    """Return the characters with which a match of a sequence can begin, or end.

    Args:
        items: the sequence.
        beyond: characters that can stand there if the sequence matches nothing.
        back: whether the last characters are meant.
    """
    found: Characters = END
    for op, argument in reversed(items) if back else items:
        if op is ops.AT:
            continue
        own, is_empty = edge_of_item(op, argument, back=back)
        found |= own
        if not is_empty:
            return found
    return found | beyond


def edge_of_item(op: Any, argument: Any, *, back: bool = False) -> tuple[Characters, bool]:
    """Return the first or last characters of one item, and whether it can match nothing."""
    characters = characters_of(op, argument)
    if characters is not None:
        return characters, False
    marker = frozenset({-1})
    bodies = [list(argument[2])] if op in REPEATS else parts_of(op, argument)
    if not bodies:
        return ALL, True
    found = END.union(*(edge_of(body, marker, back=back) for body in bodies))
    is_empty = -1 in found or (op in REPEATS and argument[0] == 0)
    return found - marker, is_empty


def all_characters(op: Any, argument: Any) -> Characters:
    """Return the characters that a match of an item can contain."""
    characters = characters_of(op, argument)
    if characters is not None:
        return characters
    bodies = [list(argument[2])] if op in REPEATS else parts_of(op, argument)
    return END.union(*(all_characters(*item) for body in bodies for item in body if item[0] is not ops.AT))
