"""Hostile torch files end in one line and in little time; nothing in them is ever run."""

from __future__ import annotations

import io
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.errors import CheckpointError
from llava.model.checkpoint.files.torch_zip import read_bin_header
from llava.model.torch_files.archive import check_torch_file
from llava.model.torch_files.loading import load_torch_file
from tests.support.torch_programs import imported, storage, table, tensor, value, write_archive, write_legacy

SECONDS = 60.0
"""Seconds that a hostile file may take; each of these takes at most one on an idle CPU."""

READERS = pytest.mark.parametrize("reads", [read_bin_header, load_torch_file])
GOOD = tensor((4,), (1,))


def rejection(reads: Callable[[Path], Any], file: Path) -> str:
    """Return the line with which a file is rejected."""
    started = time.process_time()
    with pytest.raises(CheckpointError) as caught:
        reads(file)
    assert time.process_time() - started < SECONDS
    text = str(caught.value)
    assert text.isprintable() and len(text) < 600 + len(str(file)) and str(file) in text
    assert "weights_only" not in text and "Unpickl" not in text
    return text


def test_the_programs_of_these_tests_are_read(tmp_path: Path) -> None:
    file = write_archive(tmp_path / "x.bin", table(("a", GOOD), ("b", tensor((2, 2), (2, 1)))))
    assert {name: entry.shape for name, entry in read_bin_header(file).items()} == {"a": (4,), "b": (2, 2)}
    loaded = load_torch_file(file)
    assert torch.equal(loaded["a"], torch.zeros(4)) and loaded["b"].shape == (2, 2)
    legacy = write_legacy(tmp_path / "y.bin", table(("a", GOOD)), num_bytes=8 + 16)
    check_torch_file(legacy)


NESTED = b")" + b"\x85" * 300_000
KEYS = {
    "nested": NESTED,
    "nested lists": b"]" * 300_000 + b"a" * 299_999,
    "tuple": ("a", 1),
    "float": 1.0,
    "none": None,
    "truth": True,
    "bytes": b"C\x01a",
    "long": "a" * 5000,
    "half a pair": b"X\x03\x00\x00\x00\xed\xa0\x80",
}


@READERS
@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS.keys())
@pytest.mark.parametrize("write", [write_archive, write_legacy])
def test_keys_are_short_text(tmp_path: Path, reads: Any, key: Any, write: Any) -> None:
    rejection(reads, write(tmp_path / "x.bin", table((key, GOOD))))


def test_numbers_and_doubled_names_are_no_names_of_tensors(tmp_path: Path) -> None:
    assert "expected text" in rejection(read_bin_header, write_archive(tmp_path / "x.bin", table((7, GOOD))))
    twice = write_archive(tmp_path / "y.bin", table(("a", GOOD), ("b", GOOD), ("a", GOOD)))
    assert "the key a twice" in rejection(read_bin_header, twice)


SHAPES: dict[str, tuple[Any, Any, Any]] = {
    "negative size": ((-1,), (1,), 0),
    "fraction": ((4.0,), (1,), 0),
    "fraction of a stride": ((4,), (1.0,), 0),
    "truth value": ((True,), (1,), 0),
    "text": (("4",), (1,), 0),
    "size of 2000 bits": ((2**1999,), (1,), 0),
    "stride of 2000 bits": ((4,), (2**1999,), 0),
    "sizes that multiply": ((2**40, 2**40), (2**40, 1), 0),
    "stride of zero": ((2**40,), (0,), 0),
    "small stride of zero": ((5,), (0,), 0),
    "overlapping rows": ((2, 3), (1, 1), 0),
    "negative stride": ((4,), (-1,), 3),
    "negative offset": ((4,), (1,), -1),
    "offset behind the end": ((4,), (1,), 1),
    "empty behind the end": ((0,), (1,), 5),
    "too few strides": ((2, 2), (1,), 0),
    "a list": ([4], [1], 0),
    "100,000 sizes": ((1,) * 100_000, (1,) * 100_000, 0),
    "65 sizes": ((1,) * 65, (1,) * 65, 0),
}


@READERS
@pytest.mark.parametrize(("shape", "strides", "offset"), SHAPES.values(), ids=SHAPES.keys())
def test_sizes_are_whole_numbers_that_the_storage_holds(
    tmp_path: Path, reads: Any, shape: Any, strides: Any, offset: Any
) -> None:
    rejection(reads, write_archive(tmp_path / "x.bin", table(("a", tensor(shape, strides, offset=offset)))))


@READERS
@pytest.mark.parametrize("num_elements", [-1, 4.0, True, "4", 2**70, None])
def test_storages_state_a_whole_number_of_elements(tmp_path: Path, reads: Any, num_elements: Any) -> None:
    held = storage(num_elements=num_elements)
    rejection(reads, write_archive(tmp_path / "x.bin", table(("a", tensor((1,), (1,), held=held)))))


@READERS
@pytest.mark.parametrize(
    ("held", "storages"),
    [
        (storage(num_elements=5), (16,)),
        (storage(num_elements=2**40), (16,)),
        (storage(kind="torch DoubleStorage"), (16,)),
        (storage(key="7"), (16,)),
        (storage(key="../../data.pkl"), (16,)),
        (storage(), ()),
        (storage(), (15,)),
    ],
)
def test_storages_are_as_long_as_they_state(tmp_path: Path, reads: Any, held: bytes, storages: Any) -> None:
    file = write_archive(tmp_path / "x.bin", table(("a", tensor((4,), (1,), held=held))), storages=storages)
    assert "truncated" in rejection(reads, file)


def test_one_storage_of_two_descriptions(tmp_path: Path) -> None:
    for other in (storage(num_elements=3), storage(kind="torch IntStorage")):
        entries = ("a", GOOD), ("b", tensor((3,), (1,), held=other))
        assert "twice" in rejection(read_bin_header, write_archive(tmp_path / "x.bin", table(*entries)))


def test_a_storage_that_countless_tensors_claim(tmp_path: Path) -> None:
    """Each fits, together they would unpack to 4 GB."""
    held = b"q\x01".join([storage(num_elements=100_000), b""])
    first = tensor((100_000,), (1,), held=held)
    again = tensor((100_000,), (1,), held=b"h\x01")
    program = table(("0", first), *((str(number), again) for number in range(1, 10_000)))
    file = write_archive(tmp_path / "x.bin", program, storages=(400_000,))
    assert "4000000000 bytes of tensors" in rejection(read_bin_header, file)


PROGRAMS = {
    "instructions": b"\x80\x02" + b"N" * 1_100_000 + b".",
    "90 MB of instructions": b"\x80\x02" + b"N" * 90_000_000 + b".",
    "marks": b"\x80\x02" + b"(" * 900_000 + b".",
    "memo": b"\x80\x02}" + b"".join(b"r" + struct.pack("<I", number) for number in range(900_000)) + b"X",
    "tuples of tuples": b"\x80\x02)" + b"q\x00h\x00\x86" * 200 + b".",
    "lists in lists": b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
    "tables in tables": b"\x80\x02}" + b"X\x01\x00\x00\x00a}" * 200_000 + b"s" * 200_000 + b".",
    "a list in itself": b"\x80\x02]q\x00h\x00a.",
    "long name": b"\x80\x02c" + b"m" * 9_000_000 + b"\nname\n.",
    "long text as a size": table(("a", tensor(("9" * 9_000_000,), (1,)))),
    "long number": b"\x80\x02I" + b"9" * 5_000_000 + b"\n.",
    "text longer than the file": b"\x80\x02X\xff\xff\xff\xff" + b"a" * 1000,
    "no end": b"\x80\x02}",
    "nothing": b"",
    "only an end": b"\x80\x02.",
    "noise": bytes(range(256)) * 100,
}


@READERS
@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS.keys())
def test_programs_end(tmp_path: Path, reads: Any, program: bytes) -> None:
    if reads is load_torch_file and b"]q\x00h\x00a" in program:
        pytest.skip("torch reads a list that contains itself, which is a plain value")
    rejection(reads, write_archive(tmp_path / "x.bin", program, compression=zipfile.ZIP_DEFLATED))


RAN = "builtins print"
CODE = {
    "call": b"\x80\x02" + imported(RAN) + value(("ran",)) + b"R.",
    "in a table": table(("a", GOOD), ("b", imported("posix system") + value(("exit 3",)) + b"R")),
    "by stack": b"\x80\x04" + value("posix") + value("system") + b"\x93" + value(("exit 3",)) + b"R.",
    "as a state": table(("a", GOOD))[:-1] + imported(RAN) + value(("ran",)) + b"Rb.",
    "instance": b"\x80\x02" + b"(X\x03\x00\x00\x00ranibuiltins\nprint\n.",
    "new object": b"\x80\x02" + imported("subprocess Popen") + value(("exit 3",)) + b"\x81.",
}


@READERS
@pytest.mark.parametrize("program", CODE.values(), ids=CODE.keys())
@pytest.mark.parametrize("write", [write_archive, write_legacy])
def test_code_is_not_run(
    tmp_path: Path, reads: Any, program: bytes, write: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    rejection(reads, write(tmp_path / "x.bin", program))
    assert "ran" not in capsys.readouterr().out


def bomb(archive: zipfile.ZipFile) -> None:
    archive.writestr("archive/data/0", b"\x00" * 200_000_000)


def twice(archive: zipfile.ZipFile) -> None:
    with pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("archive/data.pkl", table(("a", GOOD)))


def second(archive: zipfile.ZipFile) -> None:
    archive.writestr("other/data.pkl", table(("a", GOOD)))


def crowd(archive: zipfile.ZipFile) -> None:
    for number in range(65_000):
        archive.writestr(zipfile.ZipInfo(f"{'n' * 100}{number}"), b"")


@READERS
@pytest.mark.parametrize("change", [bomb, twice, second, crowd])
def test_archives_within_bounds(tmp_path: Path, reads: Any, change: Any) -> None:
    file = tmp_path / "x.bin"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", table(("a", GOOD)))
        change(archive)
    rejection(reads, file)


@READERS
@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2, 99])
def test_unusual_compression_and_encryption(tmp_path: Path, reads: Any, method: int) -> None:
    known = method if method != 99 else zipfile.ZIP_STORED
    file = write_archive(tmp_path / "x.bin", b"\x80\x02" + b"N" * 1_100_000 + b".", compression=known)
    if method == 99:  # encrypted
        content = bytearray(file.read_bytes())
        for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
            content[content.index(mark) + place] |= 1
        file.write_bytes(content)
    rejection(reads, file)


@READERS
def test_what_torch_reads_is_what_was_checked(tmp_path: Path, reads: Any) -> None:
    """A pickle with an archive behind it: torch decides by the first bytes, zip readers by the last."""
    archive = write_archive(tmp_path / "good.bin", table(("a", GOOD))).read_bytes()
    file = write_legacy(tmp_path / "x.bin", table((NESTED, GOOD)))
    file.write_bytes(file.read_bytes() + archive)
    rejection(reads, file)


@pytest.mark.parametrize(
    "content", [b"", b"\x00" * 100, b"PK", b"PK\x03\x04", b"{}", b"\x80\x02K\x01.", b"version https://git-lfs"]
)
@READERS
def test_other_files(tmp_path: Path, reads: Any, content: bytes) -> None:
    (tmp_path / "x.bin").write_bytes(content)
    rejection(reads, tmp_path / "x.bin")


def saved_bytes() -> bytes:
    stream = io.BytesIO()
    torch.save({"a.weight": torch.ones(2, 3), "b": torch.zeros(0, 2), "c": torch.arange(5)[1:3]}, stream)
    return stream.getvalue()


SAVED = saved_bytes()


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_files_are_read_or_rejected(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    file = tmp_path_factory.getbasetemp() / "damaged.bin"
    content = bytearray(SAVED)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content[: data.draw(st.integers(len(content) // 2, len(content)))])
    for reads in (read_bin_header, load_torch_file):
        try:
            reads(file)
        except CheckpointError as error:
            assert "\n" not in str(error)


INSTRUCTIONS = st.one_of(
    st.sampled_from(
        [b"(", b"t", b"\x85", b"\x86", b"\x87", b"R", b"Q", b"}", b"]", b")", b"u", b"s", b"e", b"a", b"b"]
    ),
    st.sampled_from([b"N", b"\x88", b"q\x00", b"h\x00", b"q\x01", b"h\x01", b"0", b"\x81", b"\x93", b"\x8f", b"\x90"]),
    st.sampled_from([storage(), GOOD, imported("collections OrderedDict"), imported("torch Size"), NESTED[:2000]]),
    st.one_of(st.integers(-(2**300), 2**300), st.floats(), st.text(max_size=3)).map(value),
)


@settings(max_examples=200, deadline=None)
@given(instructions=st.lists(INSTRUCTIONS, max_size=25))
def test_any_program_is_read_or_rejected(tmp_path_factory: pytest.TempPathFactory, instructions: list[bytes]) -> None:
    program = b"\x80\x02" + b"".join(instructions) + b"."
    file = write_archive(tmp_path_factory.getbasetemp() / "program.bin", program)
    for reads in (read_bin_header, load_torch_file):
        try:
            reads(file)
        except CheckpointError as error:
            assert "\n" not in str(error)
