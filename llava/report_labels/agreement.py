"""Agreement of the findings of two reports, as a number for rewards."""

from __future__ import annotations

from collections.abc import Mapping

from llava.report_labels.findings import FINDINGS, POSITIVE, UNCERTAIN, Label
from llava.report_labels.labeler import label_report

PARTIAL = 0.5
"""Credit where one side states a finding and the other is uncertain about it."""


def agreement(reference: str | Mapping[str, Label], prediction: str | Mapping[str, Label]) -> float:
    """Return the agreement of two reports, from 0 to 1.

    It is the mean over the findings that either side mentions: 1 for equal labels, 0.5 for stated against uncertain,
    and 0 for everything else, a finding that only one side mentions included. Without any mention it is 1.

    Args:
        reference: text of the reference report, or its labels.
        prediction: text of the predicted report, or its labels.

    Example::

        agreement("No effusion.", "No pleural effusion is seen.")  # 1.0
    """
    first, second = _labels(reference), _labels(prediction)
    pairs = [(first.get(name), second.get(name)) for name in FINDINGS]
    credits = [_credit(one, other) for one, other in pairs if one is not None or other is not None]
    return sum(credits) / len(credits) if credits else 1.0


def _labels(report: str | Mapping[str, Label]) -> Mapping[str, Label]:
    return label_report(report).labels if isinstance(report, str) else report


def _credit(one: Label, other: Label) -> float:
    if one == other:
        return 1.0
    return PARTIAL if {one, other} == {POSITIVE, UNCERTAIN} else 0.0
