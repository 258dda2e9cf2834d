"""Typed access to the parts of a rule file that collects all problems with their lines."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field

from llava.symbolic.document import Item
from llava.symbolic.expressions import as_number

SLUG = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
"""Names of files, nodes and constraints."""

TRUTH = {"true": True, "false": False}


@dataclass(slots=True)
class Problems:
    """Errors of a file: pairs of a line and a message."""

    found: list[tuple[int, str]] = field(default_factory=list)

    def add(self, item: Item | int, message: str) -> None:
        """Add an error at the line of an item."""
        self.found.append((item if isinstance(item, int) else item.line, message))

    def map(self, item: Item, what: str, known: Collection[str] = ()) -> dict[str, Item]:
        """Return a map; keys outside `known`, if it is given, are errors."""
        if not isinstance(item.value, dict):
            self.add(item, f"{what}: expected a map, got {kind(item)}")
            return {}
        if known:
            for key in item.value.keys() - set(known):
                self.add(item.key_lines[key], f"{what}: unknown key {key!r}; known: {', '.join(known)}")
        return item.value

    def list(self, item: Item, what: str) -> list[Item]:
        """Return a list."""
        if not isinstance(item.value, list):
            self.add(item, f"{what}: expected a list, got {kind(item)}")
            return []
        return item.value

    def text(self, item: Item, what: str) -> str:
        """Return a text that is not empty."""
        if not isinstance(item.value, str) or not item.value.strip():
            self.add(item, f"{what}: expected a text, got {kind(item)}")
            return ""
        return item.value

    def slug(self, item: Item, what: str) -> str:
        """Return a name of letters, digits, `_`, `-` and `.`."""
        text = self.text(item, what)
        if text and not SLUG.fullmatch(text):
            self.add(item, f"{what}: {text[:80]!r} is not a name; use at most 64 letters, digits, _ - .")
        return text

    def choice(self, item: Item, what: str, known: Collection[str]) -> str:
        """Return one of the known texts."""
        text = self.text(item, what)
        if text and text not in known:
            self.add(item, f"{what}: unknown {text[:80]!r}; known: {', '.join(known)}")
            return ""
        return text

    def choices(self, item: Item, what: str, known: Collection[str]) -> tuple[str, ...]:
        """Return one known text, or a list of them, as a tuple."""
        items = item.value if isinstance(item.value, list) else [item]
        if not items:
            self.add(item, f"{what}: the list is empty")
        return tuple(text for part in items if (text := self.choice(part, what, known)))

    def texts(self, item: Item, what: str) -> tuple[str, ...]:
        """Return a list of texts as a tuple."""
        return tuple(text for part in self.list(item, what) if (text := self.text(part, what)))

    def truth(self, item: Item, what: str) -> bool:
        """Return true or false."""
        if not isinstance(item.value, str) or not item.plain or item.value.lower() not in TRUTH:
            self.add(item, f"{what}: expected true or false, got {kind(item)}")
            return False
        return TRUTH[item.value.lower()]

    def number(self, item: Item, what: str, low: float = -1e6, high: float = 1e6) -> float:
        """Return a number between two limits."""
        number = as_number(item.value) if item.plain else None
        if number is None or not low <= number <= high:
            self.add(item, f"{what}: expected a number from {low:g} to {high:g}, got {kind(item)}")
            return low
        return number

    def whole(self, item: Item, what: str, low: int, high: int) -> int:
        """Return a whole number between two limits."""
        number = self.number(item, what, low, high)
        if number != int(number):
            self.add(item, f"{what}: expected a whole number, got {number:g}")
        return int(number)


def kind(item: Item) -> str:
    """Return a short description of an item for messages."""
    if item.value is None:
        return "nothing"
    if isinstance(item.value, str):
        return repr(item.value[:80])
    return "a list" if isinstance(item.value, list) else "a map"
