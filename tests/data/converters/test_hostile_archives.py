"""Archives that mean harm: unpacked inside their folder, or one line; nothing outside, bounded memory."""

from __future__ import annotations

import gzip
import io
import stat
import struct
import tarfile
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from llava.data.converters.sources import unpack_archive
from llava.data.download.archives import ArchiveLimits, iter_members
from llava.data.shards import rows_in
from llava.errors import ArchiveError, DataError
from tests.support.archive_files import plain, special, tar, tar_gz

LIMITS = ArchiveLimits(max_members=500, max_figure=1 << 20, max_unpacked=8 << 20, ratio_from=1 << 20)
MEMORY = 64 << 20

NAMES = [
    "../out.png", "a/../../out.png", "/etc/out.png", "//out.png", "..", "a/..", "..\\out.png", "C:\\out.png",
    "a\0b.png", "./../out.png", "a/./../../out.png",
]  # fmt: skip


def zipped(members: list[tuple[zipfile.ZipInfo | str, bytes]], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(stream, "w", method) as archive:
        warnings.simplefilter("ignore")  # duplicate names
        for name, content in members:
            archive.writestr(name, content)
    return stream.getvalue()


def typed(name: str, kind: int, content: bytes = b"../../etc/passwd") -> bytes:
    info = zipfile.ZipInfo(name)
    info.external_attr = (kind | 0o777) << 16
    return zipped([(info, content)])


def stated(size: int) -> bytes:
    """Return a zip whose directory states another size of its member."""
    content = bytearray(zipped([("a.png", b"a" * 100)], zipfile.ZIP_STORED))
    place = content.index(b"PK\1\2")
    struct.pack_into("<II", content, place + 20, size, size)
    return bytes(content)


def overlapping(number: int) -> bytes:
    """Return a zip whose directory names one stored file many times."""
    one = zipped([("a.png", b"\0" * (1 << 16))])
    place = one.index(b"PK\1\2")
    entry, end = one[place : one.index(b"PK\5\6")], bytearray(one[one.index(b"PK\5\6") :])
    entries = b"".join(entry[:46] + f"{index:05d}".encode() + entry[51:] for index in range(number))
    struct.pack_into("<HHII", end, 8, number, number, len(entries), place)
    return one[:place] + entries + bytes(end)


ZIPS: dict[str, Callable[[], bytes]] = {
    **{f"name {name!r}": lambda name=name: zipped([(name, b"x")]) for name in NAMES if "\0" not in name},
    "link": lambda: typed("a.png", stat.S_IFLNK),
    "pipe": lambda: typed("a.png", stat.S_IFIFO),
    "device": lambda: typed("a.png", stat.S_IFBLK),
    "socket": lambda: typed("a.png", stat.S_IFSOCK),
    "marker": lambda: zipped([(".unpacked", b"1 1\n")]),
    "two of one name": lambda: zipped([("a.png", b"first"), ("a.png", b"second")]),
    "two of one path": lambda: zipped([("a/b.png", b"first"), ("a/./b.png", b"second")]),
    "file and folder": lambda: zipped([("a", b"x"), ("a/b", b"y")]),
    "bomb": lambda: zipped([(f"{number}", b"\0" * (1 << 20)) for number in range(9)]),
    "large member": lambda: zipped([("a.png", b"\0" * (2 << 20))]),
    "many members": lambda: zipped([(f"{number}", b"") for number in range(600)]),
    "overlapping members": lambda: overlapping(400),
    "stated size 0": lambda: stated(0),
    "stated size 50": lambda: stated(50),
    "stated size 4 GB": lambda: stated(0xFFFFFFFE),
    "no directory": lambda: b"PK\3\4" + zipped([("a.png", b"x" * 1000)])[4:40],
    "long name": lambda: zipped([("a" * 5000, b"x")]),
    "deep folders": lambda: zipped([("a/" * 3000 + "b.png", b"x")]),
}  # fmt: skip


def changed_header(**fields: object) -> bytes:
    entry, data = plain("a.png", b"a" * 100)
    for name, value in fields.items():
        setattr(entry, name, value)
    stream = io.BytesIO()
    stream.write(entry.tobuf(tarfile.GNU_FORMAT))
    stream.write(data + b"\0" * 412 + b"\0" * 1024)
    return stream.getvalue()


TARS: dict[str, Callable[[], bytes]] = {
    **{f"name {name!r}": lambda name=name: tar([plain(name, b"x")]) for name in NAMES if "\0" not in name},
    "two of one name": lambda: tar([plain("a.png", b"first"), plain("a.png", b"second")]),
    "file and folder": lambda: tar([plain("a", b"x"), plain("a/b", b"y")]),
    "bomb": lambda: tar([plain(f"{number}", b"\0" * (1 << 20)) for number in range(9)]),
    "large member": lambda: tar([plain("a.png", b"\0" * (2 << 20))]),
    "many members": lambda: tar([plain(f"{number}", b"") for number in range(600)]),
    "negative size": lambda: changed_header(size=-512),
    "size of 2^62": lambda: changed_header(size=1 << 62),
    "name of 2 GB": lambda: changed_header(size=2 << 30, type=tarfile.GNUTYPE_LONGNAME),
    "attributes of 2 GB": lambda: changed_header(size=2 << 30, type=tarfile.XHDTYPE),
    "marker": lambda: tar([plain(".unpacked", b"1 1\n")]),
    "long name": lambda: tar([plain("a" * 5000, b"x")]),
}
HARMLESS: dict[str, Callable[[], bytes]] = {
    "links and devices": lambda: tar(
        [
            special("a.png", tarfile.SYMTYPE, "/etc/passwd"), special("b.png", tarfile.LNKTYPE, "../../etc/passwd"),
            special("c.png", tarfile.CHRTYPE), special("d.png", tarfile.BLKTYPE), special("e.png", tarfile.FIFOTYPE),
            special("sub", tarfile.SYMTYPE, ".."), plain("f.png", b"x"),
        ]
    ),
}  # fmt: skip


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


def refused(tmp_path: Path, content: bytes, name: str) -> str:
    """Return the message about an archive, after a check that nothing was written outside its folder."""
    (tmp_path / name).write_bytes(content)
    tracemalloc.start()
    with pytest.raises(DataError) as caught:
        unpack_archive(tmp_path / name, tmp_path / "in" / "out", LIMITS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MEMORY
    assert not any(path.is_symlink() for path in tmp_path.rglob("*"))
    assert {path.name for path in tmp_path.iterdir()} <= {name, "in"}
    assert {path.name for path in (tmp_path / "in").iterdir()} <= {"out"}
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ZIPS)
def test_a_zip_that_means_harm_is_one_line(tmp_path: Path, name: str) -> None:
    assert "a.zip" in refused(tmp_path, ZIPS[name](), "a.zip") or name in {"long name", "deep folders"}


@pytest.mark.parametrize("name", TARS)
def test_a_tar_that_means_harm_is_one_line(tmp_path: Path, name: str) -> None:
    message = refused(tmp_path, gzip.compress(TARS[name](), 6), "a.tar.gz")
    assert "a.tar.gz" in message or name == "long name"


def test_links_and_devices_of_a_tar_are_not_made(tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(HARMLESS["links and devices"]()))
    unpack_archive(tmp_path / "a.tar.gz", tmp_path / "out", LIMITS)
    assert files_of(tmp_path / "out") == {"f.png", ".unpacked"}


@pytest.mark.parametrize("name", NAMES)
def test_listed_figures_have_names_inside_their_folder(name: str) -> None:
    content = tar_gz([plain(name, b"x")]) if "\0" not in name else tar_gz([plain("a", b"x")])

    class Source:
        def __init__(self) -> None:
            self.rest = [content]

        def read(self) -> bytes:
            return self.rest.pop() if self.rest else b""

    assert list(iter_members(Source(), ["out.png"], LIMITS)) == []


def longer_than_memory(kind: bytes) -> bytes:
    """Return a small gzip file of a tar whose header states 4 GB that follow as zeros."""
    entry = tarfile.TarInfo("a")
    entry.size, entry.type = 4 << 30, kind
    stream = io.BytesIO()
    with gzip.GzipFile(fileobj=stream, mode="wb", compresslevel=6) as packed:
        packed.write(entry.tobuf(tarfile.GNU_FORMAT))
        for _ in range(256):
            packed.write(b"\0" * (1 << 20))
    return stream.getvalue()


def attribute(name: str, value: str) -> bytes:
    entry, data = plain("a.png", b"a" * 100)
    entry.pax_headers = {name: value}
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(entry, io.BytesIO(data))
    return stream.getvalue()


SHARDS: dict[str, Callable[[], bytes]] = {
    "long name": lambda: longer_than_memory(tarfile.GNUTYPE_LONGNAME),
    "long link": lambda: longer_than_memory(tarfile.GNUTYPE_LONGLINK),
    "attributes": lambda: longer_than_memory(tarfile.XHDTYPE),
    "attributes of all": lambda: longer_than_memory(tarfile.XGLTYPE),
    "attributes of solaris": lambda: longer_than_memory(tarfile.SOLARIS_XHDTYPE),
    "negative size": lambda: changed_header(size=-512),
    "negative name": lambda: changed_header(size=-1, type=tarfile.GNUTYPE_LONGNAME),
    **{f"size of 2^{power}": lambda power=power: changed_header(size=1 << power) for power in (35, 44, 62)},
    "size of 2^32 at the end": lambda: changed_header(size=1 << 32),
    "attribute of size": lambda: attribute("size", str(1 << 62)),
    "attribute of negative size": lambda: attribute("size", "-512"),
    "attribute of sparse size": lambda: attribute("GNU.sparse.realsize", str(1 << 62)),
    "attribute that is no size": lambda: attribute("size", "9" * 5000),
}


@pytest.mark.parametrize("name", SHARDS)
def test_a_shard_that_means_harm_ends_in_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "shard.tar").write_bytes(SHARDS[name]())
    tracemalloc.start()
    try:
        found = [row for _, row in rows_in(tmp_path / "shard.tar")]
        messages = [str(row) for row in found if isinstance(row, DataError)]
    except DataError as error:
        messages = [str(error)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MEMORY
    assert messages and not any("\n" in message for message in messages)


def test_members_of_a_shard_are_rows_whatever_their_names_and_links(tmp_path: Path) -> None:
    members = [
        plain("../../a.json", b'{"id": "1"}'), special("b.json", tarfile.SYMTYPE, "/etc/passwd"),
        special("c.json", tarfile.LNKTYPE, "../../a.json"), special("d.json", tarfile.CHRTYPE),
        plain("/etc/e.json", b'{"id": "2"}'), plain("9" * 50 + ".json", b'{"id": "3"}'),
    ]  # fmt: skip
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "shard.tar").write_bytes(tar(members))
    found = [row for _, row in rows_in(tmp_path / "in" / "shard.tar")]
    assert [row.value["id"] for row in found if not isinstance(row, DataError)] == ["1", "2", "3"]
    assert files_of(tmp_path) == {"in/shard.tar"}


def test_a_reason_is_a_key_of_the_known_ones(tmp_path: Path) -> None:
    from llava.data.download.transfer import REASONS

    for number, make in enumerate(ZIPS.values()):
        (tmp_path / f"{number}.zip").write_bytes(make())
        with pytest.raises(DataError) as caught:
            unpack_archive(tmp_path / f"{number}.zip", tmp_path / f"out{number}", LIMITS)
        assert not isinstance(caught.value, ArchiveError) or caught.value.reason in REASONS
