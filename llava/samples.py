"""Sample, the record that all parts of the package share: one conversation about zero or more images.

    row of a JSON file  --from_row-->  Sample  --to_row-->  row of a JSON file

The JSON format is that of LLaVA: `id`, `image` (one name or a list, also read from `images`) and `conversations` (a
list of `{"from": "human" | "gpt", "value": text}`); all other fields of a row are kept in `Sample.meta`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from llava.constants import IMAGE_TOKEN
from llava.errors import DataError

Role = Literal["human", "gpt"]

ROLES: dict[str, Role] = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "vuser": "human"}
"""Role by its name in data files."""

ASKING_ROLE = "vuser"
"""Name of the role of a question that the model learns to ask."""

CONVERSATION_KEYS = ("conversations", "conversatons")
"""Names of the field with the turns; the second is a misspelling in published files, which is read, never written."""

IMAGE_KEYS = ("image", "images")
"""Names of the field with the images; the second is that of other projects, which is read, never written."""

UNREAD_IMAGE_KEY = re.compile(r"(?:image|img|pic(?:ture)?|figure)(?:path|file|name|url)?s?")
"""Fields that other projects keep images in, in lower case without `_` and `-`; without `image`, each is an error."""

IMAGE_FILE = re.compile(r"[^\s<>]{1,400}\.(?:png|jpe?g|tiff?|bmp|webp|gif|jp2|dcm|dicom)", re.IGNORECASE)
"""File name of an image; in a row without images it is an error in any field but `id`."""

OTHER_MARK = re.compile(r"<\|?(?:img|image|pic(?:ture)?)(?![a-z])[^<>\n]{0,200}>", re.IGNORECASE)
"""Marks of images in the texts of other projects: `<img>a.png</img>`, `<img src=...>`, `<|image|>`, `<image 1>`."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One message; `train` overrides whether the template trains it (None: as the template does)."""

    role: Role
    text: str
    train: bool | None = None

    @property
    def is_empty(self) -> bool:
        """Whether its text is white space and placeholders only."""
        return not self.text.replace(IMAGE_TOKEN, "").strip()


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns in order, and an optional system prompt that replaces the one of the template."""

    turns: tuple[Turn, ...]
    system: str | None = None

    @property
    def num_empty_answers(self) -> int:
        """Number of answers without text, except those with a flag `train` of their own."""
        return sum(turn.role == "gpt" and turn.train is None and turn.is_empty for turn in self.turns)

    @property
    def has_only_empty_answers(self) -> bool:
        """Whether there is an answer without text and no other turn to train."""
        taught = (
            turn.train or (turn.role == "gpt" and turn.train is None and not turn.is_empty) for turn in self.turns
        )
        return self.num_empty_answers > 0 and not any(taught)


class Origin(NamedTuple):
    """File and row (counted from 0) of a sample, for error messages."""

    file: str
    row: int

    def __str__(self) -> str:
        return f"{self.file}, row {self.row}"


@dataclass(frozen=True, slots=True)
class Sample:
    """A conversation, its images and the other fields of its row.

    Attributes:
        id: id of the row as text.
        conversation: the turns.
        images: paths or names of the images, in the order of their placeholders.
        meta: all other fields of the row.
        origin: file and row that the sample was read from.
    """

    id: str
    conversation: Conversation
    images: tuple[str, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)
    origin: Origin | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Preference:
    """Two answers to the same questions about the same images, of which one is preferred.

    Attributes:
        id: id of the row as text.
        chosen: whole conversation with the preferred answer.
        rejected: whole conversation with the other answer.
        images: paths or names of the images, in the order of their placeholders.
        weight: factor of the loss of this pair.
        meta: all other fields of the row.
        origin: file and row that the pair was read from.
    """

    id: str
    chosen: Conversation
    rejected: Conversation
    images: tuple[str, ...] = ()
    weight: float = 1.0
    meta: Mapping[str, Any] = field(default_factory=dict)
    origin: Origin | None = field(default=None, compare=False)

    def sides(self) -> tuple[Sample, Sample]:
        """Return the chosen and the rejected side as samples."""
        chosen = Sample(self.id, self.chosen, self.images, self.meta, self.origin)
        return chosen, replace(chosen, conversation=self.rejected)


def sample_label(sample: Sample | Preference) -> str:
    """Return the name of a sample in messages: file and row if known, and the id."""
    return f"id {sample.id!r}" if sample.origin is None else f"{sample.origin}, id {sample.id!r}"


def rows_label(samples: Sequence[Sample | Preference]) -> str:
    """Return row numbers and ids of samples by file, without texts: `train.json, rows 3 ('a'), 7 ('b')`."""
    files: dict[str, list[str]] = {}
    for sample in samples:
        file, row = ("", "") if sample.origin is None else (f"{sample.origin.file}, ", f"{sample.origin.row} ")
        files.setdefault(file, []).append(f"{row}({sample.id!r})")
    return "; ".join(f"{file}rows {', '.join(rows)}" for file, rows in files.items())


def type_and_length(value: Any) -> str:
    """Return the type and length of a value, without its content."""
    # Rows contain texts about patients, and messages appear in logs.
    kind = type(value).__name__
    return f"{kind} of length {len(value)}" if hasattr(value, "__len__") else kind


def to_row(sample: Sample) -> dict[str, Any]:
    """Return the JSON row of a sample; `from_row` returns an equal sample for it.

    An id that was a number in the original row is a number again.
    """
    rest = dict(sample.meta)
    raw_id = rest.pop("id", sample.id)
    row: dict[str, Any] = {"id": raw_id if str(raw_id) == sample.id else sample.id}
    if sample.images:
        row["image"] = sample.images[0] if len(sample.images) == 1 else list(sample.images)
    turns: list[dict[str, Any]] = []
    if sample.conversation.system is not None:
        turns.append({"from": "system", "value": sample.conversation.system})
    for turn in sample.conversation.turns:
        turns.append({"from": turn.role, "value": turn.text})
        if turn.train is not None:
            turns[-1]["train"] = turn.train
    return {**row, "conversations": turns, **rest}


def from_row(row: Mapping[str, Any], *, default_id: str | None = None) -> Sample:
    """Return the sample of a JSON row.

    Accepts all variants of published files: both spellings of `conversations`, numbers as values, `user` and
    `assistant` as roles, a first turn `system` (the system prompt of the conversation), and an answer before the first
    question, which is dropped as in the LLaVA trainers.

    >>> turns = [{"from": "human", "value": "<image>\\nWhich organ?"}, {"from": "gpt", "value": "Lung."}]
    >>> sample = from_row({"id": 7, "image": "7.png", "conversations": turns})
    >>> sample.id, sample.images, sample.conversation.turns[1].text
    ('7', ('7.png',), 'Lung.')

    Args:
        row: the decoded JSON object.
        default_id: id of a row without one; if None, such a row is an error.

    Raises:
        DataError: a field is missing or invalid; the message names the field.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"a row must be a JSON object, got {type(row).__name__}")
    key = next((key for key in CONVERSATION_KEYS if key in row), None)
    if key is None:
        raise DataError(f"field 'conversations' is missing; the row has {', '.join(map(repr, row)) or 'no fields'}")
    system, turns = _read_turns(row[key], key)
    images = row_images(row)
    if not images:
        _check_marks(turns)
    meta = {name: value for name, value in row.items() if name not in ("id", "image", *CONVERSATION_KEYS)}
    if images and meta.get("images") in (list(images), images[0]):
        del meta["images"]
    raw_id = row.get("id")
    if raw_id is not None and not isinstance(raw_id, str):
        if isinstance(raw_id, bool) or not isinstance(raw_id, int):
            raise DataError(f"field 'id' must be text or a whole number, got {type_and_length(raw_id)}")
        meta["id"] = raw_id
    identity = default_id if raw_id is None else str(raw_id)
    if identity is None:
        raise DataError("field 'id' is missing")
    return Sample(identity, Conversation(turns, system), images, meta)


def num_lost_turns(row: Mapping[str, Any], sample: Sample) -> int:
    """Return the number of turns of `row` that `sample` lacks (1 for an answer before the first question)."""
    written = next(row[key] for key in CONVERSATION_KEYS if key in row)
    return len(written) - len(sample.conversation.turns) - (sample.conversation.system is not None)


def row_images(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the image names of a row: those of `image`, or of `images`, which means the same.

    Raises:
        DataError: a field has another type, both fields name different images, or only another field holds images; the
            message names it.
    """
    own = image_names(row.get("image"))
    try:
        others = image_names(row.get("images") or None, "images")
    except DataError:
        if not own:
            raise
        others = ()  # in a row with `image`, the field `images` may hold anything
    if own and others and own != others:
        raise DataError("fields 'image' and 'images' name different images; keep one of them")
    if not own and not others:
        for name, value in row.items():
            key = name.lower().replace("_", "").replace("-", "")
            unread = UNREAD_IMAGE_KEY.fullmatch(key) and value and isinstance(value, str | list | Mapping)
            if name not in IMAGE_KEYS and (unread or (name != "id" and _names_images(value))):
                raise DataError(f"field {name!r} is not read; write the file names of images to field 'image'")
    return own or others


def _names_images(value: Any) -> bool:
    """Return whether a value is the file name of an image or a list of such names."""
    names = [value] if isinstance(value, str) else value
    return (
        isinstance(names, list) and bool(names) and all(isinstance(x, str) and IMAGE_FILE.fullmatch(x) for x in names)
    )


def _check_marks(turns: tuple[Turn, ...]) -> None:
    """Check that the questions of a row without images contain no image mark in an unsupported form.

    Raises:
        DataError: a question has one.
    """
    for index, turn in enumerate(turns):
        mark = OTHER_MARK.search(turn.text) if turn.role == "human" else None
        if mark is not None and mark[0] != IMAGE_TOKEN:
            raise DataError(
                f"question {index // 2} has an image mark that is not read ({mark[0][:4]}...) and the row names no "
                f"image; write the file name to field 'image' and {IMAGE_TOKEN} to the text"
            )


def image_names(value: Any, name: str = "image") -> tuple[str, ...]:
    """Return the image names of the field `image` of a row: none, one name or a list of names.

    Raises:
        DataError: the field has another type; the message calls it `name`.
    """
    if value is None or value == "":
        return ()
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) and name for name in names):
        raise DataError(f"field {name!r} must be a file name or a list of file names, got {type_and_length(value)}")
    return tuple(names)


def _read_turns(raw: Any, key: str) -> tuple[str | None, tuple[Turn, ...]]:
    """Return the system prompt, if any, and the turns, which start with a question and alternate."""
    if not isinstance(raw, list | tuple):
        raise DataError(f"field {key!r} must be a list of turns, got {type(raw).__name__}")
    raw = list(raw)
    system: str | None = None
    if raw and isinstance(raw[0], Mapping) and raw[0].get("from") == "system":
        system = _read_value(raw[0], f"{key}[0]")
        raw = raw[1:]
    first = 0 if system is None else 1
    turns = [_read_turn(turn, f"{key}[{index}]") for index, turn in enumerate(raw, first)]
    if turns and turns[0].role != "human":
        turns, first = turns[1:], first + 1
    if not turns:
        raise DataError(f"field {key!r} has no question; expected turns that start with one from 'human'")
    for index, turn in enumerate(turns):
        if turn.role != ("human", "gpt")[index % 2]:
            raise DataError(
                f"{key}[{first + index}]: two turns in a row from {turn.role!r}; expected human and gpt to alternate"
            )
    return system, tuple(turns)


def _read_turn(raw: Any, where: str) -> Turn:
    if not isinstance(raw, Mapping):
        raise DataError(f"{where} must be an object with 'from' and 'value', got {type(raw).__name__}")
    speaker = raw.get("from")
    role = ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise DataError(f"{where}.from must be one of {', '.join(ROLES)}, got {type_and_length(speaker)}")
    train = raw.get("train")
    if train is not None and not isinstance(train, bool):
        raise DataError(f"{where}.train must be true or false, got {type_and_length(train)}")
    return Turn(role, _read_value(raw, where), True if train is None and speaker == ASKING_ROLE else train)


def _read_value(raw: Mapping[str, Any], where: str) -> str:
    value = raw.get("value")
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DataError(f"{where}.value must be text or a number, got {type_and_length(value)}")
    if isinstance(value, float) and not math.isfinite(value):  # an empty cell of a table, as pandas writes it
        raise DataError(f"{where}.value must be text or a number, got {value}; remove the turn, or write its text")
    return str(value)


def with_placeholders(sample: Sample) -> Conversation:
    """Return the conversation of a sample with exactly one `<image>` per image.

    If a row has images but no placeholders, they are added before its first question, as in the LLaVA trainers.

    Raises:
        DataError: the number of placeholders differs from the number of images, or the system prompt has one; names the
            row.
    """
    conversation, num_images = sample.conversation, len(sample.images)
    if IMAGE_TOKEN in (conversation.system or ""):
        raise DataError(
            f"{sample_label(sample)}: the system prompt has a placeholder {IMAGE_TOKEN}; images belong to "
            "questions, so move it to one"
        )
    num_placeholders = sum(turn.text.count(IMAGE_TOKEN) for turn in conversation.turns)
    if num_placeholders == num_images:
        return conversation
    if num_placeholders == 0:
        first = conversation.turns[0]
        text = f"{IMAGE_TOKEN}\n" * num_images + first.text
        return replace(conversation, turns=(replace(first, text=text), *conversation.turns[1:]))
    fact = "the row names no image" if num_images == 0 else f"the row names {num_images} image(s)"
    raise DataError(
        f"{sample_label(sample)}: the text has {num_placeholders} placeholder(s) {IMAGE_TOKEN} but {fact}; "
        "expected one per image, or none"
    )
