"""Sample, the record that all parts of the package share: one conversation about zero or more images.

    row of a JSON file  --from_row-->  Sample  --to_row-->  row of a JSON file

The JSON format is that of LLaVA: `id`, `image` (one name or a list) and `conversations` (a list of
`{"from": "human" | "gpt", "value": text}`); all other fields of a row are kept in `Sample.meta`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from llava.constants import IMAGE_TOKEN
from llava.errors import DataError

Role = Literal["human", "gpt"]

ROLES: dict[str, Role] = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}
"""Role by its name in data files."""

CONVERSATION_KEYS = ("conversations", "conversatons")
"""Names of the field with the turns; the second is a misspelling in published files, which is read, never written."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One message; `train` overrides whether the template trains it (None: as the template does)."""

    role: Role
    text: str
    train: bool | None = None


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns in order, and an optional system prompt that replaces the one of the template."""

    turns: tuple[Turn, ...]
    system: str | None = None


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


def sample_label(sample: Sample) -> str:
    """Return the name of a sample in messages: file and row if known, and the id."""
    return f"id {sample.id!r}" if sample.origin is None else f"{sample.origin}, id {sample.id!r}"


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
    meta = {name: value for name, value in row.items() if name not in ("id", "image", *CONVERSATION_KEYS)}
    raw_id = row.get("id")
    if raw_id is not None and not isinstance(raw_id, str):
        if isinstance(raw_id, bool) or not isinstance(raw_id, int):
            raise DataError(f"field 'id' must be text or a whole number, got {type_and_length(raw_id)}")
        meta["id"] = raw_id
    identity = default_id if raw_id is None else str(raw_id)
    if identity is None:
        raise DataError("field 'id' is missing")
    return Sample(identity, Conversation(turns, system), image_names(row.get("image")), meta)


def num_lost_turns(row: Mapping[str, Any], sample: Sample) -> int:
    """Return the number of turns of `row` that `sample` lacks (1 for an answer before the first question)."""
    written = next(row[key] for key in CONVERSATION_KEYS if key in row)
    return len(written) - len(sample.conversation.turns) - (sample.conversation.system is not None)


def image_names(value: Any) -> tuple[str, ...]:
    """Return the image names of the field `image` of a row: none, one name or a list of names.

    Raises:
        DataError: the field has another type.
    """
    if value is None or value == "":
        return ()
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) and name for name in names):
        raise DataError(f"field 'image' must be a file name or a list of file names, got {type_and_length(value)}")
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
    return Turn(role, _read_value(raw, where), train)


def _read_value(raw: Mapping[str, Any], where: str) -> str:
    value = raw.get("value")
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DataError(f"{where}.value must be text or a number, got {type_and_length(value)}")
    return str(value)


def with_placeholders(sample: Sample) -> Conversation:
    """Return the conversation of a sample with exactly one `<image>` per image.

    If a row has images but no placeholders, they are added before its first question, as in the LLaVA trainers.

    Raises:
        DataError: the number of placeholders differs from the number of images; names the row.
    """
    conversation, num_images = sample.conversation, len(sample.images)
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
