"""Warnings of libraries, which may quote what a file holds, reach neither standard error nor a log in commands."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from struct import pack
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image

from llava.cli import main
from llava.utils.cli import run_program
from llava.utils.log import SILENT_LIBRARIES, silent_libraries
from tests.serve.test_findings import Engine
from tests.support.dicom_files import make_dataset, to_bytes

NAME = "MUELLER^ANNA"
ROOT = Path(__file__).parents[2]


def saved(kind: str, mode: str = "L", size: tuple[int, int] = (8, 8), **options: Any) -> bytes:
    image = Image.new(mode, size)
    if mode == "P":
        image.putpalette(list(range(256)) * 3)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return pack(">I", len(content)) + kind + content + pack(">I", zlib.crc32(kind + content))


def far_exif() -> bytes:
    entries = pack("<HHII", 0x10E, 2, 5000, 9000) + pack("<HHII", 0x10F, 2, 200, 26)
    return b"Exif\0\0II*\0\x08\0\0\0" + pack("<H", 2) + entries + NAME.encode()


def png_with(*chunks: bytes) -> bytes:
    plain = saved("PNG")
    return plain[:33] + b"".join(chunks) + plain[33:]


def malformed_mpo() -> bytes:
    plain = saved("JPEG", "RGB")
    table = b"MPF\0II*\0\x08\0\0\0\x01\0" + pack("<HHII", 0xB001, 4, 1, 2) + b"\0" * 34
    return plain[:2] + b"\xff\xe2" + pack(">H", 2 + len(table)) + table + plain[2:]


def dicom(**fields: Any) -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = make_dataset(np.arange(64, dtype=np.uint16).reshape(8, 8))
        for name, value in fields.items():
            element = pydicom.DataElement(name, "LO", "", validation_mode=pydicom.config.IGNORE)
            element._value = value
            element.VR = pydicom.datadict.dictionary_VR(name)
            dataset.add(element)
        return to_bytes(dataset)


FILES: dict[str, Callable[[], bytes]] = {
    "far.jpg": lambda: saved("JPEG", "RGB", exif=far_exif()),
    "short.jpg": lambda: saved("JPEG", "RGB", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0ab" + NAME.encode()),
    "palette.png": lambda: saved("PNG", "P", transparency=bytes(range(200))),
    "large.png": lambda: saved("PNG", "1", (10_000, 9_500)),
    "animated.png": lambda: png_with(chunk(b"acTL", pack(">II", 0, 0))),
    "twice.png": lambda: png_with(*[chunk(b"acTL", pack(">II", 2, 0))] * 2),
    "exif.png": lambda: png_with(chunk(b"eXIf", far_exif()[6:])),
    "pair.jpg": malformed_mpo,
    "uid.dcm": lambda: dicom(StudyInstanceUID=NAME),
    "part.dcm": lambda: dicom(PatientID=NAME, SOPInstanceUID="1.02." + NAME),
    "number.dcm": lambda: dicom(SeriesNumber="1", FrameOfReferenceUID=NAME + "\\1.x"),
}
"""Files about which Pillow or pydicom warn, most of them with a name inside."""


def read_all(name: str, content: bytes) -> None:
    if name.endswith(".dcm"):
        dataset = pydicom.dcmread(io.BytesIO(content))
        assert [str(element.value) for element in dataset.iterall()]
        return
    image = Image.open(io.BytesIO(content))
    image.getexif()
    image.convert("RGB")


@pytest.mark.parametrize("name", sorted(FILES))
def test_libraries_warn_about_these_files(name: str) -> None:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        read_all(name, FILES[name]())
    assert found


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_command_says_nothing_that_libraries_say(
    name: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    content = FILES[name]()
    capfd.readouterr()
    caplog.clear()
    run_program(lambda: read_all(name, content))
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Rows and images for every file."""
    (tmp_path / "images").mkdir()
    rows = []
    for name, content in FILES.items():
        (tmp_path / "images" / name).write_bytes(content())
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A chest."}]
        rows.append({"id": name, "image": name, "conversations": turns})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return tmp_path


def test_checking_data_shows_no_line_of_a_library(folder: Path) -> None:
    words = ["data", "check", "rows.json", "--images", "images"]
    program = (
        "from llava.cli import main; from llava.utils.cli import run_program; "
        + f"run_program(lambda: main({words!r}))"
    )
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode in {0, 1}, done.stderr
    said = done.stdout + done.stderr
    assert "Warning" not in said and NAME not in said and "site-packages" not in said
    assert str(len(FILES)) in done.stdout


def test_findings_of_such_files_show_findings_only(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("llava.serve.findings.local_engine_of", lambda args: Engine())
    files = [str(path) for path in sorted((folder / "images").iterdir()) if path.name != "large.png"]
    run_program(lambda: main(["findings", *files, "--model", "m"]))
    out, err = capfd.readouterr()
    assert "Warning" not in err and NAME not in out + err and "site-packages" not in err
    assert out.count("Mild cardiomegaly") == len(files)


@pytest.mark.parametrize("library", SILENT_LIBRARIES)
def test_logs_of_libraries_that_read_files_are_off_in_commands_only(
    library: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger(f"{library}.part")
    level = logging.getLogger(library).level
    with silent_libraries():
        logger.critical("Invalid value for VR PN: %s", NAME)
    assert not caplog.records and NAME not in capfd.readouterr().err
    assert logging.getLogger(library).level == level
    logger.critical("after")
    assert [record.getMessage() for record in caplog.records] == ["after"]


def test_warnings_are_as_before_after_a_command_that_fails() -> None:
    before = list(warnings.filters)

    def fail() -> None:
        warnings.warn("inside", stacklevel=1)
        raise FileNotFoundError(2, "No such file or directory", "x")

    with pytest.raises(SystemExit):
        run_program(fail)
    assert list(warnings.filters) == before


def test_warnings_that_python_was_asked_for_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "warnoptions", ["always"])
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        run_program(lambda: warnings.warn("asked for", stacklevel=1))
    assert [str(warning.message) for warning in found] == ["asked for"]


def test_deepspeed_does_not_say_that_there_is_only_a_cpu() -> None:
    logger, seen = logging.getLogger("DeepSpeed"), io.StringIO()
    handler = logging.StreamHandler(seen)
    logger.addHandler(handler)
    try:
        with silent_libraries():
            logger.warning("Setting accelerator to CPU. If you have GPU, we were unable to detect it.")
            logger.warning("a checkpoint is incomplete")
    finally:
        logger.removeHandler(handler)
    assert seen.getvalue() == "a checkpoint is incomplete\n" and not logger.filters
