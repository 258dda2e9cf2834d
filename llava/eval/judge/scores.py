"""Judged questions read from files of scores of three programs.

this package    judgement: {scores, failure, orders}
v1.0, v1.5      result or gpt_eval: the judge's reply
LLaVA reviews   category, tuple: [score, score], [-1, -1] for an unreadable reply
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.errors import DataError
from llava.eval.judge.cases import domains_of, image_of
from llava.eval.judge.review import REPLY_KEYS
from llava.eval.questions import check_unique
from llava.judging.parsing import PARSERS, Scores, Unreadable
from llava.samples import type_and_length
from llava.utils.json_rows import Record, read_records
from llava.utils.lookup import lookup

FAILED_TUPLE = (-1.0, -1.0)
"""Scores that a LLaVA review writes for an unreadable reply."""


@dataclass(frozen=True, slots=True)
class Rated:
    """Judged question.

    Attributes:
        id: id of the question.
        type: type of the question; the category in a LLaVA review.
        domains: domains of the figure.
        image: name of the image, the cluster of the intervals.
        scores: scores of the reference and of the answer under test; None without scores.
        failure: reason for missing scores.
        orders: the same scores by order, for rows that have them.
        num_words: numbers of words of the two answers; None if the row does not contain the answers.
        review: whether the row comes from a LLaVA review.
    """

    id: str
    type: str
    domains: tuple[str, ...]
    image: str
    scores: Scores | None
    failure: str = ""
    orders: Mapping[str, Scores | None] | None = None
    num_words: tuple[int, int] | None = None
    review: bool = False


def read_rated(path: str | Path, *, parser: str = "strict") -> list[Rated]:
    """Return the judged questions of a file of scores.

    Args:
        path: the file.
        parser: name in `PARSERS`, for rows that contain only the judge's reply.

    Raises:
        DataError: a row has none of the three layouts, or an id occurs twice; the message names file and row.
    """
    lookup(PARSERS, parser, "parser")
    rated = []
    for index, row in enumerate(read_records(path)):
        try:
            rated.append(_rated(row, str(index), parser))
        except DataError as error:
            raise DataError(f"{path}, row {index}: {error}") from error
    if not rated:
        raise DataError(f"{path}: the file has no rows; expected judged questions")
    check_unique([one.id for one in rated], str(path))
    return rated


def _rated(row: Record, default_id: str, parser: str) -> Rated:
    orders: dict[str, Scores | None] | None = None
    if isinstance(judgment := row.get("judgement"), dict):
        scores = _pair(judgment.get("scores"))
        failure = str(judgment.get("failure") or "")
        orders = _orders(judgment.get("orders") or {})
    elif "tuple" in row:
        scores = _pair(row["tuple"])
        failure = "" if scores != FAILED_TUPLE else "no scores"
    else:
        scores, failure = _parsed(row, parser)
    if scores is not None and not failure and scores[0] == 0.0:
        failure = "reference scored 0"
    return Rated(
        id=str(row.get("question_id", row.get("id", default_id))),
        type=str(row.get("type") or row.get("category") or ""),
        domains=domains_of(row),
        image=image_of({"question_id": default_id, **row}),
        scores=None if failure else scores,
        failure=failure or ("" if scores is not None else "no scores"),
        orders=orders,
        num_words=_num_words(row.get("ans1"), row.get("ans2")),
        review="tuple" in row,
    )


def _num_words(reference: Any, answer: Any) -> tuple[int, int] | None:
    if not isinstance(reference, str) or not isinstance(answer, str):
        return None
    return len(reference.split()), len(answer.split())


def _parsed(row: Record, parser: str) -> tuple[Scores | None, str]:
    """Return the scores of a row that contains only the judge's reply, or None and the reason."""
    key = next((key for key in dict.fromkeys(REPLY_KEYS.values()) if key in row), None)
    if key is None:
        known = ", ".join(("judgement", "tuple", *dict.fromkeys(REPLY_KEYS.values())))
        raise DataError(f"the row holds no scores; expected one of {known}, found {', '.join(row)}")
    reply = row[key]
    if reply is None:
        return None, "no reply"
    if not isinstance(reply, str):
        raise DataError(f"field {key!r} must be text, got {type_and_length(reply)}")
    read = PARSERS[parser](reply)
    return (None, read.reason) if isinstance(read, Unreadable) else (read, "")


def _orders(value: Any) -> dict[str, Scores | None]:
    if not isinstance(value, dict) or not all(isinstance(order, dict) for order in value.values()):
        raise DataError(f"field 'judgement.orders' must be an object of objects, got {type_and_length(value)}")
    return {name: _pair(order.get("scores")) for name, order in value.items()}


def _pair(value: Any) -> Scores | None:
    if value is None:
        return None
    good = isinstance(value, list) and len(value) == 2
    if not good or not all(isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) for x in value):
        raise DataError(f"scores must be two numbers, got {type_and_length(value)}")
    return float(value[0]), float(value[1])
