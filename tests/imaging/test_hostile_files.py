"""Image files that would run a program, or keep the decoder busy, are refused."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGBaseline8Bit

from llava.errors import DataError
from llava.imaging.decode import load_image
from tests.support.dicom_files import make_dataset

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
JPEG_INSIDE = 5
"""IPTC's number of a compression for which Pillow opens what is inside, of any format."""


def iptc(content: bytes) -> bytes:
    """Return an IPTC file of 10 x 10 gray pixels around the bytes of another file."""
    fields = [(3, 60, b"\1\0"), (3, 20, b"\n"), (3, 30, b"\n"), (3, 120, bytes([JPEG_INSIDE])), (8, 10, content)]
    return b"".join(struct.pack(">BBBH", 0x1C, *tag, len(value)) + value for *tag, value in fields)


FILES = {
    "text": POSTSCRIPT,
    "with a DOS header": struct.pack("<II", 0xC6D3D0C5, 30)
    + struct.pack("<I", len(POSTSCRIPT))
    + bytes(18)
    + POSTSCRIPT,
    "in an IPTC file": iptc(POSTSCRIPT),
    "of another level": POSTSCRIPT.replace(b"EPSF-3.0", b"EPSF-1.2"),
    "without EPSF": POSTSCRIPT.replace(b" EPSF-3.0", b""),
}


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that a program in the place of Ghostscript writes."""
    ghostscript = tmp_path / "gs"
    ghostscript.write_text(f"#!/bin/sh\necho ran > {tmp_path / 'ran'}\nexit 1\n")
    ghostscript.chmod(0o755)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", str(ghostscript))
    return tmp_path / "ran"


@pytest.mark.parametrize("name", FILES)
def test_postscript_is_not_run(program: Path, name: str) -> None:
    with pytest.raises(DataError, match="cannot be decoded"):
        load_image(FILES[name])
    assert not program.exists()


@pytest.mark.parametrize("name", ["text", "with a DOS header", "in an IPTC file"])
def test_pillow_alone_would_run_it(program: Path, name: str) -> None:
    Image.init()
    with pytest.raises(Exception), Image.open(io.BytesIO(FILES[name])) as image:  # noqa: B017 - of any type
        image.load()
    assert program.exists()


def progressive(num_scans: int) -> bytes:
    """Return a progressive JPEG image whose last scan, of a few bytes, is repeated."""
    buffer = io.BytesIO()
    Image.new("L", (64, 64), 90).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * (num_scans - data.count(b"\xff\xda") + 1) + data[-2:]


@pytest.mark.parametrize("num_scans", [101, 5000])
def test_a_jpeg_image_of_many_scans_is_refused(num_scans: int) -> None:
    with pytest.raises(DataError, match=rf"{num_scans} JPEG scans; expected at most 100"):
        load_image(progressive(num_scans))


def test_the_usual_scans_are_read() -> None:
    assert (np.asarray(load_image(progressive(100))) == 90).all()


def test_marks_of_scans_in_metadata_and_after_the_end_are_none() -> None:
    data, marks = progressive(20), b"\xff\xda" * 200
    segment = b"\xff\xe1" + (len(marks) + 2).to_bytes(2) + marks
    for found in (data + marks, data[:2] + segment + data[2:], data[:2] + b"\xff" + segment + data[2:] + marks):
        assert np.array_equal(np.asarray(load_image(found)), np.asarray(load_image(data)))


def test_many_scans_in_a_dicom_file_are_refused(tmp_path: Path) -> None:
    for num_scans in (100, 101):
        dataset = make_dataset(np.zeros((64, 64), np.uint8), TransferSyntaxUID=JPEGBaseline8Bit)
        dataset.PixelData = encapsulate([progressive(num_scans)])
        dataset.save_as(tmp_path / f"{num_scans}.dcm")
    assert (np.asarray(load_image("100.dcm", tmp_path)) == 90).all()
    with pytest.raises(DataError, match=r"image 101\.dcm has 101 JPEG scans"):
        load_image("101.dcm", tmp_path)
