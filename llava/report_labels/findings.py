"""Names of the 14 findings, values of labels, and the result of labeling one report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

NO_FINDING = "No Finding"

SUPPORT_DEVICES = "Support Devices"

FINDINGS = (
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    SUPPORT_DEVICES,
    NO_FINDING,
)
"""The 14 findings in the order of the CheXbert heads."""

FIVE_FINDINGS = ("Cardiomegaly", "Edema", "Consolidation", "Atelectasis", "Pleural Effusion")
"""Findings of the five-label figures, in the published order."""

POSITIVE, NEGATIVE, UNCERTAIN = 1, 0, -1

Label = int | None
"""1 (stated), 0 (denied), -1 (uncertain) or None (not mentioned)."""

Labels = dict[str, Label]


@dataclass(frozen=True, slots=True)
class Evidence:
    """Place in a text that decides about a finding.

    Attributes:
        finding: one of `FINDINGS`.
        value: 1, 0 or -1.
        start: first character of the mention in the text.
        end: character after the mention.
        cue: words that make the mention negative, uncertain, normal or abnormal; empty for a plain mention.
    """

    finding: str
    value: int
    start: int
    end: int
    cue: str

    def to_json(self) -> dict[str, Any]:
        """Return the fields."""
        return {
            "finding": self.finding,
            "value": self.value,
            "start": self.start,
            "end": self.end,
            "cue": self.cue,
        }


@dataclass(frozen=True, slots=True)
class ReportLabels:
    """Labels of a report, with the evidence in order of place."""

    labels: Labels
    evidence: tuple[Evidence, ...]

    def to_json(self) -> dict[str, Any]:
        """Return labels and evidence as JSON values."""
        return {"labels": dict(self.labels), "evidence": [part.to_json() for part in self.evidence]}
