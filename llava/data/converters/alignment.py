"""Alignment captions built from what question-answer rows and case records state about an image.

    rows about one image -> facts (organ, modality, plane or view, findings) -> a caption and short questions

A small VQA dataset has no captions, but its training rows name the organ, and their answers name modality, plane and
findings. Pass training rows only, never test rows.

Command:
    llava data align TRAIN.json [MORE.json ...] --root DATA_DIR --out align.json
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava.constants import IMAGE_TOKEN
from llava.errors import DataError
from llava.samples import from_row
from llava.utils.cli import Parser
from llava.utils.jsonl import read_records, write_json

INSTRUCTION = "Describe the image: modality, plane, organ and findings."
FACT_QUESTIONS = {
    "organ": "Which part of the body is shown?",
    "modality": "What is the imaging modality?",
    "plane": "In which plane or view was the image taken?",
}

ORGANS = {"head": "head", "chest": "chest", "abd": "abdomen", "abdomen": "abdomen"}

MODALITIES = {
    "MRI": r"\bmri?\b|magnetic resonance|\bt[12]\b|\bflair\b|diffusion",
    "CT": r"\bct\b|\bcat scan\b|computed tomography",
    "X-ray": r"\bx[- ]?ray\b|\bcxr\b|radiograph|plain film",
    "ultrasound": r"\bultrasound\b",
}
PLANES = {
    "axial": r"\baxial\b|\btransverse\b|cross[- ]section",
    "coronal": r"\bcoronal\b",
    "sagittal": r"\bsagittal\b",
    "PA": r"\bpa\b|posterior[- ]anterior|posteroanterior",
    "AP": r"\bap\b|anterior[- ]posterior|anteroposterior",
    "lateral": r"\blateral\b",
}
FINDING_TYPES = frozenset({"PRES", "ABN", "POS"})
MAX_FINDINGS = 4
_NOT_A_FINDING = re.compile(r"^(yes|no|none|normal|not seen|\d+)\b", re.IGNORECASE)


@dataclass(slots=True)
class ImageFacts:
    """Facts that the rows about one image state; findings are unique and in order of appearance."""

    organ: str | None = None
    modality: str | None = None
    plane: str | None = None
    findings: list[str] = field(default_factory=list)

    def caption(self) -> str:
        """Return one or two plain sentences; an empty string when nothing is known."""
        words = [word for word in (self.plane, self.modality) if word]
        of_what = f" of the {self.organ}" if self.organ else ""
        first = f"{' '.join(words) or 'Image'}{of_what}." if words or self.organ else ""
        second = f"Findings: {'; '.join(self.findings[:MAX_FINDINGS])}." if self.findings else ""
        return " ".join(part for part in (first[:1].upper() + first[1:], second) if part)

    def turns(self) -> list[tuple[str, str]]:
        """Return question and answer pairs for the caption and for every known fact."""
        known = [(question, getattr(self, name)) for name, question in FACT_QUESTIONS.items()]
        return [(question, answer) for question, answer in [(INSTRUCTION, self.caption()), *known] if answer]


def _match(table: dict[str, str], text: str) -> str | None:
    return next((name for name, pattern in table.items() if re.search(pattern, text, re.IGNORECASE)), None)


def _read_question(facts: ImageFacts, types: set[str], question: str, answer: str) -> None:
    """Add the facts that one question and its answer state; a `no` states none."""
    confirmed = question if answer.lower().startswith("yes") else answer
    if "MODALITY" in types and " not " not in question:
        facts.modality = facts.modality or _match(MODALITIES, confirmed)
    if "PLANE" in types:
        facts.plane = facts.plane or _match(PLANES, confirmed)
    if (
        types & FINDING_TYPES
        and not _NOT_A_FINDING.match(answer)
        and answer.lower() not in map(str.lower, facts.findings)
    ):
        facts.findings.append(answer)


def facts_by_image(rows: Iterable[Mapping[str, Any]]) -> dict[str, ImageFacts]:
    """Return facts by image name, in order of first appearance; a row may lack a conversation."""
    found: dict[str, ImageFacts] = {}
    for row in rows:
        if not isinstance(row.get("image"), str):
            continue
        facts = found.setdefault(row["image"], ImageFacts())
        facts.organ = facts.organ or ORGANS.get(str(row.get("image_organ", "")).lower())
        if row.get("view") and not facts.plane:  # only case records of chest radiographs have a projection
            facts.plane, facts.modality, facts.organ = _match(PLANES, str(row["view"])), "X-ray", "chest"
        if row.get("findings"):
            facts.findings.append(str(row["findings"]).rstrip(". "))
        elif "question_type" in row:
            types = {part.strip().upper() for part in str(row["question_type"]).split(",")}
            question, answer, *_ = (turn.text for turn in from_row(row).conversation.turns)
            _read_question(facts, types, question.replace(IMAGE_TOKEN, " ").strip(), answer.strip())
    return found


def alignment_rows(files: Sequence[Path], root: Path) -> list[dict[str, object]]:
    """Return a caption row and one row per fact for every image.

    `image` is relative to `root`; the images are in `images/` next to each file.

    Raises:
        DataError: a file is not inside `root`, so its images have no path relative to `root`.
    """
    rows: list[dict[str, object]] = []
    for file in files:
        folder = (file.parent / "images").resolve()
        if not folder.is_relative_to(root.resolve()):
            raise DataError(f"{file} lies outside {root}. Set --root to a folder that contains every file.")
        prefix = folder.relative_to(root.resolve())
        for image, facts in facts_by_image(read_records(file)).items():
            for question, answer in facts.turns():
                turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
                rows.append({"id": f"align_{len(rows)}", "image": str(prefix / image), "conversations": turns})
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Run `llava data align`."""
    parser = Parser(prog="llava data align", description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument(
        "files", nargs="+", type=Path, help="training files in LLaVA format, each next to its images/ folder"
    )
    parser.add_argument(
        "--root", type=Path, required=True, help="folder that contains every file: the --image-folder of the training"
    )
    parser.add_argument("--out", type=Path, required=True, help="alignment file to write")
    args = parser.parse_args(argv)
    rows = alignment_rows(args.files, args.root)
    write_json(args.out, rows)
    print(f"{len(rows)} rows -> {args.out}")  # noqa: T201 - command output
