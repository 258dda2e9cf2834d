"""Alignment captions composed from the facts that questions, answers and case records state.

    rows about one image -> facts (organ, modality, plane or view, findings) -> a caption and short questions

A small VQA dataset has no captions, but its training rows name the organ, and their answers name modality, plane and
findings. Pass training rows only, never test rows.

Rows of `llava data dicom` state modality, body part and view in fields; an answer to a question about findings states
them.

Command:
    llava data align TRAIN.json [MORE.json ...] --image-folder IMAGES --out align.json
    llava data align TRAIN.json [MORE.json ...] --root DATA_DIR --out align.json
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava.constants import IMAGE_TOKEN
from llava.data.groups import image_name_key
from llava.errors import DataError
from llava.samples import CONVERSATION_KEYS, from_row
from llava.utils.cli import Parser, check_folder
from llava.utils.json_rows import read_records
from llava.utils.jsonl import write_json
from llava.utils.terminal import write_out

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
_ASKS_FINDINGS = re.compile(r"\b(findings|impression|report)\b", re.IGNORECASE)
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

    def instruction(self) -> str:
        """Return the instruction for the caption; it asks only for what the caption contains."""
        known = [name for name in ("modality", "plane", "organ", "findings") if getattr(self, name)]
        listed = ", ".join(known[:-1]) + (" and " if len(known) > 1 else "") + "".join(known[-1:])
        return f"Describe the image: {listed}."

    def turns(self) -> list[tuple[str, str]]:
        """Return question and answer pairs for the caption and for every known fact."""
        known = [(question, getattr(self, name)) for name, question in FACT_QUESTIONS.items()]
        return [(question, answer) for question, answer in [(self.instruction(), self.caption()), *known] if answer]


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


def _read_report(facts: ImageFacts, texts: Sequence[str]) -> None:
    """Add the answers to questions that ask for findings, an impression or a report."""
    for question, answer in zip(texts[::2], texts[1::2], strict=False):
        text = " ".join(answer.split()).rstrip(". ")
        if _ASKS_FINDINGS.search(question) and text and not _NOT_A_FINDING.match(text) and text not in facts.findings:
            facts.findings.append(text)


def facts_by_image(rows: Iterable[Mapping[str, Any]]) -> dict[str, ImageFacts]:
    """Return facts by image name, in order and spelling of first appearance.

    Rows without a conversation are allowed.
    """
    found: dict[str, ImageFacts] = {}
    spelled: dict[str, str] = {}
    for row in rows:
        if not isinstance(row.get("image"), str):
            continue
        name = spelled.setdefault(image_name_key(row["image"]), row["image"])
        facts = found.setdefault(name, ImageFacts())
        facts.organ = facts.organ or ORGANS.get(str(row.get("image_organ", "")).lower())
        if "modality" in row or "body_part" in row:  # rows of `llava data dicom`
            facts.modality, facts.organ, facts.plane = (
                known or row.get(name)
                for known, name in ((facts.modality, "modality"), (facts.organ, "body_part"), (facts.plane, "view"))
            )
        elif row.get("view") and not facts.plane:  # only case records of chest radiographs have a projection
            facts.plane, facts.modality, facts.organ = _match(PLANES, str(row["view"])), "X-ray", "chest"
        if row.get("findings"):
            facts.findings.append(str(row["findings"]).rstrip(". "))
        elif "question_type" in row:
            types = {part.strip().upper() for part in str(row["question_type"]).split(",")}
            question, answer, *_ = (turn.text for turn in from_row(row).conversation.turns)
            _read_question(facts, types, question.replace(IMAGE_TOKEN, " ").strip(), answer.strip())
        elif any(key in row for key in CONVERSATION_KEYS):
            _read_report(facts, [turn.text for turn in from_row(row).conversation.turns])
    return found


def alignment_rows(
    files: Sequence[Path], root: Path | None = None, counts: Counter[str] | None = None
) -> list[dict[str, object]]:
    """Return a caption row and one row per fact for every image.

    Args:
        files: training files.
        root: folder that the image names shall be relative to; the images are in `images/` next to each file. None
            keeps the names as they are.
        counts: counts of images, and of those that no row states anything about.

    Raises:
        DataError: a file is not inside `root`, so its images have no path relative to `root`.
    """
    rows: list[dict[str, object]] = []
    for file in files:
        prefix = Path() if root is None else _folder_below(root, file)
        for image, facts in facts_by_image(read_records(file)).items():
            turns = facts.turns()
            if counts is not None:
                counts.update(images=1, silent=not turns)
            for question, answer in turns:
                written = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
                rows.append({"id": f"align_{len(rows)}", "image": str(prefix / image), "conversations": written})
    return rows


def _folder_below(root: Path, file: Path) -> Path:
    folder = (file.parent / "images").resolve()
    if not folder.is_relative_to(root.resolve()):
        raise DataError(
            f"{file} lies outside {root}. Set --root to a folder that contains every file, or pass --image-folder "
            "instead, the folder that the image names are relative to."
        )
    return folder.relative_to(root.resolve())


def make_parser() -> Parser:
    """Return the parser of `llava data align`."""
    parser = Parser(prog="llava data align", description="Write alignment captions from what rows state about images.")
    parser.add_argument("files", nargs="+", type=Path, help="training files in LLaVA format")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--image-folder", type=Path, help="folder that the image names of all files are relative to; they are kept"
    )
    where.add_argument(
        "--root", type=Path, help="folder that contains every file, each next to its images/ folder; image names are "
        "written relative to it"
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="alignment file to write")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run `llava data align`.

    Raises:
        DataError: no row states anything about its image.
    """
    args = make_parser().parse_args(argv)
    folder = args.image_folder or args.root
    check_folder(folder, "--image-folder" if args.image_folder else "--root")
    counts: Counter[str] = Counter()
    rows = alignment_rows(args.files, args.root, counts)
    if not rows:
        raise DataError(
            f"{counts['images']} images, and no row states modality, plane, organ or findings. Expected rows with "
            "question_type (VQA-RAD), the fields modality, body_part or view (llava data dicom), or an answer to a "
            "question that asks for findings, an impression or a report"
        )
    write_json(args.out, rows)
    silent = f"; {counts['silent']} of {counts['images']} images left out: no row states a fact about them"
    write_out(f"{len(rows)} rows -> {args.out}{silent if counts['silent'] else ''}\n")
