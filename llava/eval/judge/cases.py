"""Cases for a judge: one chat question with the reference answer and the answer under test.

chat questions --+
                 +-- read_cases --> Case, Case, ...
answer rows    --+

The reference answers were written by a text-only GPT-4 that read the caption; the judge reads the same caption.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from llava.constants import IMAGE_TOKEN
from llava.errors import DataError
from llava.eval.questions import check_unique, match_answers
from llava.samples import type_and_length
from llava.utils.json_rows import Record, read_records

DOMAINS = ("chest_xray", "mri", "histology", "gross", "ct_scan")
"""Domains in the order of LLaVA-Med; the first true one is the domain of a question."""

CUT = len(f"\n{IMAGE_TOKEN}")
"""Number of characters that v1.0 cuts off the end of a question."""

NEEDED = ("question_id", "text", "gpt4_answer", "fig_caption")
"""Required fields of a question row."""


@dataclass(frozen=True, slots=True)
class Case:
    """Question with the two answers that a judge compares.

    Attributes:
        id: the question's id as text.
        row: the row of the question file.
        question: the question as the judge reads it.
        reference: the first answer, by the text-only model.
        answer: the second answer, by the model under test.
        failed: whether the generation of the second answer failed.
    """

    id: str
    row: Mapping[str, Any]
    question: str
    reference: str
    answer: str
    failed: bool = False

    @property
    def type(self) -> str:
        """Type of the question (conversation, detailed_description); empty if the row names none."""
        return str(self.row.get("type") or "")

    @property
    def domains(self) -> tuple[str, ...]:
        """All domains of the figure, in the order of `DOMAINS`."""
        return domains_of(self.row)

    @property
    def image(self) -> str:
        """Name of the image, the cluster of the intervals."""
        return image_of(self.row)


def domains_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the domains of a question row that are true: those of `DOMAINS` first, in their order.

    Raises:
        DataError: the field `domain` is not an object.
    """
    domain = row.get("domain") or {}
    if not isinstance(domain, Mapping):
        raise DataError(f"field 'domain' must be an object of true and false, got {type_and_length(domain)}")
    return tuple(name for name in (*DOMAINS, *(key for key in domain if key not in DOMAINS)) if domain.get(name))


def image_of(row: Mapping[str, Any]) -> str:
    """Return the name of a question row's image; a question without one is a cluster of its own."""
    image = row.get("image")
    first = image[0] if isinstance(image, list) and image else image
    return str(first or row.get("pair_id") or f"question {row.get('question_id')}")


def read_cases(questions: str | Path, answers: str | Path, *, defects: frozenset[str] = frozenset()) -> list[Case]:
    """Read a question file and an answer file and join their rows.

    Args:
        questions: chat questions of LLaVA-Med, rows with the fields of `NEEDED`.
        answers: answer rows of `llava/eval/model_vqa.py`, with `question_id` and `text`.
        defects: published defects to reproduce (names in `llava.compat`).

    Raises:
        DataError: a row lacks a field, an id occurs twice, or the files hold different questions; the message names
            file and row.
    """
    rows = list(read_records(questions))
    for index, row in enumerate(rows):
        try:
            _check(row)
        except DataError as error:
            raise DataError(f"{questions}, row {index}: {error}") from error
    ids = [str(row["question_id"]) for row in rows]
    check_unique(ids, str(questions))
    given = list(read_records(answers))
    if "joined_by_order" in defects:
        paired = _in_order(given, len(rows), str(answers))
    else:
        paired = match_answers(ids, given, source=str(answers))
    if not rows:
        raise DataError(f"{questions}: the file has no questions; expected rows with {', '.join(NEEDED)}")
    return [_case(row, answer, defects) for row, answer in zip(rows, paired, strict=True)]


def _check(row: Record) -> None:
    missing = [name for name in NEEDED if name not in row]
    if missing:
        raise DataError(f"field {missing[0]!r} is missing; expected {', '.join(NEEDED)}, found {', '.join(row)}")
    for name in ("text", "gpt4_answer", "fig_caption"):
        if not isinstance(row[name], str):
            raise DataError(f"field {name!r} must be text, got {type_and_length(row[name])}")
    mentions = row.get("in_text_mention")
    if mentions is not None and not isinstance(mentions, list):
        raise DataError(f"field 'in_text_mention' must be a list or null, got {type_and_length(mentions)}")
    domains_of(row)


def _in_order(answers: Sequence[Record], num_questions: int, source: str) -> list[Mapping[str, Any]]:
    """Return the answers in the order of the file, after checking their number."""
    paired: list[Mapping[str, Any]] = []
    for index, (answer, _) in enumerate(zip_longest(answers, range(num_questions))):
        if answer is None or index >= num_questions:
            raise DataError(f"{source}: {len(answers)} answers for {num_questions} questions cannot be paired by order")
        if not isinstance(answer.get("text"), str):
            raise DataError(
                f"{source}, row {index}: field 'text' must be text, got {type_and_length(answer.get('text'))}"
            )
        paired.append(answer)
    return paired


def _case(row: Record, answer: Mapping[str, Any], defects: frozenset[str]) -> Case:
    metadata = answer.get("metadata")
    failed = isinstance(metadata, Mapping) and "error" in metadata and "judged_failures" not in defects
    return Case(
        id=str(row["question_id"]),
        row=row,
        question=judge_question(row["text"], defects),
        reference=row["gpt4_answer"],
        answer=str(answer["text"]),
        failed=failed,
    )


def judge_question(text: str, defects: frozenset[str] = frozenset()) -> str:
    """Return a question as the judge reads it: without its image placeholder, unless a defect is selected."""
    if "cut_question" in defects:
        return text[:-CUT]
    if "tag_in_question" in defects:
        return text
    return text.replace(IMAGE_TOKEN, "").strip()
