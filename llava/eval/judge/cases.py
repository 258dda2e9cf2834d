"""What a judge is asked about: one chat question with the reference answer and the answer under test.

chat questions --+
                 +-- read_cases --> Case, Case, ...
answer rows    --+

The reference answer was written by a text-only GPT-4 that read the caption; the judge reads the same caption.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from llava.constants import IMAGE_TOKEN
from llava.errors import DataError
from llava.eval.questions import match_answers, refuse_doubles
from llava.samples import describe
from llava.utils.jsonl import Record, read_records

DOMAINS = ("chest_xray", "mri", "histology", "gross", "ct_scan")
"""In the order in which the first true one names the domain of a question (llava-med.md 8.10)."""

CUT = len(f"\n{IMAGE_TOKEN}")
"""How many characters v1.0 cuts off the end of a question."""

NEEDED = ("question_id", "text", "gpt4_answer", "fig_caption")


@dataclass(frozen=True, slots=True)
class Case:
    """One question and the two answers that are compared.

    Attributes:
        id: the question's id as text.
        row: the row of the question file.
        question: the question as the judge reads it.
        reference: the first answer, of the text-only model.
        answer: the second answer, of the model under test.
        failed: whether that answer could not be generated.
    """

    id: str
    row: Mapping[str, Any]
    question: str
    reference: str
    answer: str
    failed: bool = False

    @property
    def type(self) -> str:
        """The type of the question: conversation, detailed_description; empty when the data name none."""
        return str(self.row.get("type") or "")

    @property
    def domains(self) -> tuple[str, ...]:
        """Every domain of the figure, in the order of `DOMAINS`."""
        return domains_of(self.row)

    @property
    def image(self) -> str:
        """Name of the picture, the cluster of the intervals."""
        return image_of(self.row)


def domains_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the true domains of a question row, the published ones first and in their order."""
    domain = row.get("domain") or {}
    if not isinstance(domain, Mapping):
        raise DataError(f"field 'domain' must be an object of true and false, got {describe(domain)}")
    return tuple(name for name in (*DOMAINS, *(key for key in domain if key not in DOMAINS)) if domain.get(name))


def image_of(row: Mapping[str, Any]) -> str:
    """Return the name of a question row's picture; questions without one are each their own cluster."""
    image = row.get("image")
    first = image[0] if isinstance(image, list) and image else image
    return str(first or row.get("pair_id") or f"question {row.get('question_id')}")


def read_cases(questions: str | Path, answers: str | Path, *, defects: frozenset[str] = frozenset()) -> list[Case]:
    """Read the question file and the answer file and join them.

    Args:
        questions: rows of llava-med.md 3.6.
        answers: rows of 3.7.
        defects: published ones that stay in (see `published.DEFECTS`).

    Raises:
        DataError: a row lacks a field, an id occurs twice, or the files hold other questions; names file and row.
    """
    rows = list(read_records(questions))
    for index, row in enumerate(rows):
        try:
            _check(row)
        except DataError as error:
            raise DataError(f"{questions}, row {index}: {error}") from error
    ids = [str(row["question_id"]) for row in rows]
    refuse_doubles(ids, str(questions))
    given = list(read_records(answers))
    if "joined_by_order" in defects:
        paired = _in_order(given, len(rows), str(answers))
    else:
        paired = match_answers(ids, given, source=str(answers))
    if not rows:
        raise DataError(f"{questions}: no question; expected rows with {', '.join(NEEDED)}")
    return [_case(row, answer, defects) for row, answer in zip(rows, paired, strict=True)]


def _check(row: Record) -> None:
    missing = [name for name in NEEDED if name not in row]
    if missing:
        raise DataError(f"field {missing[0]!r} is missing; expected {', '.join(NEEDED)}, found {', '.join(row)}")
    for name in ("text", "gpt4_answer", "fig_caption"):
        if not isinstance(row[name], str):
            raise DataError(f"field {name!r} must be text, got {describe(row[name])}")
    mentions = row.get("in_text_mention")
    if mentions is not None and not isinstance(mentions, list):
        raise DataError(f"field 'in_text_mention' must be a list or null, got {describe(mentions)}")
    domains_of(row)


def _in_order(answers: Sequence[Record], num_questions: int, source: str) -> list[Mapping[str, Any]]:
    """Return the answers as they stand, after checking that there are as many as questions."""
    paired: list[Mapping[str, Any]] = []
    for index, (answer, _) in enumerate(zip_longest(answers, range(num_questions))):
        if answer is None or index >= num_questions:
            raise DataError(f"{source}: {len(answers)} answers for {num_questions} questions cannot be paired by order")
        if not isinstance(answer.get("text"), str):
            raise DataError(f"{source}, row {index}: field 'text' must be text, got {describe(answer.get('text'))}")
        paired.append(answer)
    return paired


def _case(row: Record, answer: Mapping[str, Any], defects: frozenset[str]) -> Case:
    metadata = answer.get("metadata")
    failed = isinstance(metadata, Mapping) and "error" in metadata and "judged_failures" not in defects
    return Case(
        id=str(row["question_id"]),
        row=row,
        question=asked(row["text"], defects),
        reference=row["gpt4_answer"],
        answer=str(answer["text"]),
        failed=failed,
    )


def asked(text: str, defects: frozenset[str] = frozenset()) -> str:
    """Return a question as the judge reads it: without its image mark, unless a defect is asked for."""
    if "cut_question" in defects:
        return text[:-CUT]
    if "tag_in_question" in defects:
        return text
    return text.replace(IMAGE_TOKEN, "").strip()
