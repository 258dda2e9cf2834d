"""Parser of free-text radiology reports: findings, impression and reason for the examination.

    text --after the last FINAL REPORT--> lines --headers `NAME:` at the start of a line--> sections of known kinds

Rules, each of them tested:

- A header is at the start of a line and ends with a colon. A known name matches in any case (`Findings:`), an unknown
  one only in capitals. The text may follow on the same line.
- `FINDINGS AND IMPRESSION` and similar names are findings; `CONCLUSION` is an impression.
- Inside findings or impression, a name in capitals that mentions a body part or a device (`LUNGS:`, `LINES AND
  TUBES:`) belongs to the text of that section. Every other unknown name starts a section of kind `other`.
- Text before a line `FINAL REPORT` (a wet read, a preliminary text) is not part of the report.
- Repeated sections are joined in order. White space, including line ends, becomes one space.

A report without a findings header has no findings.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

KINDS: dict[str, tuple[str, ...]] = {
    "findings": (
        "findings",
        "finding",
        "findings and impression",
        "findings/impression",
        "findings / impression",
        "findings, impression",
        "chest findings",
        "report",
    ),
    "impression": ("impression", "impressions", "impression and plan", "conclusion", "conclusions", "summary"),
    "reason": (
        "reason for exam",
        "reason for examination",
        "reason for the exam",
        "reason for the examination",
        "reason for study",
        "reason for this examination",
        "reason",
    ),
    "indication": ("indication", "indications", "clinical indication", "clinical indications", "study indication"),
    "history": (
        "history",
        "clinical history",
        "clinical information",
        "clinical data",
        "clinical background",
        "medical history",
        "patient history",
    ),
    "comparison": ("comparison", "comparisons", "comparison study", "comparison exam"),
    "technique": ("technique", "techniques", "procedure", "views", "technique and views"),
    "examination": ("examination", "exam", "study", "type of examination", "exam type", "title"),
    "other": (
        "recommendation",
        "recommendations",
        "recommendation(s)",
        "notification",
        "notifications",
        "addendum",
        "wet read",
        "attestation",
        "note",
        "dose",
        "nb",
    ),
}
"""Header names in lower case, by kind of section."""

KIND_OF = {name: kind for kind, names in KINDS.items() for name in names}

REASONS = ("reason", "indication", "history")
"""Kinds of sections with the reason for the examination, the most direct first."""

_PARTS = """
abdomen airway airways aorta apparatus bone bones cardiac cardiomediastinal catheter catheters chest device devices
diaphragm diaphragms heart hila hilar hilum line lines lung lungs mediastinal mediastinum musculoskeletal osseous other
pleura pleural pulmonary ribs skeletal soft spine support thorax tissue tissues trachea tube tubes upper vasculature
vessels
"""
PARTS = frozenset(_PARTS.split())
"""Words of subheadings within findings and impression."""

MAX_HEADER = 60
_HEADER = re.compile(rf"^[ \t]*([A-Za-z][A-Za-z0-9 ()/,&'.-]{{0,{MAX_HEADER}}}?)[ \t]*:(?=\s|$)", re.MULTILINE)
_FINAL = re.compile(r"^[ \t]*FINAL REPORT[ \t]*$", re.MULTILINE)
_WORD = re.compile(r"[a-z]+")


@dataclass(frozen=True, slots=True)
class Section:
    """One section: kind (a key of `KINDS`, or `preamble`), name as written, and text as one line."""

    kind: str
    name: str
    text: str


@dataclass(frozen=True, slots=True)
class RadiologyReport:
    """Sections of a report, in order."""

    sections: tuple[Section, ...]

    def text(self, kind: str) -> str:
        """Return the text of all sections of a kind, joined by spaces; empty without such a section."""
        return " ".join(section.text for section in self.sections if section.kind == kind and section.text)

    @property
    def findings(self) -> str:
        """Text of the findings."""
        return self.text("findings")

    @property
    def impression(self) -> str:
        """Text of the impression."""
        return self.text("impression")

    @property
    def reason(self) -> str:
        """Reason for the examination: the text of the first kind of `REASONS` that has one."""
        return next((text for kind in REASONS if (text := self.text(kind))), "")


def parse_report(text: str) -> RadiologyReport:
    """Return the sections of a report; no word after the last `FINAL REPORT` is lost."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    for mark in reversed(list(_FINAL.finditer(text))):
        if text[mark.end() :].strip():
            text = text[mark.end() :]
            break
        text = text[: mark.start()]  # a mark without text after it
    found: list[tuple[str, str, int, int]] = []
    kind = "preamble"
    for header in _HEADER.finditer(text):
        kind_here = _kind(header[1], inside=kind)
        if kind_here is not None:
            kind = kind_here
            found.append((kind, header[1].strip(), header.start(), header.end()))
    starts = [*(start for _, _, start, _ in found), len(text)]
    sections = [Section("preamble", "", _one_line(text[: starts[0]]))]
    for (kind, name, _, end), stop in zip(found, starts[1:], strict=True):
        sections.append(Section(kind, name, _one_line(text[end:stop])))
    return RadiologyReport(tuple(section for section in sections if section.kind != "preamble" or section.text))


def _kind(name: str, *, inside: str) -> str | None:
    """Return the kind of section that a header starts; None if it belongs to the text of its section."""
    plain = " ".join(name.lower().split())
    if plain in KIND_OF:
        return KIND_OF[plain]
    if not name.isupper():
        return None
    mentions_part = not PARTS.isdisjoint(_WORD.findall(plain))
    return None if inside in ("findings", "impression") and mentions_part else "other"


def _one_line(text: str) -> str:
    return " ".join(text.split())
