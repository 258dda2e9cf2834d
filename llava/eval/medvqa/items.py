"""Scored items: the reference of a question and the answer to it, joined by id.

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

from llava.data.groups import image_name_key
from llava.errors import DataError
from llava.eval.questions import check_unique, match_answers
from llava.samples import Sample, from_row, sample_label
from llava.scoring.choices import choices_of
from llava.scoring.decisions import is_closed
from llava.utils.json_rows import read_records
from llava.utils.jsonl import JSON_ERRORS, read_text


@dataclass(frozen=True, slots=True)
class ScoredItem:
    """Question with its reference and the answer to score, both as written.

    Attributes:
        question_id: the id as text.
        question: the question without the image placeholder.
        reference: the right answer.
        prediction: the model's answer; empty if its generation failed.
        closed: whether the answer is one of few (yes or no, left or right).
        types: the question's types; empty if the row names none.
        image: name of the image.
        failed: whether the generation of the answer failed.
        choices: texts of the options of a multiple-choice question, in the order of their letters.
        answer_label: letter of the right option; empty without `choices`.
    """

    question_id: str
    question: str
    reference: str
    prediction: str
    closed: bool
    types: tuple[str, ...] = ()
    image: str = ""
    failed: bool = False
    choices: tuple[str, ...] = ()
    answer_label: str = ""

    @property
    def cluster(self) -> str:
        """Cluster of the intervals: the name of the image, compared as a path."""
        return image_name_key(self.image)


def read_truth(path: str | Path) -> list[Sample]:
    """Return the questions of a file with their references (at least one question and its answer per row).

    The id of a row without one is its number, as in the answering commands.

    Raises:
        DataError: a row is invalid or an id occurs twice; the message names file and row.
    """
    samples: list[Sample] = []
    for index, row in enumerate(read_records(path)):
        try:
            samples.append(from_row(row, default_id=str(index)))
            check_reference(samples[-1])
        except DataError as error:
            raise DataError(f"{path}, row {index}: {error}") from error
    check_unique([sample.id for sample in samples], str(path))
    return samples


def check_reference(sample: Sample) -> None:
    """Check that a row can be scored.

    Raises:
        DataError: the first question has no answer, or the row's `answer_type` is unknown.
    """
    turns = sample.conversation.turns
    if len(turns) < 2:
        raise DataError(f"{sample_label(sample)}: expected a question and its answer, got {len(turns)} turns")
    try:
        is_closed(sample.meta.get("answer_type"), turns[1].text)
    except DataError as error:
        raise DataError(f"{sample_label(sample)}: {error}") from error


def join_answers(
    samples: Sequence[Sample], answers: Iterable[Mapping[str, Any]], *, source: str = "answers"
) -> list[ScoredItem]:
    """Join questions and answer rows by id, in any order; ids may be numbers or text.

    Args:
        samples: the questions, in the order of the result.
        answers: rows with `question_id`, `text` and `metadata`.
        source: name of the answers in messages.

    Raises:
        DataError: a question has no answer, an answer has no question or no text, or an id occurs twice; the message
            names the ids or the row.
    """
    rows = match_answers([sample.id for sample in samples], answers, source=source)
    return [make_item(sample, row) for sample, row in zip(samples, rows, strict=True)]


def make_item(sample: Sample, answer: Mapping[str, Any]) -> ScoredItem:
    """Return the item of one question and one answer row."""
    question, reference = sample.conversation.turns[0].text, sample.conversation.turns[1].text
    metadata = answer.get("metadata") or {}
    closed = is_closed(sample.meta.get("answer_type"), reference)
    choices, label = choices_of(sample.meta) if closed else ((), "")
    return ScoredItem(
        question_id=sample.id,
        question=question.replace("<image>", "").strip(),
        reference=reference,
        prediction=str(answer["text"]),
        closed=closed,
        types=question_types(sample.meta.get("question_type")),
        image=sample.images[0] if sample.images else sample.id,
        failed="error" in metadata,
        choices=choices,
        answer_label=label,
    )


def question_types(value: Any) -> tuple[str, ...]:
    """Return the types in `question_type`, which lists several as `POS, PRES`."""
    return tuple(part.strip().upper() for part in str(value or "").split(",") if part.strip())


def read_candidates(path: str | Path) -> list[str]:
    """Return candidate answers: the list under key "0" of an object, or the open answers of rows.

    Raises:
        DataError: the file has neither format.
    """
    try:
        whole = json.loads(read_text(path))
    except JSON_ERRORS:
        whole = None  # JSON lines: training rows
    if isinstance(whole, dict):
        if isinstance(whole.get("0"), list):
            return [str(value) for value in whole["0"]]
        raise DataError(f'{path}: expected an object with key "0" (a list of answers) or training rows')
    return open_answers(read_truth(path))


def open_answers(samples: Iterable[Sample]) -> list[str]:
    """Return the distinct open answers of rows, in their order."""
    answers = (
        sample.conversation.turns[1].text
        for sample in samples
        if not is_closed(sample.meta.get("answer_type"), sample.conversation.turns[1].text)
    )
    return list(dict.fromkeys(answers))
