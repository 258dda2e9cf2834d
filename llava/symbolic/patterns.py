"""Regular expressions of untrusted files; refused if possibly slow on `MAX_TEXT` characters."""

from __future__ import annotations

import re
from collections.abc import Sequence
from re import _constants as ops  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any

from llava.errors import DataError
from llava.symbolic.pattern_sets import REPEATS, has_open_repeat, is_separated, parts_of
from llava.symbolic.pattern_steps import MAX_STEPS, pattern_steps

MAX_PATTERN = 500
"""Maximum length of a pattern in characters."""

MAX_DEPTH = 20
"""Maximum nesting depth of groups and repeats."""

REMEDY = r"begin it with \b where a word begins, use fewer open repeats, or bounded ones such as {0,40}"
"""How to make a pattern cheaper, for messages."""

REFUSED = {
    ops.ASSERT: "look-around is not allowed",
    ops.ASSERT_NOT: "look-around is not allowed",
    ops.GROUPREF: "back-references are not allowed",
    ops.GROUPREF_EXISTS: "back-references are not allowed",
}


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
        _refuse(list(tree), tree.state.flags)
        if not pattern_steps(pattern) <= MAX_STEPS:
            raise DataError(f"it could take too long; {REMEDY}")
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


def _refuse(items: Sequence[Any], flags: int, depth: int = 0) -> None:
    """Raise if a pattern uses what is not allowed; `flags` are those that it turns on at this place."""
    if depth > MAX_DEPTH:
        raise DataError(f"nested more than {MAX_DEPTH} levels deep")
    if flags & re.ASCII:  # bounds of the steps hold for classes of all characters
        raise DataError("the flag a is not allowed")
    for op, argument in items:
        if op in REFUSED:
            raise DataError(REFUSED[op])
        if op in REPEATS:
            body = list(argument[2])
            if argument[1] is ops.MAXREPEAT and has_open_repeat(body) and not is_separated(body):
                raise DataError("nested repeats without upper bound are not allowed")
            _refuse(body, 0, depth + 1)
        for part in parts_of(op, argument):
            _refuse(part, argument[1] if op is ops.SUBPATTERN else 0, depth + 1)
