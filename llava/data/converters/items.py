"""Events of a dataset converter: a question with its image, an excluded row, or an invalid row.

official file --converter--> ConvertedItem | Excluded | BadRow --output--> train.json, test.json, images/, manifest.json
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.constants import IMAGE_TOKEN
from llava.data.quarantine import BadRow
from llava.errors import DataError
from llava.samples import Origin
from llava.scoring.decisions import is_closed

SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validate": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
"""Split names of the releases to the names of our files."""

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, slots=True)
class ConvertedItem:
    """One question about one image.

    Attributes:
        id: id within the dataset.
        split: one of `SPLITS`: the output file.
        question: text without an image placeholder.
        answer: text.
        image: path or bytes of the image file.
        image_name: name below `images/`, with `/` between folders.
        meta: all other fields of the row, in order; values that are None or empty are not written.
        origin: file and row that it was read from.
    """

    id: str
    split: str
    question: str
    answer: str
    image: Path | bytes
    image_name: str
    meta: Mapping[str, Any]
    origin: Origin

    def problem(self, reason: str) -> BadRow:
        """Return a `BadRow` for this item."""
        return BadRow(*self.origin, self.id, reason)


@dataclass(frozen=True, slots=True)
class Excluded:
    """A row that a rule of the dataset excludes; the manifest counts each `cause`."""

    split: str
    cause: str


Event = ConvertedItem | Excluded | BadRow


def kind_of_answer(given: str | None, answer: str) -> str:
    """Return OPEN or CLOSED from the answer type of the release or, without one, from the answer.

    Raises:
        DataError: the answer type of the release is unknown.
    """
    return "CLOSED" if is_closed(given or None, answer) else "OPEN"


def make_row(item: ConvertedItem) -> dict[str, Any]:
    """Return an item as a row in LLaVA format.

    Raises:
        DataError: question or answer is empty or contains the image placeholder.
    """
    for name, text in (("question", item.question), ("answer", item.answer)):
        if not text:
            raise DataError(f"the {name} is empty")
        if IMAGE_TOKEN in text:
            raise DataError(f"the {name} contains the image placeholder {IMAGE_TOKEN!r}; remove it")
    turns = [
        {"from": "human", "value": f"{IMAGE_TOKEN}\n{item.question}"},
        {"from": "gpt", "value": item.answer},
    ]
    meta = {name: value for name, value in item.meta.items() if value not in (None, "", [], {})}
    return {"id": item.id, "image": item.image_name, "conversations": turns, **meta}
