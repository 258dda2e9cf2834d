"""One scored thing: a question's reference and the answer to it, joined by id.

ground truth rows  --+
                     +-- join --> Item, Item, ...
answer rows  --------+
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.errors import DataError
from llava.eval.questions import match_answers, refuse_doubles
from llava.samples import Sample, from_row, name_of
from llava.scoring.decisions import is_closed
from llava.utils.jsonl import read_records, read_text


@dataclass(frozen=True, slots=True)
class Item:
    """A question with its reference and the answer to be scored, both as written.

    Attributes:
        question_id: the id as text.
        question: the question without the image mark.
        reference: the right answer.
        prediction: the model's answer; empty where it failed.
        closed: whether the answer is one of few (yes or no, left or right).
        types: the question's types; empty when the data name none.
        image: name of the image, the cluster of the intervals.
        failed: whether the answer could not be generated.
    """

    question_id: str
    question: str
    reference: str
    prediction: str
    closed: bool
    types: tuple[str, ...] = ()
    image: str = ""
    failed: bool = False


def read_truth(path: str | Path) -> list[Sample]:
    """Read questions with their references (`conversations` of a question and an answer at least).

    A row without an id is called by its number, as it was when it was asked.

    Raises:
        DataError: a row cannot be used or an id occurs twice; names file and row.
    """
    samples: list[Sample] = []
    for index, row in enumerate(read_records(path)):
        try:
            samples.append(from_row(row, default_id=str(index)))
            check_reference(samples[-1])
        except DataError as error:
            raise DataError(f"{path}, row {index}: {error}") from error
    refuse_doubles([sample.id for sample in samples], str(path))
    return samples


def check_reference(sample: Sample) -> None:
    """Refuse a row that could not be scored.

    Raises:
        DataError: the first question has no answer to compare with, or the row's `answer_type` is unknown.
    """
    turns = sample.conversation.turns
    if len(turns) < 2:
        raise DataError(f"{name_of(sample)}: expected a question and its answer, got {len(turns)} turns")
    try:
        is_closed(sample.meta.get("answer_type"), turns[1].text)
    except DataError as error:
        raise DataError(f"{name_of(sample)}: {error}") from error


def join(samples: Sequence[Sample], answers: Iterable[Mapping[str, Any]], *, source: str = "answers") -> list[Item]:
    """Join questions and answer rows by id, whatever their order and whether ids are numbers or text.

    Args:
        samples: the questions, in the order of the result.
        answers: rows with `question_id`, `text` and `metadata`.
        source: what messages call the answers.

    Raises:
        DataError: a question has no answer, an answer no question or no text, or an id occurs twice; names the ids or
            the row.
    """
    rows = match_answers([sample.id for sample in samples], answers, source=source)
    return [make_item(sample, row) for sample, row in zip(samples, rows, strict=True)]


def make_item(sample: Sample, answer: Mapping[str, Any]) -> Item:
    """Return the item of one question and one answer row."""
    question, reference = sample.conversation.turns[0].text, sample.conversation.turns[1].text
    metadata = answer.get("metadata") or {}
    return Item(
        question_id=sample.id,
        question=question.replace("<image>", "").strip(),
        reference=reference,
        prediction=str(answer["text"]),
        closed=is_closed(sample.meta.get("answer_type"), reference),
        types=question_types(sample.meta.get("question_type")),
        image=sample.images[0] if sample.images else sample.id,
        failed="error" in metadata,
    )


def question_types(value: Any) -> tuple[str, ...]:
    """Return the types in `question_type`; the data write several as `POS, PRES`."""
    return tuple(part.strip().upper() for part in str(value or "").split(",") if part.strip())


def read_candidates(path: str | Path) -> list[str]:
    """Read the list of candidate answers: an object whose key "0" holds it, or training rows (their open answers).

    Raises:
        DataError: the file holds neither.
    """
    try:
        whole = json.loads(read_text(path))
    except json.JSONDecodeError:
        whole = None  # JSON lines: training rows
    if isinstance(whole, dict):
        if isinstance(whole.get("0"), list):
            return [str(value) for value in whole["0"]]
        raise DataError(f'{path}: expected an object with key "0" (a list of answers) or training rows')
    return open_answers(read_truth(path))


def open_answers(samples: Iterable[Sample]) -> list[str]:
    """Return the distinct open answers of training rows, in their order."""
    answers = (
        sample.conversation.turns[1].text
        for sample in samples
        if not is_closed(sample.meta.get("answer_type"), sample.conversation.turns[1].text)
    )
    return list(dict.fromkeys(answers))
