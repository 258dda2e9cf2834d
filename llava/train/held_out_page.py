"""Held-out answers of the last validation on the run's page: image, question, reference and answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava.constants import IMAGE_TOKEN
from llava.imaging.decode import load_image
from llava.imaging.dicom.policy import DicomPolicy
from llava.samples import Sample
from llava.utils.jsonl import write_json
from llava.utils.reporting import html_thumbnail

CASES_FILE = "held_out_answers.json"
"""File in the folder of a run with the answers of the last validation that its page shows."""

MAX_CASES = 12
"""Rows that the page shows."""


def write_cases(
    folder: Path,
    samples: Sequence[Sample],
    answers: Sequence[str],
    values: Sequence[float],
    *,
    image_folder: str | Path | None,
    dicom: DicomPolicy,
) -> None:
    """Write the first held-out rows with the answers of a model.

    Rows are named by their number: names of images and folders often name a patient.

    Args:
        folder: folder of the run.
        samples: rows that end with the reference answer.
        answers: answer to each.
        values: score of each, 0 to 1.
        image_folder: folder that image names are relative to.
        dicom: how DICOM files are shown.
    """
    cases = []
    for sample, answer, value in list(zip(samples, answers, values, strict=True))[:MAX_CASES]:
        image = (
            html_thumbnail(sample.images[0], lambda name: load_image(name, image_folder, dicom=dicom))
            if sample.images
            else None
        )
        question, reference = (turn.text for turn in sample.conversation.turns[-2:])
        cases.append(
            {
                "row": f"row {sample.origin.row}" if sample.origin else "row",
                "url": image.url if image else None,
                "note": image.note if image else "no image",
                "facts": [
                    ("question", question.replace(IMAGE_TOKEN, "").strip()),
                    ("reference", reference),
                    ("answer", answer),
                    ("score", f"{value:.2f}"),
                ],
            }
        )
    write_json(folder / CASES_FILE, cases)


def read_cases(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of the last validation, empty without one."""
    path = folder / CASES_FILE
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    return found
