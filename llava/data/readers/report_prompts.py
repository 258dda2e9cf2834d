"""Questions that ask for a part of a radiology report, and the rows they belong to (llava-rad.md section 3.4).

The two texts for findings were trained into LLaVA-Rad: a changed character makes its answers worse.
"""

from __future__ import annotations

from collections.abc import Iterable

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


def question(target: str, reason: str | None) -> str:
    """Return the question for `findings` or `impression`; a blank reason is none, line ends in one become spaces."""
    text = (reason or "").replace("\r\n", " ").replace("\r", " ").replace("\n", " ")
    return WITH_REASON[target].format(reason=text) if text.strip() else WITHOUT_REASON[target]


def is_frontal(view: str) -> bool:
    """Say whether a projection is frontal, in the words of MIMIC-CXR (AP, PA) or of the Indiana tables (Frontal)."""
    return view.strip().upper() in FRONTAL or view.strip().lower() == "frontal"


def first_text(values: Iterable[object]) -> str:
    """Return the first of several values that is a text and not blank."""
    return next((value.strip() for value in values if isinstance(value, str) and value.strip()), "")
