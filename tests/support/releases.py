"""Small synthetic datasets in the published formats."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

LABELS = ("Atelectasis", "Cardiomegaly", "No Finding")


def write_image(path: Path, value: int = 0) -> Path:
    """Write a small gray image of one value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), value).save(path)
    return path


def image_bytes(value: int = 0) -> bytes:
    """Return a small gray image of one value as the bytes of a PNG file."""
    stream = io.BytesIO()
    Image.new("L", (8, 8), value).save(stream, format="PNG")
    return stream.getvalue()


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], *, zipped: bool = False) -> Path:
    """Write rows as a table, optionally gzipped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    data = stream.getvalue().encode()
    path.write_bytes(gzip.compress(data) if zipped else data)
    return path


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write rows as a JSON array."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(list(rows)), encoding="utf-8")
    return path


def rows_in(path: Path) -> list[dict[str, Any]]:
    """Return the rows that a converter wrote."""
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return rows


def vqa_rad_row(qid: int, phrase: str, question: str, answer: Any, **other: Any) -> dict[str, Any]:
    """Return a row as in the public release."""
    return {
        "qid": str(qid),
        "phrase_type": phrase,
        "qid_linked_id": f"link-{qid}",
        "image_case_url": "https://example.org/case",
        "image_name": f"synpic{qid % 3}.jpg",
        "image_organ": "CHEST",
        "evaluation": "not evaluated",
        "question": question,
        "question_rephrase": "NULL",
        "question_relation": "NULL",
        "question_frame": "NULL",
        "question_type": "PRES",
        "answer": answer,
        "answer_type": "OPEN",
        **other,
    }


def vqa_rad(folder: Path) -> Path:
    """Make the public release: 3 training and 2 test questions, one of them also in a fixed form."""
    rows = [
        vqa_rad_row(1, "freeform", "Is there a mass? ", "Yes", answer_type="CLOSED "),
        vqa_rad_row(2, "para", "How many nodules?", 3, question_frame="What is the count of nodules?"),
        vqa_rad_row(3, "freeform", "What is bright?", "None"),
        vqa_rad_row(4, "test_freeform", "Is it normal?", "no", answer_type="CLOSED", question_frame="Normal?"),
        vqa_rad_row(5, "test_para", "Which side?", "left"),
    ]
    write_rows(folder / "VQA_RAD Dataset Public.json", rows)
    for number in range(3):
        write_image(folder / "VQA_RAD Image Folder" / f"synpic{number}.jpg", number)
    return folder


def slake(folder: Path) -> Path:
    """Make a release of three files with an English and a Chinese question each."""
    for number, name in enumerate(("train", "validation", "test")):
        common = {
            "img_id": number,
            "img_name": f"xmlab{number}/source.jpg",
            "location": "Lung",
            "modality": "X-Ray",
            "base_type": "vqa",
            "content_type": "Plane",
            "triple": ["vhead", "_", "_"],
        }
        rows = [
            {**common, "question": "Which plane?", "answer": "Coronal", "q_lang": "en", "answer_type": "OPEN"},
            {**common, "question": "正常吗?", "answer": "否", "q_lang": "zh", "answer_type": "CLOSED"},
        ]
        write_rows(folder / f"{name}.json", [{**row, "qid": 10 * number + n} for n, row in enumerate(rows)])
        write_image(folder / "imgs" / f"xmlab{number}" / "source.jpg", number)
    return folder


def pmc_vqa_row(name: str, letter: str) -> dict[str, str]:
    """Return a row of the first release; the choices have the letter prefixes of the files."""
    choices = {
        "Choice A": " A:Diffuse uptake ",
        "Choice B": "B: Focal uptake",
        "Choice C": "None",
        "Choice D": "D.Bone",
    }
    text = choices[f"Choice {letter}"].strip().removeprefix(f"{letter}:").strip()
    return {"Figure_path": name, "Question": "What is the pattern?", "Answer": text, **choices, "Answer_label": letter}


REASON = "___F with cough //\n r/o"
SHORT = "                FINAL REPORT\n HISTORY:  Fever.\n\n FINDINGS:  Opacity.\n"


def report(findings: str, impression: str, indication: str) -> str:
    """Return a report laid out as in MIMIC-CXR."""
    return (
        "                                 FINAL REPORT\n EXAMINATION:  CHEST (PA AND LAT)\n\n"
        f" INDICATION:  {indication}\n\n COMPARISON:  None.\n\n"
        f" FINDINGS: \n \n {findings}\n\n IMPRESSION: \n \n {impression}\n"
    )


def mimic_cxr(folder: Path) -> tuple[Path, Path]:
    """Make the JPG release and the reports: patient, study, image, split, view and report."""
    images = [
        ("10000032", "50414267", "aaaa", "train", "PA", report("Lungs are\n clear.", "Normal.", REASON)),
        ("10000032", "50414267", "bbbb", "train", "LATERAL", None),
        ("10000764", "57375967", "cccc", "validate", "AP", report("Heart is large.", "Cardiomegaly.", "")),
        ("10000764", "57375967", "ffff", "validate", "", None),
        ("10000898", "50771383", "dddd", "test", "AP", report("", "No change.", "pain")),
        ("10000935", "51178377", "eeee", "test", "AP", SHORT),
    ]
    jpg, reports = folder / "mimic-cxr-jpg", folder / "mimic-cxr-reports"
    keys = [{"dicom_id": dicom, "study_id": study, "subject_id": subject} for subject, study, dicom, *_ in images]
    write_csv(
        jpg / "mimic-cxr-2.0.0-split.csv.gz",
        [{**key, "split": image[3]} for key, image in zip(keys, images, strict=True)],
        zipped=True,
    )
    meta = {"PerformedProcedureStepDescription": "CHEST", "PatientOrientationCodeSequence_CodeMeaning": "Erect"}
    write_csv(
        jpg / "mimic-cxr-2.0.0-metadata.csv.gz",
        [{**key, **meta, "ViewPosition": image[4]} for key, image in zip(keys, images, strict=True)],
        zipped=True,
    )
    labels = [{"subject_id": "10000032", "study_id": "50414267", **dict(zip(LABELS, ("", "-1.0", "1.0"), strict=True))}]
    write_csv(jpg / "mimic-cxr-2.0.0-chexpert.csv.gz", labels, zipped=True)
    for number, (subject, study, dicom, _, _, text) in enumerate(images):
        place = f"files/p{subject[:2]}/p{subject}/s{study}"
        write_image(jpg / place / f"{dicom}.jpg", number)
        if text is not None:
            path = reports / f"{place}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    return jpg, reports


def iu_xml(number: int, findings: str | None, images: Sequence[str]) -> str:
    """Return a report as in ecgen-radiology/."""
    texts = {
        "COMPARISON": "None.",
        "INDICATION": "Cough &amp; fever.",
        "FINDINGS": findings,
        "IMPRESSION": "No disease.",
    }
    sections = "".join(f'<AbstractText Label="{name}">{text or ""}</AbstractText>' for name, text in texts.items())
    parts = "".join(f'<parentImage id="{name}"><caption>PA</caption></parentImage>' for name in images)
    return (
        f'<?xml version="1.0" encoding="utf-8"?><eCitation><uId id="CXR{number}"/><licenseURL url="terms"/>'
        f"<MedlineCitation><Article><Abstract>{sections}</Abstract></Article></MedlineCitation>"
        f"<MeSH><major>normal</major></MeSH>{parts}</eCitation>"
    )
