"""Check of one row: the sample that it encodes and its problems.

    decoded value --samples.from_row--> Sample, its problems   (or, if that fails, the problems of each field)

`llava.samples` alone defines the format of a row; this module converts its errors to problems.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from llava.data.label_rows import is_labeled_row, read_label
from llava.data.preference_formats import is_preference_row, read_preference
from llava.data.records import read_default
from llava.errors import DataError, NotUnicodeError
from llava.samples import (
    CONVERSATION_KEYS,
    Preference,
    Sample,
    from_row,
    row_images,
    sample_label,
    with_placeholders,
)
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
        sample: the sample, the chosen side of a preference pair; None if the row cannot be read.
        problems: rules that the row violates.
        images: names of its images, also if the rest cannot be read.
        is_question: whether it is a row of a question file, which needs no answer.
        has_id: whether it has an id of its own.
        repairs: deviations from the format that were accepted.
        pair: the preference pair, or None for other rows.
        is_good: the label of a single answer, or None for other rows.
    """

    sample: Sample | None
    problems: tuple[Problem, ...] = ()
    images: tuple[str, ...] = ()
    is_question: bool = False
    has_id: bool = False
    repairs: tuple[str, ...] = ()
    pair: Preference | None = None
    is_good: bool | None = None

    def sides(self) -> tuple[Sample, ...]:
        """Return the sample, or both sides of a pair; none of a row that cannot be read."""
        return self.pair.sides() if self.pair is not None else () if self.sample is None else (self.sample,)


def view_row(value: Any, row: int) -> CheckedRow:
    """Return the check of a decoded row, or of the `DataError` that replaces an unreadable one."""
    if isinstance(value, DataError):
        rule = "text" if isinstance(value, NotUnicodeError) else "unreadable"
        return CheckedRow(None, (Problem(rule, str(value)),))
    if not isinstance(value, dict):
        return CheckedRow(None, (Problem("row-type", f"a row must be a JSON object, got {type(value).__name__}"),))
    if is_preference_row(value):
        return _view_pair(value, row)
    return _view_labeled(value, row) if is_labeled_row(value) else _view_plain(value, row)


def _view_plain(value: dict[str, Any], row: int) -> CheckedRow:
    """Return the check of a row with one conversation, or of a question."""
    key = next((key for key in CONVERSATION_KEYS if key in value), None)
    if value[key] in (None, []) if key else "text" not in value:
        problems = (Problem("wrapped" if _holds_rows(value) else "no-conversation"), *_field_problems(value))
        return CheckedRow(None, problems, _images(value))
    try:
        sample, num_lost = read_default(value, str(row))
    except DataError as error:
        return CheckedRow(None, _unreadable_problems(value, str(error)), _images(value))
    problems = tuple(_sample_problems(sample, is_question=key is None))
    has_id = value.get("id", value.get("question_id") if key is None else None) is not None
    return CheckedRow(sample, problems, sample.images, key is None, has_id, tuple(_repairs(value, key, num_lost)))


def _view_pair(value: Mapping[str, Any], row: int) -> CheckedRow:
    """Return the check of a preference row."""
    try:
        pair = read_preference(value, default_id=str(row))
    except DataError as error:
        return CheckedRow(None, (Problem("pair", str(error)),), _images(value))
    problems = dict.fromkeys(problem for side in pair.sides() for problem in _sample_problems(side, is_question=False))
    return CheckedRow(pair.sides()[0], tuple(problems), pair.images, has_id=value.get("id") is not None, pair=pair)


def _view_labeled(value: Mapping[str, Any], row: int) -> CheckedRow:
    """Return the check of a single answer with a label."""
    try:
        found = read_label(value, default_id=str(row))
    except DataError as error:
        return CheckedRow(None, (Problem("label", str(error)),), _images(value))
    problems = tuple(_sample_problems(found.sample, is_question=False))
    has_id = value.get("id") is not None
    return CheckedRow(found.sample, problems, found.sample.images, has_id=has_id, is_good=found.desirable)


def _holds_rows(value: Mapping[str, Any]) -> bool:
    """Return whether a field of an object holds a row, a list of rows, or an object of either."""
    parts = list(value.values())
    parts += [inner for part in parts if isinstance(part, Mapping) for inner in part.values()]
    return any(_is_row(part[0] if isinstance(part, list) and part else part) for part in parts)


def _is_row(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(value.get(key), list) for key in CONVERSATION_KEYS)


def _images(value: Mapping[str, Any]) -> tuple[str, ...]:
    try:
        return row_images(value)
    except DataError:
        return ()


def _unreadable_problems(value: Mapping[str, Any], message: str) -> tuple[Problem, ...]:
    """Return the problems of a row that cannot be read; each field is tried on its own."""
    found = _field_problems(value)
    rest = {name: part for name, part in value.items() if name in (*CONVERSATION_KEYS, "text")}
    found += _attempt("conversation", lambda: read_default({**rest, "image": _images(value), "id": "?"}, "?"))
    return found or (Problem("conversation", message),)


def _field_problems(value: Mapping[str, Any]) -> tuple[Problem, ...]:
    name = value.get("id", value.get("question_id"))
    return (
        *_attempt("id", lambda: from_row({"id": name, "conversations": _ANY_TURN}, default_id="?")),
        *_attempt("image-field", lambda: row_images(value)),
    )


def _attempt(rule: str, read: Callable[[], object]) -> tuple[Problem, ...]:
    try:
        read()
    except DataError as error:
        return (Problem(rule, str(error)),)
    return ()


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
    if sample.conversation.has_only_empty_answers:
        yield Problem("only-empty-answers")
    elif sample.conversation.num_empty_answers:
        yield Problem("empty-answer")
    if any(turn.is_empty for turn in turns if turn.role == "human"):
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
        yield "no id; identified by its row number"
    if num_lost:
        yield "an answer before the first question, dropped"
    turns = value.get(key) if key else None
    for turn in turns or ():
        if not isinstance(turn["value"], str):
            yield "a number where text is expected"
            break
    if any(turn["from"] in ("user", "assistant") for turn in turns or ()):
        yield "roles user and assistant for human and gpt"
