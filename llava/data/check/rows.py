"""Check of one row: the sample that it encodes and its problems.

    decoded value --samples.from_row--> Sample, its problems   (or, if that fails, the problems of each field)

`llava.samples` alone defines the format of a row; this module converts its errors to problems.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from llava.data.records import read_default
from llava.errors import DataError
from llava.samples import CONVERSATION_KEYS, Sample, from_row, image_names, sample_label, with_placeholders
from llava.scoring.decisions import is_closed

_ANY_TURN = [{"from": "human", "value": "?"}]


class Problem(NamedTuple):
    """A rule that a row violates, with a message (empty if the title of the rule suffices)."""

    rule: str
    message: str = ""


@dataclass(frozen=True, slots=True)
class CheckedRow:
    """Result of the check of one row.

    Attributes:
        sample: the sample; None if the row cannot be read.
        problems: rules that the row violates.
        images: names of its images, also if the rest cannot be read.
        is_question: whether it is a row of a question file, which needs no answer.
        has_id: whether it has an id of its own.
        repairs: deviations from the format that were accepted.
    """

    sample: Sample | None
    problems: tuple[Problem, ...] = ()
    images: tuple[str, ...] = ()
    is_question: bool = False
    has_id: bool = False
    repairs: tuple[str, ...] = ()


def view_row(value: Any, row: int) -> CheckedRow:
    """Return the check of a decoded row, or of the `DataError` that replaces an unreadable one."""
    if isinstance(value, DataError):
        return CheckedRow(None, (Problem("unreadable", str(value)),))
    if not isinstance(value, dict):
        return CheckedRow(None, (Problem("row-type", f"a row must be a JSON object, got {type(value).__name__}"),))
    if not _is_unicode(value):
        return CheckedRow(None, (Problem("text"),))
    key = next((key for key in CONVERSATION_KEYS if key in value), None)
    if value[key] in (None, []) if key else "text" not in value:
        problems = (Problem("no-conversation"), *_field_problems(value))
        return CheckedRow(None, problems, _images(value))
    try:
        sample, num_lost = read_default(value, str(row))
    except DataError as error:
        return CheckedRow(None, _unreadable_problems(value, str(error)), _images(value))
    problems = tuple(_sample_problems(sample, is_question=key is None))
    has_id = value.get("id", value.get("question_id") if key is None else None) is not None
    return CheckedRow(sample, problems, sample.images, key is None, has_id, tuple(_repairs(value, key, num_lost)))


def _images(value: Mapping[str, Any]) -> tuple[str, ...]:
    try:
        return image_names(value.get("image"))
    except DataError:
        return ()


def _unreadable_problems(value: Mapping[str, Any], message: str) -> tuple[Problem, ...]:
    """Return the problems of a row that cannot be read; each field is tried on its own."""
    found = _field_problems(value)
    rest = {name: part for name, part in value.items() if name not in ("id", "question_id", "image")}
    found += _attempt("conversation", lambda: read_default({**rest, "id": "?"}, "?"))
    return found or (Problem("conversation", message),)


def _field_problems(value: Mapping[str, Any]) -> tuple[Problem, ...]:
    name = value.get("id", value.get("question_id"))
    return (
        *_attempt("id", lambda: from_row({"id": name, "conversations": _ANY_TURN}, default_id="?")),
        *_attempt("image-field", lambda: image_names(value.get("image"))),
    )


def _attempt(rule: str, read: Callable[[], object]) -> tuple[Problem, ...]:
    try:
        read()
    except DataError as error:
        return (Problem(rule, str(error)),)
    return ()


def _is_unicode(value: Any) -> bool:
    """Return whether all text can be encoded as UTF-8; JSON may contain half of a surrogate pair."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return False
        return True
    if isinstance(value, Mapping):
        return all(_is_unicode(part) for item in value.items() for part in item)
    return all(map(_is_unicode, value)) if isinstance(value, list) else True


def _sample_problems(sample: Sample, *, is_question: bool) -> Iterator[Problem]:
    """Yield the problems of a row that can be read."""
    try:
        with_placeholders(sample)
    except DataError as error:
        yield Problem("places", str(error).removeprefix(f"{sample_label(sample)}: "))
    turns = sample.conversation.turns
    answers = [turn for turn in turns if turn.role == "gpt"]
    if not answers and not is_question:
        yield Problem("no-answer")
    if not all(turn.text.replace("<image>", "").strip() for turn in turns):
        yield Problem("empty-text")
    if answers and "answer_type" in sample.meta:
        try:
            is_closed(sample.meta["answer_type"], answers[0].text)
        except DataError:
            yield Problem("answer-type")


def _repairs(value: Mapping[str, Any], key: str | None, num_lost: int) -> Iterator[str]:
    """Yield the deviations from the format that the reader corrected silently."""
    if key == CONVERSATION_KEYS[1]:
        yield "misspelt field conversatons"
    if value.get("id") is None and (key or value.get("question_id") is None):
        yield "no id: called by its number"
    if num_lost:
        yield "an answer before the first question, left out"
    turns = value.get(key) if key else None
    for turn in turns or ():
        if not isinstance(turn["value"], str):
            yield "a number where text is expected"
            break
    if any(turn["from"] in ("user", "assistant") for turn in turns or ()):
        yield "roles user and assistant for human and gpt"
