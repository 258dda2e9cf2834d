"""IU X-ray and MIMIC-CXR from small releases in their formats."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from llava.data.converters import iu_xray, mimic_cxr
from llava.errors import ConfigError, DataError
from llava.imaging.decode import load_image
from tests.support import releases
from tests.support.releases import image_bytes, iu_xml, rows_in, write_csv, write_image

ASKED = "<image>\nProvide a description of the findings in the radiology image"


def all_rows(out: Path) -> list[dict[str, Any]]:
    return [row for path in sorted(out.glob("t*.json")) + sorted(out.glob("val.json")) for row in rows_in(path)]


def excluded(out: Path) -> dict[str, int]:
    """Return the number of excluded rows by cause, over all splits."""
    counts: dict[str, int] = {}
    for split in json.loads((out / "manifest.json").read_text())["splits"].values():
        for cause, number in split.get("excluded", {}).items():
            counts[cause] = counts.get(cause, 0) + number
    return counts


def write_tgz(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def test_iu_xray_from_the_archives(tmp_path: Path) -> None:
    texts = {number: ("Clear." if number % 2 else None) for number in range(1, 81)}
    xml = {f"ecgen-radiology/{n}.xml": iu_xml(n, text, [f"CXR{n}_1_IM-{n:04}-3001"]) for n, text in texts.items()}
    reports = write_tgz(tmp_path / "NLMCXR_reports.tgz", {name: text.encode() for name, text in xml.items()})
    files = {f"CXR{n}_1_IM-{n:04}-3001.png": image_bytes(n) for n in texts}
    images = write_tgz(tmp_path / "NLMCXR_png.tgz", files)
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="--views all"):
        iu_xray.main([str(reports), str(images), "--out", str(out)])
    iu_xray.main([str(reports), str(images), "--out", str(out), "--views", "all"])
    rows = all_rows(out)
    assert sorted(row["study"] for row in rows) == sorted(f"CXR{n}" for n in range(1, 81, 2))
    assert rows[0]["conversations"][0]["value"] == f"{ASKED} given the following indication: Cough & fever."
    assert rows[0]["license"] == "terms" and rows[0]["problems"] == ["normal"]
    assert load_image(rows[0]["image"], out / "images").size == (8, 8)
    assert excluded(out) == {"report without findings": 40}
    assert {path.stem for path in out.glob("*.json")} == {"train", "val", "test", "manifest"}


def test_iu_xray_from_the_tables(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    empty = {"MeSH": "normal", "image": "PA", "comparison": ""}
    reports = [
        {"uid": "1", "Problems": "Mass;Hernia", "indication": "", "findings": "Clear.", "impression": "", **empty},
        {"uid": "2", "Problems": "normal", "indication": "", "findings": "", "impression": "Fine.", **empty},
    ]
    write_csv(raw / "indiana_reports.csv", reports)
    views = [("1", "4001", "Frontal"), ("1", "3001", "Lateral"), ("2", "1001", "Frontal")]
    table = [{"uid": uid, "filename": f"{uid}_IM-0001-{n}.dcm.png", "projection": view} for uid, n, view in views]
    write_csv(raw / "indiana_projections.csv", table)
    for row in table:
        write_image(raw / "images" / "images_normalized" / row["filename"])
    out = tmp_path / "out"
    iu_xray.main([str(raw), "--out", str(out), "--fractions", "train=1,test=0"])
    rows = rows_in(out / "train.json")
    assert [row["id"] for row in rows] == ["iuxray_1_IM-0001-4001.dcm"]
    assert rows[0]["conversations"][0]["value"] == f"{ASKED}."
    assert rows[0]["problems"] == ["Mass", "Hernia"] and rows[0]["view"] == "Frontal"
    assert excluded(out) == {"not a frontal view": 1, "report without findings": 1}
    # The table of projections states which images of the XML release are frontal.
    xml = tmp_path / "xml"
    xml.mkdir()
    (xml / "1.xml").write_text(iu_xml(1, "Clear.", ["CXR1_1_IM-0001-3001", "CXR1_1_IM-0001-4001"]))
    for name in ("CXR1_1_IM-0001-3001", "CXR1_1_IM-0001-4001"):
        write_image(xml / f"{name}.png")
    write_csv(xml / "indiana_projections.csv", table)
    iu_xray.main([str(xml), "--out", str(tmp_path / "out2"), "--fractions", "train=1"])
    assert [row["image"] for row in rows_in(tmp_path / "out2" / "train.json")] == ["CXR1_1_IM-0001-4001.png"]


def test_iu_xray_broken_report(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "1.xml").write_text('<!DOCTYPE r [<!ENTITY a "b">]><eCitation>&a;</eCitation>')
    with pytest.raises(DataError, match=r"1\.xml.*declares an entity"):
        iu_xray.main([str(raw), "--views", "all", "--out", str(tmp_path / "out")])


def test_mimic_cxr_findings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jpg, reports = releases.mimic_cxr(tmp_path)
    out = tmp_path / "out"
    mimic_cxr.main([str(jpg), str(reports), "--out", str(out)])
    train = rows_in(out / "train.json")[0]
    assert train["id"] == "10000032_50414267_aaaa"
    assert train["image"] == "p10/p10000032/s50414267/aaaa.jpg"
    assert train["conversations"][0]["value"] == f"{ASKED} given the following indication: ___F with cough // r/o"
    assert train["conversations"][1]["value"] == "Lungs are clear."
    wanted = {"patient": "10000032", "study": "50414267", "view": "PA", "orientation": "Erect"}
    assert wanted.items() <= train.items()
    assert train["chexpert_labels"] == {"Cardiomegaly": -1.0, "No Finding": 1.0}
    assert rows_in(out / "val.json")[0]["conversations"][0]["value"] == f"{ASKED}."
    assert rows_in(out / "val.json")[0]["official_split"] == "val"
    assert [row["reason"] for row in rows_in(out / "test.json")] == ["Fever."]
    causes = ("not a frontal view (AP or PA)", "view not stated", "report without findings")
    assert excluded(out) == dict.fromkeys(causes, 1)
    shown = capsys.readouterr()
    assert "Opacity" not in shown.out + shown.err and "cough" not in (out / "manifest.json").read_text()


def test_mimic_cxr_impression_all_views_reports_as_zip(tmp_path: Path) -> None:
    jpg, reports = releases.mimic_cxr(tmp_path)
    archive = tmp_path / "mimic-cxr-reports.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in reports.rglob("*.txt"):
            file.write(path, path.relative_to(reports))
    out = tmp_path / "out"
    flags = ["--target", "impression", "--views", "all", "--reason", "False", "--limit", "1"]
    mimic_cxr.main([str(jpg), str(archive), "--out", str(out), *flags])
    assert [row["id"][-4:] for row in rows_in(out / "train.json")] == ["aaaa"]  # one row of each split
    asked = rows_in(out / "test.json")[0]["conversations"]
    assert [turn["value"] for turn in asked] == [
        "<image>\nProvide the impression of the radiology image.",
        "No change.",
    ]


def test_mimic_cxr_message_says_how_to_get_access(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"(?s)no mimic-cxr-2\.0\.0-split\.csv.*data use agreement"):
        mimic_cxr.main([str(tmp_path / "empty"), "--out", str(tmp_path / "out")])


def test_mimic_cxr_missing_report_shows_no_text(tmp_path: Path) -> None:
    jpg, reports = releases.mimic_cxr(tmp_path)
    (reports / "files/p10/p10000935/s51178377.txt").write_bytes(b"FINDINGS: secret \xff")
    with pytest.raises(DataError, match=r"split\.csv\.gz, row 5, id '10000935_51178377_eeee'") as caught:
        mimic_cxr.main([str(jpg), str(reports), "--out", str(tmp_path / "out")])
    assert "secret" not in str(caught.value)


def annotation(study: int, findings: Any, **other: Any) -> dict[str, Any]:
    name = f"mimic/p10/p10000032/s{study}/aaaa.jpg"
    turns = [{"from": "human", "value": "<image>\nDescribe."}, {"from": "gpt", "value": findings}]
    row = {"id": f"10000032_{study}", "image": name, "generate_method": "rule-based", "view": "AP", "reason": "pain"}
    return {**row, "chexpert_labels": {"Edema": 1.0, "Mass": float("nan")}, "conversations": turns, **other}


def test_annotations_of_llava_rad(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    rows = [
        annotation(1, "Clear.", reason="cough\nfever"),
        annotation(1, "Clear lungs.", generate_method="gpt4", reason=float("nan")),
        annotation(1, float("nan")),
        annotation(1, "Clear.", view=float("nan")),
        annotation(1, "Clear.", view="LATERAL"),
    ]
    for word in ("train", "test"):
        releases.write_rows(raw / f"chat_{word}_MIMIC_CXR_all_gpt4extract_rulebased_v1.json", rows)
    write_image(raw / "files/p10/p10000032/s1/aaaa.jpg")
    out = tmp_path / "out"
    mimic_cxr.main([str(raw), "--annotations", "--out", str(out)])
    train, test = rows_in(out / "train.json"), rows_in(out / "test.json")
    assert [row["id"] for row in train] == ["10000032_1_aaaa", "10000032_1_aaaa_gpt4"]
    assert train[0]["conversations"][0]["value"] == f"{ASKED} given the following indication: cough fever"
    assert train[1]["conversations"][0]["value"] == f"{ASKED}."
    assert train[0]["chexpert_labels"] == {"Edema": 1.0} and train[0]["image"] == "p10/p10000032/s1/aaaa.jpg"
    assert [row["generate_method"] for row in test] == ["rule-based"]
    counts = json.loads((out / "manifest.json").read_text())["splits"]["test"]["excluded"]
    assert counts == {"no findings": 1, "not a frontal view (AP or PA)": 2, "test row not extracted by rules": 1}
    flags = ["--annotations", "--loader", "mimic_cxr_all_views_findings"]
    mimic_cxr.main([str(raw), "--out", str(tmp_path / "views"), *flags])
    asked = [row["conversations"][0]["value"] for row in rows_in(tmp_path / "views" / "train.json")]
    start = "<image>\nGiven the chest X-ray image from {} view, describe the findings in the image: "
    assert asked == [start.format(view) for view in ("AP", "AP", "Unknown", "LATERAL")]
    flags[2] = "mimic_cxr_all_frontal_findings"
    mimic_cxr.main([str(raw), "--out", str(tmp_path / "frontal"), *flags])
    assert rows_in(tmp_path / "frontal" / "train.json")[0]["conversations"][0]["value"] == "<image>\nDescribe."
