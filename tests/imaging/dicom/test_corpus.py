"""Packaged files of pydicom and pydicom-data: golden images, equal images for all compressions, named rejections."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from PIL import Image
from pydicom import uid

from llava.errors import DataError, LlavaError, NotAnImageError
from llava.imaging import decode
from tests.support.dicom_files import corpus
from tests.support.dicom_golden import GOLDEN, describe

EXPECTED: dict[str, dict[str, Any]] = json.loads(GOLDEN.read_text(encoding="utf-8"))
FILES = dict(corpus())
NATIVE = (uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian)

SAME = [
    ("693_UNCR.dcm", "693_J2KR.dcm"),
    ("693_UNCI.dcm", "693_J2KI.dcm"),
    ("MR2_UNCR.dcm", "MR2_J2KR.dcm"),
    ("RG3_UNCR.dcm", "RG3_J2KR.dcm"),
    ("US1_UNCR.dcm", "US1_J2KR.dcm"),
    ("JPEG2000_UNC.dcm", "JPEG2000.dcm"),
    ("MR_small.dcm", "MR_small_RLE.dcm"),
    ("MR_small.dcm", "MR_small_jp2klossless.dcm"),
    ("MR_small.dcm", "MR_small_jpeg_ls_lossless.dcm"),
    ("MR_small.dcm", "MR_small_bigendian.dcm"),
    ("emri_small.dcm", "emri_small_RLE.dcm"),
    ("emri_small.dcm", "emri_small_jpeg_ls_lossless.dcm"),
    ("SC_rgb.dcm", "SC_rgb_rle.dcm"),
    ("SC_rgb.dcm", "SC_rgb_16bit.dcm"),
    ("SC_rgb.dcm", "SC_rgb_expb_32bit.dcm"),
    ("SC_rgb.dcm", "SC_rgb_jpeg_gdcm.dcm"),
    ("OBXXXX1A.dcm", "OBXXXX1A_expb.dcm"),
    ("OBXXXX1A.dcm", "OBXXXX1A_rle.dcm"),
    ("color-px.dcm", "color-pl.dcm"),
]
"""Pairs of files that hold the same image in two forms."""


def path_of(name: str) -> Path:
    """Return the path of a packaged file; skip the test if it is not installed."""
    found = next((path for key, path in FILES.items() if key.rpartition("-")[0] == name), None)
    if found is None:
        pytest.skip(f"{name} is not installed; it comes with pydicom-data")
    return found


def test_the_corpus_is_there() -> None:
    assert len(FILES) > 100, "pydicom's packaged files are missing"
    assert set(FILES) <= set(EXPECTED), "files without a golden entry; see tests/support/dicom_golden.py"


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_golden(name: str) -> None:
    if name not in FILES:
        pytest.skip("not installed; it comes with pydicom-data")
    found, expected = describe(FILES[name]), EXPECTED[name]
    if "blocks" in expected:
        np.testing.assert_allclose(found.pop("blocks"), expected["blocks"], atol=1.0)
        expected = {"size": expected["size"]}
    assert found == expected


@pytest.mark.parametrize(("plain", "compressed"), SAME)
def test_one_image_whatever_its_form(plain: str, compressed: str) -> None:
    first, second = (
        np.asarray(decode.load_image(path_of(name).read_bytes()), dtype=int) for name in (plain, compressed)
    )
    assert first.std() > 1
    assert np.abs(first - second).max() == 0


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("rtdose.dcm", "RT Dose Storage"),
        ("liver.dcm", "Segmentation Storage"),
        ("reportsi.dcm", "Basic Text SR Storage"),
        ("rtplan.dcm", "RT Plan Storage"),
        ("rtstruct.dcm", "RT Structure Set Storage"),
        ("waveform_ecg.dcm", "12-lead ECG Waveform Storage"),
        ("DICOMDIR", "Media Storage Directory Storage"),
    ],
)
def test_what_is_no_image_is_named(name: str, kind: str) -> None:
    with pytest.raises(NotAnImageError, match="is not an image") as caught:
        decode.load_image(path_of(name).read_bytes())
    assert kind in str(caught.value)


def stored_values(dataset: Any) -> NDArray[Any]:
    """Return the first frame of uncompressed integer pixels, decoded by hand."""
    order = "<" if dataset.original_encoding[1] else ">"
    samples, allocated, bits = dataset.SamplesPerPixel, dataset.BitsAllocated, dataset.BitsStored
    count = dataset.Rows * dataset.Columns * samples
    raw = dataset.PixelData
    if allocated == 8 and order == ">" and dataset["PixelData"].VR == "OW":
        raw = np.frombuffer(raw, "<u2").byteswap().tobytes()
    values = np.frombuffer(raw, f"{order}u{allocated // 8}", count=count).astype(np.int64)
    values &= (1 << bits) - 1
    if dataset.PixelRepresentation:
        values = np.where(values >= 1 << (bits - 1), values - (1 << bits), values)
    if samples == 1:
        return values.reshape(dataset.Rows, dataset.Columns)
    if dataset.get("PlanarConfiguration") == 1:
        return values.reshape(3, dataset.Rows, dataset.Columns).transpose(1, 2, 0)
    return values.reshape(dataset.Rows, dataset.Columns, 3)


def by_hand(dataset: Any) -> NDArray[Any]:
    """Return a plain file by the formulas of the standard: `[H, W, 3]`, 0 to 255, not rounded."""
    values, bits = stored_values(dataset), dataset.BitsStored
    if dataset.SamplesPerPixel == 3:
        return values / (2**bits - 1) * 255
    modality = values * float(dataset.get("RescaleSlope", 1)) + float(dataset.get("RescaleIntercept", 0))
    if dataset.get("WindowCenter") is not None:
        center, width = (np.atleast_1d(dataset[name].value)[0] for name in ("WindowCenter", "WindowWidth"))
        low, high = float(center) - 0.5 - (float(width) - 1) / 2, float(center) - 0.5 + (float(width) - 1) / 2
    elif bits <= 8:
        low, high = 0, 2**bits - 1
    else:
        low, high = modality.min(), modality.max()
    gray = np.clip((modality - low) / (high - low), 0, 1) * 255
    gray = 255 - gray if dataset.PhotometricInterpretation == "MONOCHROME1" else gray
    return np.repeat(gray[:, :, None], 3, axis=2)


PLAIN = ("MONOCHROME1", "MONOCHROME2", "RGB")
SPECIAL = ("ModalityLUTSequence", "VOILUTSequence", "PixelAspectRatio", "PerFrameFunctionalGroupsSequence")


def plain_files() -> list[str]:
    """Return the names of uncompressed files with square pixels and without lookup tables."""
    found = []
    for name, path in FILES.items():
        if "error" in EXPECTED.get(name, {"error": ""}):
            continue
        dataset = pydicom.dcmread(path, force=True)
        spacing = dataset.get("PixelSpacing") or [1, 1]
        is_plain = dataset.file_meta.get("TransferSyntaxUID") in NATIVE
        is_plain = is_plain and dataset.PhotometricInterpretation in PLAIN and spacing[0] == spacing[1]
        if is_plain and not any(keyword in dataset for keyword in SPECIAL):
            found.append(name)
    return sorted(found)


@pytest.mark.parametrize("name", plain_files())
def test_formulas_by_hand(name: str) -> None:
    path = FILES[name]
    found = np.asarray(decode.load_image(path.read_bytes()), dtype=float)
    # One may round a value at x.5 either way; nothing else may differ.
    assert np.abs(found - by_hand(pydicom.dcmread(path, force=True))).max() <= 0.5 + 1e-6


def test_there_are_plain_files_of_every_kind() -> None:
    kinds = set()
    for name in plain_files():
        dataset = pydicom.dcmread(FILES[name], force=True)
        kinds.add((dataset.PhotometricInterpretation, dataset.BitsAllocated, dataset.PixelRepresentation))
    assert {("MONOCHROME2", 16, 1), ("MONOCHROME1", 16, 0), ("RGB", 8, 0), ("RGB", 16, 0)} <= kinds


def test_no_network_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert isinstance(decode.load_image(path_of("CT_small.dcm").read_bytes()), Image.Image)


def test_cut_off_anywhere_is_a_named_error() -> None:
    """Every prefix of a compressed file gives an image or an error of this package."""
    data = path_of("MR_small_RLE.dcm").read_bytes()
    kinds = set()
    for end in range(0, len(data), 61):
        try:
            decode.load_image(data[:end])
        except LlavaError as error:
            kinds.add(type(error))
    assert DataError in kinds
