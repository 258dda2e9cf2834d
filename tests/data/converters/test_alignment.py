"""Facts and captions from synthetic rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava.data.converters import alignment
from llava.errors import DataError


def row(image: str, kind: str, question: str, answer: str, **fields: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"id": f"{image}{question}", "image": image, "question_type": kind, "conversations": turns, **fields}


def test_facts_come_from_answers_and_from_confirmed_questions() -> None:
    facts = alignment.facts_by_image(
        [
            row("a.jpg", "MODALITY", "What kind of scan is this?", "MRI Diffusion Weighted", image_organ="HEAD"),
            row("a.jpg", "PLANE", "Is this a transverse section?", "yes"),
            row("a.jpg", "PRES, POS", "Where is the bright area?", "Left temporal lobe"),
            row("a.jpg", "PRES", "Is there a fracture?", "no"),
            row("a.jpg", "ABN", "Where is it?", "left temporal lobe"),
        ]
    )["a.jpg"]
    assert (facts.organ, facts.modality, facts.plane) == ("head", "MRI", "axial")
    assert facts.findings == ["Left temporal lobe"]
    assert facts.caption() == "Axial MRI of the head. Findings: Left temporal lobe."


@pytest.mark.parametrize(
    ("kind", "question", "answer"),
    [
        ("MODALITY", "Is this a CT scan?", "no"),
        ("MODALITY", "What type of imaging does this not represent?", "ultrasound"),
        ("PLANE", "Is this an AP image?", "No"),
        ("PRES", "How many masses are there?", "2"),
    ],
)
def test_a_denial_states_nothing(kind: str, question: str, answer: str) -> None:
    facts = alignment.facts_by_image([row("a.jpg", kind, question, answer)])["a.jpg"]
    assert facts.caption() == ""
    assert facts.turns() == []


def test_case_records_need_no_conversation() -> None:
    facts = alignment.facts_by_image([{"image": "x.jpg", "view": "PA", "findings": "Clear lungs."}])["x.jpg"]
    assert facts.caption() == "PA X-ray of the chest. Findings: Clear lungs."
    assert [answer for _, answer in facts.turns()] == [facts.caption(), "chest", "X-ray", "PA"]


def test_command_writes_rows_with_images_below_the_root(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.json").write_text(json.dumps([row("a.jpg", "PLANE", "Plane?", "axial", image_organ="ABD")]))
    out = tmp_path / "align.json"
    alignment.main([str(folder / "train.json"), "--root", str(tmp_path), "--out", str(out)])
    rows = json.loads(out.read_text())
    assert {row["image"] for row in rows} == {"set/images/a.jpg"}
    assert [row["conversations"][1]["value"] for row in rows] == ["Axial of the abdomen.", "abdomen", "axial"]
    assert "3 rows" in capsys.readouterr().out


def test_a_file_outside_the_root_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text("[]")
    with pytest.raises(DataError, match="lies outside"):
        alignment.alignment_rows([tmp_path / "train.json"], tmp_path / "elsewhere")


def report(image: str, question: str, answer: str, **fields: Any) -> dict[str, Any]:
    return {key: value for key, value in row(image, "", question, answer, **fields).items() if key != "question_type"}


def test_dicom_rows_state_facts_in_fields_and_findings_in_an_answer() -> None:
    given = report("a.dcm", "Describe the findings of this image.", "Fracture.", modality="CT", body_part="knee")
    facts = alignment.facts_by_image([given])["a.dcm"]
    assert facts.turns()[0] == (
        "Describe the image: modality, organ and findings.",
        "CT of the knee. Findings: Fracture.",
    )


def test_nothing_is_asked_for_that_the_caption_lacks() -> None:
    facts = alignment.facts_by_image([report("a.dcm", "Who?", "me", modality="CT", view="axial")])["a.dcm"]
    assert facts.turns()[0] == ("Describe the image: modality and plane.", "Axial CT.")


def test_image_names_are_kept_and_silent_images_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [report("deep/a.dcm", "Which findings?", "Edema.", modality="CT"), report("b.dcm", "Who?", "me")]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    words = [str(tmp_path / "rows.json"), "--image-folder", str(tmp_path), "--out", str(tmp_path / "out.json")]
    alignment.main(words)
    assert {row["image"] for row in json.loads((tmp_path / "out.json").read_text())} == {"deep/a.dcm"}
    assert "1 of 2 images left out" in capsys.readouterr().out
    (tmp_path / "rows.json").write_text(json.dumps(rows[1:]))
    with pytest.raises(DataError, match="1 images, and no row states modality"):
        alignment.main(words)
