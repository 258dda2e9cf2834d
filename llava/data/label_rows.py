"""Rows of single answers labeled good or bad: layouts of TRL, LLaMA-Factory, ms-swift and llava."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llava.data.preference_formats import conversation_of, is_preference_row
from llava.errors import DataError
from llava.samples import CONVERSATION_KEYS, Sample, type_and_length

LABEL_FIELDS = ("label", "kto_tag", "desirable")
"""Fields with the label of a row: those of TRL and ms-swift, LLaMA-Factory, and this project."""


@dataclass(frozen=True, slots=True)
class Labeled:
    """Answer with a label.

    Attributes:
        sample: whole conversation with the answer.
        desirable: whether the answer is a good one.
        weight: factor of the loss of this answer.
    """

    sample: Sample
    desirable: bool
    weight: float = 1.0


def is_labeled_row(row: Any) -> bool:
    """Return whether a row is a single answer with a label."""
    # Other rows may also have a field `label`, such as the class of an image.
    fields = {"completion", "messages", *CONVERSATION_KEYS}
    if not isinstance(row, Mapping) or is_preference_row(row) or not fields & row.keys():
        return False
    return _field(row) is not None


def _field(row: Mapping[str, Any]) -> str | None:
    """Return the field with the label.

    Beside a conversation, a text or a number is a class and not a label.
    """
    found = [name for name in LABEL_FIELDS if name in row]
    names = [name for name in found if isinstance(row[name], bool)] + (found if "completion" in row else [])
    return next(iter(names), None)


def read_label(row: Any, *, default_id: str) -> Labeled:
    """Return the answer of a row and its label.

    Args:
        row: the decoded JSON object: `label`, `kto_tag` or `desirable` (true or false), and `prompt` and `completion`,
            `messages`, or `conversations`.
        default_id: id of a row without one.

    Raises:
        DataError: the row is of another kind, or a field is invalid.
    """
    name = _field(row) if is_labeled_row(row) else None
    if name is None:
        raise DataError(f"not a labeled answer: expected one of {', '.join(LABEL_FIELDS)}, true or false, in each row")
    label = row[name]
    if not isinstance(label, bool):
        raise DataError(f"field {name!r} must be true or false, got {type_and_length(label)}")
    sample, weight = conversation_of(row, default_id=default_id)
    return Labeled(sample, label, weight)
