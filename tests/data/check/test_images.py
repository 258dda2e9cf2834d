"""Images of a data file: missing, broken, truncated or equal; and overlap of two files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava.data.check.page import write_page
from llava.data.check.report import CheckReport, check_file, report_data, report_summary
from llava.errors import ConfigError
from tests.support.check_files import check_rows, row, rules_of, smooth, write_rows


def folder(tmp_path: Path, name: str = "images") -> Path:
    path = tmp_path / name
    path.mkdir()
    return path


def listed(report: CheckReport, rule: str) -> list[dict[str, Any]]:
    rules = report_data(report, strict=False)["rules"]
    return next((entry["listed"] for entry in rules if entry["rule"] == rule), [])


def test_missing_broken_and_truncated_images(tmp_path: Path) -> None:
    images = folder(tmp_path)
    smooth(0).save(images / "good.png")
    (images / "cut.png").write_bytes((images / "good.png").read_bytes()[:-40])
    (images / "text.png").write_text("not an image")
    (images / "none.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"\0" * 20)
    (tmp_path / "outside.png").write_bytes((images / "good.png").read_bytes())
    names = ["good.png", "cut.png", "text.png", "absent.png", "../outside.png", "a\0b.png", "", "x" * 300, "none.dcm"]
    rows = [row(number, name) for number, name in enumerate(names)]
    rows.append(row(9, image=["good.png", "absent.png"]))
    report = check_file(write_rows(tmp_path / "rows.json", rows), images=images)
    found = rules_of(report)
    assert found["image-missing"] == [3, 4, 5, 7, 9]
    assert found["image-broken"] == [1, 2, 8]
    assert {"cut.png", "text.png", "none.dcm"} == {entry["images"][0] for entry in listed(report, "image-broken")}
    assert not any("0x" in entry["message"] for entry in listed(report, "image-broken"))
    assert report.exit_status(strict=False) == 1


def test_files_that_are_not_regular_are_broken_and_never_waited_for(tmp_path: Path) -> None:
    images = folder(tmp_path)
    os.mkfifo(images / "pipe.png")
    (images / "folder.png").mkdir()
    (images / "link.png").symlink_to(images / "pipe.png")
    names = ["pipe.png", "folder.png", "link.png"]
    report = check_file(
        write_rows(tmp_path / "rows.json", [row(n, name) for n, name in enumerate(names)]), images=images
    )
    assert rules_of(report)["image-broken"] == [0, 1, 2] and "image-missing" not in rules_of(report)
    assert all("expected a regular file" in entry["message"] for entry in listed(report, "image-broken"))


def test_without_a_folder_no_image_is_opened(tmp_path: Path) -> None:
    report = check_file(write_rows(tmp_path / "rows.json", [row(0, "absent.png")]))
    assert rules_of(report) == {} and not report.image_scan.opened
    assert report_data(report, strict=True)["pictures"] == {"named": 1, "opened": False}
    with pytest.raises(ConfigError, match=r"--images .*absent: no such folder"):
        check_file(tmp_path / "rows.json", images=tmp_path / "absent")


def test_sizes_and_forms_are_counted(tmp_path: Path) -> None:
    images = folder(tmp_path)
    smooth(0, 40).save(images / "a.png")
    smooth(1, 50).convert("RGB").save(images / "b.jpg")
    smooth(2, 40).save(images / "c.png")
    rows = [row(number, name) for number, name in enumerate(["a.png", "b.jpg", "c.png"])]
    report = check_file(write_rows(tmp_path / "rows.json", rows), images=images)
    found = report_data(report, strict=False)["pictures"]
    assert found["forms"] == {"PNG L": 2, "JPEG RGB": 1}
    assert found["sizes"] == {"40 x 40": 2, "50 x 50": 1}
    assert found["sides"]["width"] == {"smallest": 40, "median": 40, "largest": 50}


def test_a_file_without_rows(tmp_path: Path) -> None:
    found = check_rows(tmp_path, [], images=folder(tmp_path), against=write_rows(tmp_path / "test.json", []))
    assert found == {"no-rows": []}


def compare(tmp_path: Path, rows: list[Any], others: list[Any], **options: Any) -> CheckReport:
    path = write_rows(tmp_path / "train.json", rows)
    return check_file(path, against=write_rows(tmp_path / "test.json", others), **options)


def test_shared_images_by_bytes_and_by_pixels(tmp_path: Path) -> None:
    train, test = folder(tmp_path, "train"), folder(tmp_path, "test")
    for place, name in [(train, "a.png"), (test, "other.png")]:
        smooth(0).save(place / name)
    smooth(1).save(train / "b.png")
    smooth(1).convert("RGB").save(test / "b.bmp")
    smooth(2).save(train / "c.png")
    smooth(3).save(test / "c.png")  # another image of the same name
    rows = [row(0, "a.png"), row(1, "b.png"), row(2, "c.png"), row(3, "a.png")]
    report = compare(
        tmp_path,
        rows,
        [row(10, "c.png"), row(11, "b.bmp"), row(12, "other.png")],
        images=train,
        against_images=test,
    )
    assert rules_of(report) == {"leak-bytes": [0, 3], "leak-pixels": [1]}
    assert listed(report, "leak-bytes") == [
        {
            "rows": [0, 3],
            "message": "a.png is other.png of the other file",
            "images": ["a.png", "other.png"],
            "other_rows": [2],
        }
    ]


def test_shared_persons_and_questions(tmp_path: Path) -> None:
    images = folder(tmp_path)
    for number in range(4):
        smooth(number).save(images / f"{number}.png")
    (images / "copy.png").write_bytes((images / "0.png").read_bytes())
    asked = row(5)["conversations"]
    rows = [
        row(5, "0.png", PatientID="7"),
        row(5, "1.png", study_id=31),
        row(2, "2.png", patient="", subject_id="unknown"),
        row(3, "2.png", study=8),
    ]
    shouted = [{"from": "human", "value": "<image>\nIS sign 5, seen HERE"}, asked[1]]
    others = [
        row(9, "copy.png", conversations=shouted),
        row(8, "3.png", patient_id=7, study="31", subject_id="unknown", patient=""),
    ]
    found = rules_of(compare(tmp_path, rows, others, images=images))
    assert found == {
        "leak-bytes": [0],
        "leak-group": [0],  # the field patient_id by any spelling; study_id and study are other fields
        "leak-pair": [0],
        "leak-question": [1],
        "repeated-id": [1],
    }
    chosen = rules_of(compare(tmp_path, rows, others, images=images, group_fields=["study"]))
    assert "leak-group" not in chosen


def test_the_value_of_a_shared_field_is_not_shown(tmp_path: Path) -> None:
    report = compare(tmp_path, [row(0, patient="Roe, Jane")], [row(1, patient="Roe, Jane ")])
    assert rules_of(report) == {"leak-group": [0]}
    assert "Roe" not in json.dumps(report_data(report, strict=False))


def test_the_output_says_whether_persons_were_compared(tmp_path: Path) -> None:
    both = compare(tmp_path, [row(0, patient="a"), row(1, patient="b")], [row(2, patient="c")])
    assert "persons: compared by patient (2 and 1 distinct)" in report_summary(both, strict=False)
    write_page(tmp_path / "check.html", both, strict=False)
    assert "persons: compared by patient" in (tmp_path / "check.html").read_text()
    assert report_data(both, strict=False)["persons"] == {"patient": [2, 1]}
    other = compare(tmp_path, [row(0, patient="a")], [row(2, subject_id="c")])
    assert (
        "persons: NOT compared" in (text := report_summary(other, strict=False)) and "only one file has patient" in text
    )
    assert "persons" not in report_summary(
        check_file(write_rows(tmp_path / "alone.json", [row(0, patient="a")])), strict=False
    )


def test_patients_match_in_every_spelling_of_their_number(tmp_path: Path) -> None:
    """Tables write integers in a column with gaps as floats, and gaps as words without meaning."""
    ours = [row(n, patient=value) for n, value in enumerate([40.0, 41, "42", 43.5, float("nan"), "NaN", None, True])]
    theirs = [
        row(n, patient=value) for n, value in enumerate([40, "41", 42.0, 43.5, float("nan"), "NaN", None, True], 9)
    ]
    path, other = write_rows(tmp_path / "train.json", ours), write_rows(tmp_path / "test.json", theirs)
    assert rules_of(check_file(path, against=other)) == {"leak-group": [0, 1, 2]}


def test_order_of_images_matters(tmp_path: Path) -> None:
    images = folder(tmp_path)
    for number in range(2):
        smooth(number).save(images / f"{number}.png")
    turns = [{"from": "human", "value": "<image><image> Which?"}, {"from": "gpt", "value": "This."}]
    rows = [row(0, image=["0.png", "1.png"], conversations=turns)]
    swapped = [row(0, image=["1.png", "0.png"], conversations=turns)]
    assert "leak-pair" in rules_of(compare(tmp_path, rows, rows, images=images))
    assert "leak-pair" not in rules_of(compare(tmp_path, rows, swapped, images=images))


def test_unopened_images_are_compared_by_name(tmp_path: Path) -> None:
    report = compare(tmp_path, [row(0, "a.png"), row(1, "b.png")], [row(2, "a.png"), row(1, "c.png")])
    assert rules_of(report) == {"leak-name": [0], "leak-question": [1]}
    assert report.exit_status(strict=False) == 0 and report.exit_status(strict=True) == 1


@pytest.mark.parametrize("other", ["./a.png", "x/../a.png", ".//a.png", "x\\..\\a.png", "./././a.png"])
def test_unopened_images_are_compared_as_paths(tmp_path: Path, other: str) -> None:
    report = compare(tmp_path, [row(0, "a.png"), row(1, "b.png")], [row(2, other), row(0, other)])
    assert rules_of(report) == {"leak-name": [0], "leak-pair": [0]}
    assert "repeated-row" in check_rows(tmp_path, [row(0, "a.png"), row(0, other)])


def test_opened_images_with_two_spellings_are_compared_by_content(tmp_path: Path) -> None:
    images = folder(tmp_path)
    smooth(0).save(images / "a.png")
    report = compare(tmp_path, [row(0, "a.png")], [row(1, "./a.png")], images=images)
    assert "leak-bytes" in rules_of(report)


def test_broken_images_leak_nothing(tmp_path: Path) -> None:
    images = folder(tmp_path)
    (images / "a.png").write_text("broken")
    report = compare(tmp_path, [row(0, "a.png")], [row(0, "a.png")], images=images)
    assert rules_of(report) == {"image-broken": [0], "leak-question": [0]}


def test_real_questions_share_every_test_image(shared: Path) -> None:
    data = shared / "data" / "vqa-rad"
    report = check_file(data / "train.json", images=data / "images", against=data / "test.json", max_listed=500)
    assert report.exit_status(strict=False) == 1
    named = {name for entry in listed(report, "leak-bytes") for name in entry["images"]}
    assert named == {entry["image"] for entry in json.loads((data / "test.json").read_text())}


def test_real_notes_have_no_errors(shared: Path) -> None:
    data = shared / "data" / "cxr-notes"
    report = check_file(data / "train.json", images=data / "images", against=data / "test.json")
    assert report.exit_status(strict=False) == 0 and report.findings.count("error") == 0
    assert report.num_not_trainable() == 127
    assert {"near-duplicate", "same-picture"} <= rules_of(report).keys()


@pytest.mark.parametrize("num_threads", [1, 5])
def test_images_keep_their_order_with_any_number_of_threads(tmp_path: Path, num_threads: int) -> None:
    images = folder(tmp_path)
    for number in range(12):
        Image.new("L", (4 + number, 4), number * 9).save(images / f"{number}.png")
    rows = write_rows(tmp_path / "rows.json", [row(number, f"{number}.png") for number in range(12)])
    report = check_file(rows, images=images, num_threads=num_threads)
    assert list(report.image_scan.widths) == list(range(4, 16))
