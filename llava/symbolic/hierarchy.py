"""Drawing of a rule set: a column of values per node, and lines between values on a valid path."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from llava.symbolic.rubric import compatible
from llava.symbolic.structure import RuleSet

COLUMN, ROW, TOP = 170, 38, 40
"""Distance of columns and of rows, and height of the headings, in pixels."""

WIDTH, HEIGHT = 136, 28
"""Size of a box in pixels."""

MAX_LETTERS = 18
"""Maximum number of characters in a box; longer texts are cut there and complete in the tables below."""


@dataclass(frozen=True, slots=True)
class ValueBox:
    """Value of a node; `left`, `top` and the middle of the text in pixels."""

    text: str
    left: int
    top: int
    abstains: bool

    @property
    def middle(self) -> int:
        """Baseline of the text."""
        return self.top + HEIGHT // 2 + 5


@dataclass(frozen=True, slots=True)
class Link:
    """Line between two boxes."""

    x1: int
    y1: int
    x2: int
    y2: int


@dataclass(frozen=True, slots=True)
class HierarchyDrawing:
    """Size in pixels, headings (text, left), boxes and lines of a hierarchy."""

    width: int
    height: int
    headings: list[tuple[str, int]]
    boxes: list[ValueBox]
    lines: list[Link]


def draw_hierarchy(rules: RuleSet) -> HierarchyDrawing:
    """Return the drawing of a rule set."""
    tallest = max(len(node.values) for node in rules.nodes)
    boxes: dict[tuple[str, str], ValueBox] = {}
    for column, node in enumerate(rules.nodes):
        first = TOP + (tallest - len(node.values)) * ROW // 2
        for row, value in enumerate(node.values):
            boxes[node.id, value] = ValueBox(shown(value), column * COLUMN, first + row * ROW, value == node.abstain)
    lines = [
        Link(start.left + WIDTH, start.top + HEIGHT // 2, end.left, end.top + HEIGHT // 2)
        for before, after in pairwise(rules.nodes)
        for here in before.values
        for there in after.values
        if compatible(rules, (before.id, here), (after.id, there))
        for start, end in [(boxes[before.id, here], boxes[after.id, there])]
    ]
    headings = [(shown(node.id), column * COLUMN) for column, node in enumerate(rules.nodes)]
    width = (len(rules.nodes) - 1) * COLUMN + WIDTH
    return HierarchyDrawing(width + 2, TOP + tallest * ROW, headings, list(boxes.values()), lines)


def shown(name: str) -> str:
    """Return a name as the drawing shows it: with spaces, cut to `MAX_LETTERS`."""
    text = plain(name)
    return text if len(text) <= MAX_LETTERS else text[: MAX_LETTERS - 3] + "..."


def plain(name: str) -> str:
    """Return the name of a node or value with spaces for underscores."""
    return name.replace("_", " ")
