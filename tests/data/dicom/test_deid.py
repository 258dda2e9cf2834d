"""Clean copies of DICOM files: no identifying content, same pixels, reproducible identifiers."""

from __future__ import annotations

import json
import logging
import string
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image, ImageDraw
from pydicom.datadict import DicomDictionary
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset

from llava.data.dicom import deid
from llava.data.dicom.deid import MIN_STROKES, inspect_dataset, max_strokes
from llava.data.dicom.deid_profile import ACTIONS, KEPT_BYTES, KEPT_SEQUENCES
from llava.errors import ConfigError, DataError
from llava.imaging import decode
from tests.support.dicom_files import SECRET, corpus, make, make_dataset, to_bytes

SALT = b"0123456789abcdef"
TEXT_TYPES = {"AE", "LO", "LT", "PN", "SH", "ST", "UC", "UR", "UT", "AS", "DA", "DT", "TM"}
GRADIENT = np.arange(64, dtype=np.uint16).reshape(8, 8)


def secret_of(kind: str) -> str:
    """Return a value that is valid in a field of this type and can be searched for."""
    return {"DA": "19010203", "DT": "19010203112233", "TM": "112233.445566", "AS": "097Y"}.get(kind, SECRET)


def copy_of(data: bytes) -> tuple[Dataset, bytes]:
    """Return the clean copy of a file, read again, and its bytes."""
    _, content = deid.clean_copy(deid.read_dataset(data, "x"), SALT)
    return pydicom.dcmread(pydicom.filebase.DicomBytesIO(content)), content


def crowded() -> Dataset:
    """Return a file with a secret in every text field, at the top level and in a sequence that stays."""
    dataset = make_dataset(GRADIENT, Modality="CT")
    inner = Dataset()
    for tag, (kind, _, _, _, keyword) in DicomDictionary.items():
        if kind in TEXT_TYPES and keyword and tag >> 16 > 0x0008:
            inner.add(DataElement(tag, kind, secret_of(kind)))
            dataset.add(DataElement(tag, kind, secret_of(kind)))
    dataset.SharedFunctionalGroupsSequence = [inner]
    block = dataset.private_block(0x0011, SECRET, create=True)
    block.add_new(0x01, "LO", SECRET)
    dataset.add(DataElement(0x60003000, "OW", SECRET.encode() + b"\0"))
    dataset.add(DataElement(0x60004000, "LT", SECRET))
    dataset.preamble = SECRET.encode().ljust(128, b"\0")
    return dataset


def test_nothing_of_any_text_field_stays() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom complains about what this test writes
        data = to_bytes(crowded())
    assert data.count(SECRET.encode()) > 1000
    copy, content = copy_of(data)
    for secret in (SECRET, SECRET[:5], "19010203", "112233", "097Y", "4711"):
        assert secret.encode() not in content
    assert not [element for element in copy.iterall() if element.tag.is_private]
    assert copy.PatientIdentityRemoved == "YES" and str(copy.PatientName) == copy.PatientID


@pytest.mark.parametrize(
    ("keyword", "value", "stays"),
    [
        ("BodyPartExamined", "CHEST", True),
        ("BodyPartExamined", "ZZYZX", False),
        ("ViewPosition", "PA", True),
        ("ViewPosition", SECRET, False),
        ("KVP", "120", True),
        ("PatientSex", "F", False),
        ("PatientWeight", "71.5", False),
        ("StudyDate", "19010203", False),
        ("RescaleSlope", "2", True),
    ],
)
def test_single_fields(keyword: str, value: str, stays: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = make(GRADIENT, **{keyword: value})
    copy, _ = copy_of(data)
    assert bool(copy.get(keyword)) is stays
    said = inspect_dataset(deid.read_dataset(data, "x"), None).fields.get(keyword, "kept")
    assert (said == "kept") is stays, "the report states the treatment of the field"


def test_identifiers_are_new_and_still_fit_together() -> None:
    first, _ = copy_of(make(GRADIENT, SOPInstanceUID="1.2.1"))
    again, _ = copy_of(make(GRADIENT, SOPInstanceUID="1.2.1"))
    second, _ = copy_of(make(GRADIENT, SOPInstanceUID="1.2.2"))
    assert first.SOPInstanceUID == again.SOPInstanceUID != second.SOPInstanceUID
    assert first.StudyInstanceUID == second.StudyInstanceUID != "1.2.3"
    assert first.PatientID == second.PatientID
    assert first.SOPClassUID == pydicom.uid.SecondaryCaptureImageStorage
    assert first.file_meta.MediaStorageSOPInstanceUID == first.SOPInstanceUID
    other = deid.clean_copy(deid.read_dataset(make(GRADIENT, SOPInstanceUID="1.2.1"), "x"), b"another salt 123")
    assert first.SOPInstanceUID.encode() not in other[1]


WITH_TEXT = ("OBXXXX1A.dcm", "gdcm-US-ALOKA-16.dcm", "mlut_18.dcm", "examples_rgb_color.dcm")
NOT_WITH_TEXT = ("CT_small.dcm", "MR_small.dcm", "color-px.dcm", "eCT_Supplemental.dcm", "bad_sequence.dcm")


def test_text_in_packaged_files() -> None:
    found = {}
    for _, path in corpus():
        if path.name in WITH_TEXT + NOT_WITH_TEXT:
            found[path.name] = max_strokes(decode.load_image(path.read_bytes(), dicom=deid.WHOLE_RANGE)) >= MIN_STROKES
    assert len(found) >= 3
    assert found == {name: name in WITH_TEXT for name in found}


IMAGE_FILES = [
    "693_UNCR.dcm",
    "MR_small_RLE.dcm",
    "MR_small_jpeg_ls_lossless.dcm",
    "emri_small_jpeg_2k_lossless.dcm",
    "OBXXXX1A_expb.dcm",
    "gdcm-US-ALOKA-16.dcm",
    "examples_ybr_color.dcm",
    "eCT_Supplemental.dcm",
    "vlut_04.dcm",
    "mlut_18.dcm",
    "image_dfl.dcm",
    "6293",
    "MR-SIEMENS-DICOM-WithOverlays.dcm",
]


CLEANED = {"emri_small_jpeg_2k_lossless.dcm", "mlut_18.dcm"}
"""Files with comments in their frames, and with the sign of only some values in the unused bits: both are removed."""


@pytest.mark.parametrize("name", IMAGE_FILES)
def test_the_image_is_unchanged(name: str) -> None:
    path = next((path for _, path in corpus() if path.name == name), None)
    if path is None:
        pytest.skip(f"{name} is not installed; it comes with pydicom-data")
    data = path.read_bytes()
    original = deid.read_dataset(data, name)
    copy, content = copy_of(data)
    assert decode.load_image(content).tobytes() == decode.load_image(data).tobytes()
    if name not in CLEANED:
        assert copy.PixelData == original.PixelData
    for element in original.iterall():
        if element.VR in ("PN", "LO") and isinstance(element.value, str) and len(element.value) > 6:
            assert element.value.encode("utf-8", "replace") not in content, element.keyword


def write_folder(folder: Path) -> Path:
    """Write a slice without findings, an ultrasound, a slice with a line of text, and invalid files."""
    folder.mkdir()
    (folder / "quiet").write_bytes(make(GRADIENT, Modality="MR", SOPInstanceUID="1.1"))
    (folder / "us").write_bytes(make(GRADIENT, Modality="US", SOPInstanceUID="1.2"))
    page = Image.new("L", (256, 256))
    ImageDraw.Draw(page).text((20, 20), "DOE JOHN 1901-02-03 ID 4711", fill=255)
    (folder / "written").write_bytes(make(np.asarray(page), Modality="CT", SOPInstanceUID="1.3"))
    (folder / "cut").write_bytes(make(GRADIENT, Modality="MR", SOPInstanceUID="1.4")[:-8])
    (folder / "notes.txt").write_text(SECRET)
    return folder


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    folder, out, report = write_folder(tmp_path / "in"), tmp_path / "out", tmp_path / "report.json"
    words = [str(folder), "--out", str(out), "--salt_file", str(tmp_path / "salt"), "--report", str(report)]
    deid.main(words)
    found: dict[str, Any] = json.loads(report.read_text())
    assert {path for path, entry in found.items() if entry.get("copy")} == {"quiet"}
    assert found["quiet"]["fields"]["PatientName"] == "replaced" and not found["quiet"]["suspicions"]
    assert "modality" in found["us"]["suspicions"][0] and "strokes" in found["written"]["suspicions"][0]
    assert "is truncated" in found["cut"]["left_out"] and "not a DICOM" in found["notes.txt"]["left_out"]
    printed = capsys.readouterr()
    for text in (report.read_text(), printed.out, printed.err, caplog.text):
        assert SECRET[:5] not in text and "4711" not in text
    [copy] = out.rglob("*.dcm")
    assert set(str(copy.relative_to(out))) <= set(string.hexdigits.lower() + "/.dcm")
    before = {file: file.read_bytes() for file in out.rglob("*.dcm")}
    deid.main([*words, "--burned_in", "keep"])
    after = {file: file.read_bytes() for file in out.rglob("*.dcm")}
    assert len(after) == 3 and before.items() <= after.items()
    assert (folder / "quiet").read_bytes() == make(GRADIENT, Modality="MR", SOPInstanceUID="1.1")


def test_no_copy_replaces_that_of_another_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out, report = write_folder(tmp_path / "in"), tmp_path / "out", tmp_path / "report.json"
    (folder / "same_instance").write_bytes(make(GRADIENT[::-1].copy(), Modality="MR", SOPInstanceUID="1.1"))
    words = [str(folder), "--out", str(out), "--salt_file", str(tmp_path / "salt"), "--report", str(report)]
    for _ in range(2):  # a second run writes the same file again
        deid.main(words)
        [copy] = out.rglob("*.dcm")
        assert (pydicom.dcmread(copy).pixel_array == GRADIENT).all()
        assert "repeats an instance" in json.loads(report.read_text())["same_instance"]["left_out"]
        printed = capsys.readouterr().out
        assert "1 clean copies written\n         2 files held back" in printed and "\n3 files left out: " in printed


def test_out_requires_a_salt_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--out requires --salt-file"):
        deid.main([str(write_folder(tmp_path / "in")), "--out", str(tmp_path / "out")])


def test_out_must_not_lie_inside_the_folder(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in")
    with pytest.raises(ConfigError, match="lies inside"):
        deid.main([str(folder), "--out", str(folder / "out"), "--salt_file", str(tmp_path / "salt")])


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a folder"):
        deid.main([str(tmp_path / "absent")])


def test_inspecting_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(tmp_path / "in")
    before = sorted(tmp_path.rglob("*"))
    deid.main([str(folder)])
    assert sorted(tmp_path.rglob("*")) == before
    assert "2 files may contain burned-in text" in capsys.readouterr().out


def test_text_is_distinguished_from_image_content() -> None:
    noise = np.clip(np.random.default_rng(0).rayleigh(30, (256, 256)), 0, 255)
    assert max_strokes(Image.fromarray(noise.astype(np.uint8))) < MIN_STROKES
    smooth = np.outer(np.hanning(256), np.hanning(256)) * 255
    assert max_strokes(Image.fromarray(smooth.astype(np.uint8))) == 0
    written = Image.fromarray((smooth / 3).astype(np.uint8))
    ImageDraw.Draw(written).text((10, 10), "NAME OF SOMEBODY", fill=255)
    assert max_strokes(written) >= MIN_STROKES


def test_the_tables_name_fields_that_exist() -> None:
    known = {entry[4] for entry in DicomDictionary.values()}
    assert set(ACTIONS) | KEPT_BYTES | KEPT_SEQUENCES <= known
