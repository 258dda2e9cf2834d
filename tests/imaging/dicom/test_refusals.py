"""Rejected DICOM files, one rule each: limits, bombs, videos, no patient data in messages, changed bytes."""

from __future__ import annotations

import io
import logging
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom import uid

from llava.errors import DataError, LlavaError, MissingDependency, NotAnImageError
from llava.imaging import decode
from llava.imaging.dicom import header, pixels
from llava.imaging.dicom.streams import Extent, extent_of
from tests.support.dicom_files import RAMP, SECRET, corpus, make, make_dataset, to_bytes

ROOT = Path(__file__).resolve().parents[3]


def test_limits_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    for fields, message in (
        ({"Rows": 60000, "Columns": 60000}, "60000 x 60000 pixels, more than"),
        ({"NumberOfFrames": 2**30}, "states 1073741824 frames"),
        ({"NumberOfFrames": 1000}, "is truncated"),
        ({"Rows": 0}, "is empty"),
        ({"BitsAllocated": 24}, "bits stored in 24"),
        ({"SamplesPerPixel": 2}, "2 values per pixel"),
        ({"PixelData": None}, "has no pixel data"),
        ({"PixelAspectRatio": [20, 1], "Rows": 30000, "Columns": 300}, "truncated"),
    ):
        dataset = make_dataset(np.zeros((4, 4), np.uint8))
        for name, value in fields.items():
            if value is None:
                del dataset[name]
            else:
                setattr(dataset, name, value)
        with pytest.raises(DataError, match=message):
            decode.load_image(to_bytes(dataset))
    monkeypatch.setattr(decode, "MAX_PIXELS", 100)
    with pytest.raises(DataError, match="square pixels, more than"):
        decode.load_image(make(np.zeros((5, 4), np.uint8), PixelAspectRatio=[10, 1]))


def test_a_deflated_bomb_is_not_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    data = make(np.zeros((1000, 1000), np.uint8), TransferSyntaxUID=uid.DeflatedExplicitVRLittleEndian)
    assert len(data) < 5000 and decode.load_image(data).size == (1000, 1000)
    monkeypatch.setattr(header, "MAX_INFLATED", 100_000)
    with pytest.raises(DataError, match="decompresses to more than"):
        decode.load_image(data)


def test_compressed_data_that_state_another_size_are_not_decoded() -> None:
    data = next(path for _, path in corpus() if path.name == "MR_small_jp2klossless.dcm").read_bytes()
    place = data.index(b"\xff\x4f\xff\x51") + 8
    bomb = data[:place] + (60000).to_bytes(4, "big") * 2 + data[place + 8 :]
    with pytest.raises(DataError, match="compressed image of 60000 x 60000"):
        decode.load_image(bomb)
    stream = io.BytesIO()
    Image.new("L", (30, 20)).save(stream, format="JPEG")
    assert extent_of(stream.getvalue()) == Extent(20, 30, 1, 8)
    assert extent_of(stream.getvalue()[:20]) is None and extent_of(b"") is None


def test_a_missing_decoder_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    data = next(path for _, path in corpus() if path.name == "MR_small_jpeg_ls_lossless.dcm").read_bytes()
    monkeypatch.setitem(pixels.DECODERS, uid.JPEGLSLossless, ("pylibjpeg",))
    with pytest.raises(MissingDependency, match=r"pip install 'llava\[data\]'"):
        decode.load_image(data)


def test_licenses_of_decoders() -> None:
    assert {name for names in pixels.DECODERS.values() for name in names} <= {*pixels.PACKAGES, "pydicom"}
    assert not any("libjpeg" in name.replace("pylibjpeg", "") for name in pixels.PACKAGES.values())


def test_videos_are_named() -> None:
    dataset = pydicom.dcmread(io.BytesIO(make(np.zeros((4, 4), np.uint8))))
    dataset.file_meta.TransferSyntaxUID = uid.MPEG4HP41
    dataset["PixelData"].is_undefined_length = True
    dataset.PixelData = pydicom.encaps.encapsulate([b"\0\0\0\1" * 4])
    with pytest.raises(DataError, match="MPEG-4"):
        decode.load_image(to_bytes(dataset))


def test_a_modality_says_what_a_file_without_a_class_is() -> None:
    dataset = make_dataset(np.zeros((4, 4), np.uint8))
    dataset.Modality = "RTDOSE"
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = "1.2.3.999"
    with pytest.raises(NotAnImageError, match="a radiotherapy dose") as caught:
        decode.load_image(to_bytes(dataset))
    assert "1.2.3.999" not in str(caught.value)


def test_errors_and_logs_have_no_patient_data(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Fields that are read hold values that pydicom would quote; patient data is in fields that are not read."""
    bad = [
        ("Rows", "US"),
        ("WindowCenter", "DS"),
        ("NumberOfFrames", "IS"),
        ("PixelSpacing", "DS"),
        ("SOPClassUID", "UI"),
    ]
    messages = []
    for keyword, kind in bad:
        data = make(RAMP, WindowCenter=40, WindowWidth=400)
        dataset = pydicom.dcmread(io.BytesIO(data))
        raw = SECRET.encode() + b"\0"
        dataset._dict[pydicom.tag.Tag(keyword)] = pydicom.dataelem.RawDataElement(
            pydicom.tag.Tag(keyword), kind, len(raw), raw, 0, False, True
        )
        broken = to_bytes(dataset)
        assert broken.count(SECRET.encode()) >= 2
        caplog.clear()
        caplog.set_level(logging.DEBUG)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                decode.load_image(broken)
            except LlavaError as error:
                messages += [str(error), repr(error.__cause__), str(error.__suppress_context__)]
        messages += [str(warning.message) for warning in caught] + [caplog.text]
    printed = capfd.readouterr()
    assert any("WindowCenter" in message for message in messages)
    assert not [text for text in (*messages, printed.out, printed.err) if SECRET[:5] in text]


def test_silence_ends_with_the_reading() -> None:
    before, level = list(warnings.filters), logging.getLogger("pydicom").level
    decode.load_image(make(RAMP))
    with pytest.raises(DataError):
        decode.load_image(make(RAMP)[:-9])
    assert list(warnings.filters) == before and logging.getLogger("pydicom").level == level


SEEDS = ("MR_small.dcm", "MR_small_RLE.dcm", "MR_small_jp2klossless.dcm", "SC_rgb_small_odd_jpeg.dcm")
FUZZ_SEEDS = [path.read_bytes() for _, path in corpus() if path.name in SEEDS]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_changed_bytes_never_crash(data: st.DataObject) -> None:
    """Bytes that are replaced, removed or doubled give an image or an error of this package."""
    content = bytearray(data.draw(st.sampled_from(FUZZ_SEEDS)))
    for _ in range(data.draw(st.integers(1, 8))):
        place = data.draw(st.integers(0, len(content) - 1))
        kind = data.draw(st.sampled_from(["set", "cut", "double"]))
        if kind == "set":
            content[place] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del content[place : place + data.draw(st.integers(1, 40))]
        else:
            content[place:place] = content[place : place + 30]
        if not content:
            break
    try:
        assert decode.load_image(bytes(content)).mode == "RGB"
    except LlavaError as error:
        assert str(error)


def test_a_head_of_unknown_types_is_a_named_error() -> None:
    data = make(np.zeros((4, 4), np.uint8))
    place = data.index(b"\x02\x00\x02\x00UI") + 4
    with pytest.raises(DataError, match="given as bytes has a header that cannot be parsed"):
        decode.load_image(data[:place] + b"U." + data[place + 2 :])


def test_a_short_guided_fuzz(tmp_path: Path) -> None:
    """Fuzz a few hundred inputs; see `tests/imaging/dicom/fuzz_dicom.py` for longer runs."""
    pytest.importorskip("atheris", reason="atheris is not installed (extra dev, Linux only)")
    words = ["-runs=500", "-seed=1", "-max_len=12000", "-timeout=300", "-rss_limit_mb=4096"]
    words += [f"-artifact_prefix={tmp_path}/"]
    command = [sys.executable, "-m", "tests.imaging.dicom.fuzz_dicom", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    finished = re.search(r"Done (\d+) runs", done.stderr)  # it may run a few more than asked for
    assert not list(tmp_path.iterdir()) and finished is not None and int(finished[1]) >= 500
