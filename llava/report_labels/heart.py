"""Size of heart and mediastinum: which organs a sentence names, and in which state.

    sentence --> organs and states in order --> groups of organs with the states before and after them --> values

`Normal heart size, stable mediastinal contours`: a state directly before an organ belongs to it, other states belong to
the organs before them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from llava.report_labels.cues import HEART, MEDIASTINUM, NOT_HEART, NOT_MEDIASTINUM, OTHER_ORGANS, STATE_PATTERN
from llava.report_labels.findings import NEGATIVE, POSITIVE, UNCERTAIN
from llava.report_labels.scopes import Scopes

_ORGANS = {"Cardiomegaly": (HEART, NOT_HEART), "Enlarged Cardiomediastinum": (MEDIASTINUM, NOT_MEDIASTINUM)}
_MODIFIERS = re.compile(
    r"(?:[\s-]*\b(?!is\b|are\b|with\b|and\b|but\b|appears?\b|in\b|for\b)[\w-]+){0,3}[\s-]*"
    r"(?:size and |and (?:size|contours?|shape|configuration|appearance)\s+)?(?:of the |of |in the )?\s*"
)
_SEPARATOR = re.compile(r",|;|:|\b(?:and|with|but|shows?|demonstrates?|reveals?)\b")
_VERB = re.compile(r"\b(?:is|are|was|were|appears?|remains?|demonstrates?|shows?|measures?|has|have)\b")
_OTHER_STATEMENT = re.compile(r"\b(?:with|but|without|over\w*|suggest\w*|represent\w*)\b")


@dataclass(slots=True)
class _Item:
    """Organ or state in a sentence."""

    kind: str
    start: int
    end: int


@dataclass(slots=True)
class _Group:
    """Neighboring organs, and the states that belong to them."""

    organs: list[_Item] = field(default_factory=list)
    states: list[_Item] = field(default_factory=list)


def heart_values(sentence: str, scopes: Scopes) -> Iterator[tuple[str, int, int, int, str]]:
    """Yield finding, value, start, end and cue of each statement about the size of heart or mediastinum."""
    items = _items(sentence)
    if not any(item.kind in _ORGANS for item in items):
        return
    for group in _groups(sentence, items):
        named = [organ for organ in group.organs if organ.kind in _ORGANS]
        if not named or not group.states:
            continue
        value, state = _value(sentence, group.states, scopes)
        if value is None:
            continue
        value, state = (UNCERTAIN, "?") if scopes.is_question else (value, state)
        for organ in named:
            yield organ.kind, value, organ.start, organ.end, state


def _items(sentence: str) -> list[_Item]:
    found: list[_Item] = []
    for finding, (organ, not_organ) in _ORGANS.items():
        spans = organ.spans(sentence)
        blocked = not_organ.spans(sentence) if spans else []
        for start, end in spans:
            if any(low < end and start < high for low, high in blocked):
                continue
            found.append(_Item(finding, start, end))
            if sentence[start:end] == "cardiac and mediastinal":
                found.append(_Item("Enlarged Cardiomediastinum", start, end))
    if not found:
        return []
    for match in STATE_PATTERN.finditer(sentence):
        found.append(_Item(str(match.lastgroup), match.start(), match.end()))
    taken = [(item.start, item.end) for item in found]
    for start, end in OTHER_ORGANS.spans(sentence):
        if not any(low < end and start < high for low, high in taken):
            found.append(_Item("other", start, end))
    return sorted(found, key=lambda item: (item.start, item.end))


def _is_organ(item: _Item) -> bool:
    return item.kind == "other" or item.kind in _ORGANS


def _groups(sentence: str, items: list[_Item]) -> list[_Group]:
    """Return groups of organs with their states."""
    groups: list[_Group] = []
    waiting: list[_Item] = []  # states since the last organ
    last_organ: _Item | None = None
    for index, item in enumerate(items):
        if not _is_organ(item):
            waiting.append(item)
            continue
        before = _states_before(sentence, waiting, item, last_organ)
        after = waiting[: len(waiting) - len(before)]
        if groups:
            groups[-1].states += after
        joined = last_organ is not None and not waiting and not _parts(sentence[last_organ.end : item.start])
        if joined and last_organ is not None and groups[-1].states:
            joined = not _starts_statement(sentence, last_organ, item, items[index + 1 :])
        if not joined:
            groups.append(_Group(states=list(before)))
        groups[-1].organs.append(item)
        waiting, last_organ = [], item
    if groups:
        groups[-1].states += waiting
    return groups


def _parts(between: str) -> bool:
    """Return whether the words between two organs end the first statement."""
    return _VERB.search(between) is not None or _OTHER_STATEMENT.search(between) is not None


def _starts_statement(sentence: str, last: _Item, organ: _Item, later: list[_Item]) -> bool:
    """Return whether an organ after a comma has its own verb: `large heart, mediastinum appears ...`."""
    between = sentence[last.end : organ.start]
    if "," not in between or re.search(r"\band\b", between) or not later or _is_organ(later[0]):
        return False
    return _VERB.search(sentence[organ.end : later[0].start]) is not None


def _states_before(sentence: str, waiting: list[_Item], organ: _Item, last: _Item | None) -> list[_Item]:
    """Return the last states that belong to the organ after them."""
    if not waiting:
        return []
    count, right = 0, organ.start
    for state in reversed(waiting):
        between = sentence[state.end : right]
        if not (_MODIFIERS.fullmatch(between) or (count and re.fullmatch(r",?\s*(?:and|but|or)?\s*", between))):
            break
        count, right = count + 1, state.start
    states = waiting[len(waiting) - count :]
    if last is None or not states:
        return states
    # A state in the same clause as an earlier organ belongs to that organ: "the heart is normal in size ...".
    while states:
        between = sentence[last.end : states[0].start]
        separators = list(_SEPARATOR.finditer(between))
        if separators and _VERB.search(between[separators[-1].end() :]) is None:
            return states
        states = states[1:]
    return states


def _value(sentence: str, states: list[_Item], scopes: Scopes) -> tuple[int | None, str]:
    """Return the value that states give, and the words of the deciding one."""
    kinds: dict[str, _Item] = {}
    for state in states:
        kind = state.kind
        if kind == "enlarged":
            value, _ = scopes.assess(state.start, state.end, [])
            kind = {POSITIVE: "enlarged", NEGATIVE: "normal", UNCERTAIN: "borderline"}[value]
        kinds.setdefault(kind, state)
    for kind, value in (("enlarged", POSITIVE), ("borderline", UNCERTAIN), ("normal", NEGATIVE), ("stable", UNCERTAIN)):
        if kind in kinds:
            state = kinds[kind]
            return value, sentence[state.start : state.end]
    return None, ""
