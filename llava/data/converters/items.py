"""What a dataset reader yields: a question with its picture, a row left out by a rule, or a row that is wrong.

official file --reader--> Item | Excluded | BadRow --output--> train.json, test.json, images/, manifest.json
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
"""What releases call their parts, and the name of the file that each becomes."""

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, slots=True)
class ConvertedItem:
    """One question about one picture.

    Attributes:
        id: identity inside the data set.
        split: one of `SPLITS`: the file it goes to.
        question: without a place holder.
        answer: text.
        image: the picture's file, or its bytes.
        image_name: its name below `images/`, with `/` between folders.
        meta: all other fields of the row, in order; those that are None or empty are not written.
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
        """Return this row as one that cannot be used."""
        return BadRow(*self.origin, self.id, reason)


@dataclass(frozen=True, slots=True)
class Excluded:
    """A row that the data set's own rules leave out; `cause` is counted in the manifest."""

    split: str
    cause: str


Event = ConvertedItem | Excluded | BadRow


def kind_of_answer(given: str | None, answer: str) -> str:
    """Return OPEN or CLOSED: as the release says (in any of the known words), else by whether the answer is yes or no.

    Raises:
        DataError: the release's word is unknown.
    """
    return "CLOSED" if is_closed(given or None, answer) else "OPEN"


def make_row(item: ConvertedItem) -> dict[str, Any]:
    """Return the row of an item in the LLaVA layout.

    Raises:
        DataError: question or answer is empty, or holds the image place holder.
    """
    for name, text in (("question", item.question), ("answer", item.answer)):
        if not text:
            raise DataError(f"the {name} is empty")
        if IMAGE_TOKEN in text:
            raise DataError(f"the {name} holds {IMAGE_TOKEN!r}, which stands for a picture; take it out")
    turns = [
        {"from": "human", "value": f"{IMAGE_TOKEN}\n{item.question}"},
        {"from": "gpt", "value": item.answer},
    ]
    meta = {name: value for name, value in item.meta.items() if value not in (None, "", [], {})}
    return {"id": item.id, "image": item.image_name, "conversations": turns, **meta}
