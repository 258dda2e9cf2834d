"""Questions about radiology reports, and the rules of LLaVA-Rad for rows of its annotation files.

    row of an annotation file --rule--> question | LeftOut(cause) --read_annotation--> Sample

The questions are constants that the published model was trained with. Converters and training loaders share them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from llava.constants import IMAGE_TOKEN
from llava.samples import Sample, from_row

Row = dict[str, Any]

TARGETS = ("findings", "impression")

WITH_REASON = {
    "findings": "Provide a description of the findings in the radiology image given the following indication: {reason}",
    "impression": "Provide the impression of the radiology image given the following indication: {reason}",
}
WITHOUT_REASON = {
    "findings": "Provide a description of the findings in the radiology image.",
    "impression": "Provide the impression of the radiology image.",
}

FRONTAL = frozenset({"AP", "PA"})
VIEWS = ("frontal", "all")


def report_question(target: str, reason: str | None) -> str:
    """Return the question for `findings` or `impression`, with the reason unless it is blank."""
    text = (reason or "").replace("\r\n", " ").replace("\r", " ").replace("\n", " ")
    return WITH_REASON[target].format(reason=text) if text.strip() else WITHOUT_REASON[target]


def is_frontal(view: str) -> bool:
    """Return whether a projection is frontal: AP or PA in MIMIC-CXR, Frontal in the Indiana tables."""
    return view.strip().upper() in FRONTAL or view.strip().lower() == "frontal"


def first_text(values: Iterable[object]) -> str:
    """Return the first value that is a string and not blank; empty without one."""
    return next((value.strip() for value in values if isinstance(value, str) and value.strip()), "")


RULE_BASED = "rule-based"
PREFIX = "mimic/"
VIEW_QUESTION = "Given the chest X-ray image from {view} view, describe the findings in the image: "


KEPT_FIELDS = ("view", "generate_method")
"""Fields of a row that its sample keeps, for predictions and tables."""


class LeftOut(Exception):
    """Raised by a rule that excludes a row; the message is the cause, for counts."""


QuestionRule = Callable[[Row, str], str]
"""Function from row and split to the question; raises `LeftOut`."""


def turn_value(row: Row, speaker: str) -> Any:
    """Return the first value of a speaker, of any type; None without a turn of that speaker."""
    turns = row.get("conversations")
    turns = turns if isinstance(turns, list) else []
    return next((turn.get("value") for turn in turns if isinstance(turn, dict) and turn.get("from") == speaker), None)


def findings_of(row: Row) -> str:
    """Return the findings, which are the answer of the conversation.

    Raises:
        LeftOut: the row has none.
    """
    text = turn_value(row, "gpt")
    if not isinstance(text, str):
        raise LeftOut("no findings")
    return text


def by_reason(row: Row, split: str) -> str:
    """Return a question with the reason, for frontal views; test rows must be extracted by rules."""
    _frontal_only(row)
    if split == "test" and row.get("generate_method") != RULE_BASED:
        raise LeftOut("test row not extracted by rules")
    return report_question("findings", first_text([row.get("reason")]))


def as_written(row: Row, split: str) -> str:
    """Return the question of the file, for frontal views."""
    _frontal_only(row)
    return str(turn_value(row, "human") or "").replace(IMAGE_TOKEN, "").strip()


def by_view(row: Row, split: str) -> str:
    """Return a question that names the view, for all views."""
    view = row.get("view")
    return VIEW_QUESTION.format(view=view if isinstance(view, str) else "Unknown")


def _frontal_only(row: Row) -> None:
    view = row.get("view")
    if not isinstance(view, str) or view.strip() not in FRONTAL:
        raise LeftOut("not a frontal view (AP or PA)")


def read_annotation(row: Row, default_id: str, *, rule: QuestionRule, split: str = "train") -> tuple[Sample, int]:
    """Return the sample of a row of an annotation file, and 0 dropped turns.

    Raises:
        LeftOut: the rule excludes the row.
        DataError: a field is missing or cannot be used.
    """
    answer, question = findings_of(row), rule(row, split)
    turns = [{"from": "human", "value": f"{IMAGE_TOKEN}\n{question}"}, {"from": "gpt", "value": answer.strip()}]
    image = row.get("image")
    name = image.removeprefix(PREFIX) if isinstance(image, str) else image
    kept = {key: row[key] for key in KEPT_FIELDS if isinstance(row.get(key), str)}
    found = {"id": row.get("id", default_id), "image": name, "conversations": turns, **kept}
    return from_row(found, default_id=default_id), 0
