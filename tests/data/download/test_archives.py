"""Untrusted archives: listed files are read unchanged; all other content is refused with a reason."""

from __future__ import annotations

import gzip
import io
import random
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.data.download.archives import Archive, ArchiveLimits, Taken, iter_members, pax_records, plain_name
from llava.data.download.transfer import REASONS
from llava.errors import ArchiveError
from tests.support.archive_files import article, plain, special, tar, tar_gz

ROOT = Path(__file__).resolve().parents[3]
NAMES = ["PMC1/J-1-g000.jpg", "PMC1/J-1-g001.jpg"]
MEMBERS = [plain("PMC1/a.txt", b"words" * 999), plain(NAMES[0], b"first"), plain(NAMES[1], b"second" * 400)]
SMALL = ArchiveLimits(
    max_members=50, max_figure=10_000, max_held=10_000, max_unpacked=1 << 20, ratio_from=1 << 16, max_header=2048
)


class Bytes:
    """Source of an archive's bytes in pieces of any size."""

    def __init__(self, data: bytes, step: int = 1000) -> None:
        self.stream, self.step = io.BytesIO(data), step

    def read(self) -> bytes:
        return self.stream.read(self.step)


def got(data: bytes, names: list[str], limits: ArchiveLimits = SMALL, step: int = 1000) -> dict[str, Taken]:
    return {taken.name: taken for taken in iter_members(Bytes(data, step), names, limits)}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("step", [1, 77, 100_000])
def test_listed_files_are_read_unchanged(form: int, step: int) -> None:
    found = got(tar_gz(MEMBERS, form), NAMES, step=step)
    assert {name: taken.data for name, taken in found.items()} == {NAMES[0]: b"first", NAMES[1]: b"second" * 400}


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names(form: int) -> None:
    names = ["PMC1/" + "long" * 60 + ".jpg", "PMC1/Ångström-Überleben.jpg"]
    data = tar_gz([plain(name, name.encode()) for name in names], form)
    assert {name: taken.data.decode() for name, taken in got(data, names).items()} == dict(
        zip(names, names, strict=True)
    )


def test_reading_stops_after_the_last_listed_file() -> None:
    source = Bytes(tar_gz([*MEMBERS, plain("PMC1/rest", random.Random(0).randbytes(900_000))]))
    assert len(list(iter_members(source, NAMES, SMALL))) == 2
    assert source.stream.tell() < 20_000


def test_another_extension_is_a_substitute_best_first() -> None:
    members = [plain("P/a.gif", b"thumb"), plain("P/a.tif", b"best"), plain("P/b.JPEG", b"b"), plain("P/c.gif", b"c")]
    found = got(tar_gz(members), ["P/a.jpg", "P/b.jpg", "P/c", "P/d.jpg"])
    assert {name: taken.data for name, taken in found.items()} == {"P/a.jpg": b"best", "P/b.jpg": b"b", "P/c": b"c"}


def test_the_listed_name_is_preferred_at_any_position() -> None:
    members = [plain("P/a.png", b"other"), plain("./P/a.jpg", b"listed"), plain("P/a.jpeg", b"other")]
    assert got(tar_gz(members), ["P/a.jpg"])["P/a.jpg"].data == b"listed"


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_not_followed(kind: bytes) -> None:
    data = tar_gz([special(NAMES[0], kind, "/etc/passwd"), *MEMBERS[2:]])
    found = got(data, NAMES)
    assert found[NAMES[0]] == Taken(NAMES[0], reason="unsafe_member") and found[NAMES[1]].data


@pytest.mark.parametrize("name", ["/etc/passwd", "../up.jpg", "a/../../up.jpg", "a\\b.jpg", "", ".", "a\0b"])
def test_unsafe_names_are_refused(name: str) -> None:
    assert plain_name(name) is None


def test_only_a_large_figure_is_left_out() -> None:
    data = tar_gz([plain(NAMES[0], bytes(10_001)), MEMBERS[2]])
    found = got(data, NAMES)
    assert found[NAMES[0]].reason == "too_large" and found[NAMES[1]].data


def bomb(size: int) -> bytes:
    return tar_gz([plain("P/zeros", bytes(size)), *MEMBERS])


def broken_header() -> bytes:
    data = bytearray(tar(MEMBERS))
    data[130] ^= 1  # in the first header's size, which its checksum covers
    return gzip.compress(bytes(data))


def stated_size(size: bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    """Return an archive whose first header states any size, with a valid checksum."""
    block = bytearray(tar([plain("x", b"")])[:512])
    block[124:136], block[156:157] = size.ljust(12, b"\0"), kind
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    return gzip.compress(bytes(block))


NEGATIVE = b"\xff" * 12
HUGE = b"\x80" + b"\0" * 3 + b"\x7f" * 8
BROKEN: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "truncated"),
    "a page": (b"<html>Sign in</html>", "not_an_archive"),
    "no tar": (gzip.compress(b"just text, " * 200), "corrupted"),
    "half a gzip file": (tar_gz(MEMBERS)[: len(tar_gz(MEMBERS)) // 2], "truncated"),
    "no checksum at the end": (tar_gz(MEMBERS)[:-6], "truncated"),
    "wrong checksum at the end": (tar_gz(MEMBERS)[:-8] + b"12345678", "corrupted"),
    "half a member": (gzip.compress(tar(MEMBERS)[:1024]), "truncated"),
    "half a header": (gzip.compress(tar(MEMBERS)[:300]), "truncated"),
    "a broken header": (broken_header(), "corrupted"),
    "too large unpacked": (gzip.compress(tar([plain("P/x", random.Random(0).randbytes(1 << 21))]), 1), "bomb"),
    "too large for its size": (bomb(900_000), "bomb"),
    "too many members": (tar_gz([plain(f"P/{number}", b"") for number in range(60)]), "bomb"),
    "a long name without end": (stated_size(HUGE, tarfile.GNUTYPE_LONGNAME), "bomb"),
    "attributes without end": (stated_size(HUGE, tarfile.XHDTYPE), "bomb"),
    "a negative size": (stated_size(NEGATIVE), "corrupted"),
    "a size beyond the file": (stated_size(HUGE), "truncated"),
    "a sparse map cut off": (stated_size(b"0", tarfile.GNUTYPE_SPARSE)[:-8] + bytes(8), "corrupted"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_archives_have_a_reason(name: str) -> None:
    data, reason = BROKEN[name]
    with pytest.raises(ArchiveError) as caught:
        got(data, ["P/nothing.jpg"])
    assert caught.value.reason == reason and reason in REASONS


def test_figures_before_the_damage_are_complete() -> None:
    data = tar_gz(MEMBERS)
    found = []
    with pytest.raises(ArchiveError):
        for taken in iter_members(Bytes(data[:-6]), [NAMES[0], "P/none.jpg"], SMALL):
            found.append(taken)
    assert found == [Taken(NAMES[0], b"first")]


def test_the_library_reads_the_same_members() -> None:
    data = article(7)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        expected = [(entry.name, entry.isreg(), entry.size) for entry in archive]
    assert [(member.name.rstrip("/"), member.plain, member.size) for member in Archive(Bytes(data))] == expected


@pytest.mark.parametrize("content", [b"x", b"99 path=a\n", b"0 path=a\n", b"10 path=ab", b"-8 path=a\n"])
def test_invalid_attributes(content: bytes) -> None:
    with pytest.raises(ArchiveError):
        pax_records(content)


def read_all(data: bytes) -> None:
    """Read an archive as the downloader does; only errors with a reason may be raised."""
    try:
        for taken in iter_members(Bytes(data), NAMES, SMALL):
            assert taken.name in NAMES and len(taken.data) <= SMALL.max_figure
            assert not taken.reason or taken.reason in REASONS
    except ArchiveError as error:
        assert error.reason in REASONS


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=2000), st.booleans())
def test_any_bytes(data: bytes, zipped: bool) -> None:
    read_all(gzip.compress(data, 1) if zipped else data)


EDITS = st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=12)


@settings(max_examples=200, deadline=None)
@given(EDITS, st.booleans(), st.integers(0, 4000), st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
def test_damaged_archives(edits: list[tuple[int, int]], inside: bool, cut: int, form: int) -> None:
    members = [
        *MEMBERS[:2],
        plain("PMC1/" + "n" * 200, b"x"),
        special("PMC1/link", tarfile.SYMTYPE, "/etc"),
        MEMBERS[2],
    ]
    data = bytearray(tar(members, form) if inside else tar_gz(members, form))
    for place, value in edits:
        data[place % len(data)] = value
    kept = bytes(data[: len(data) - cut % 4000] if cut > 3000 else data)
    read_all(gzip.compress(kept, 1) if inside else kept)


def test_a_long_run_of_random_headers() -> None:
    """Headers with a valid checksum and any type, size and name."""
    draw = random.Random(5)
    for _ in range(300):
        blocks = b""
        for _ in range(draw.randrange(1, 5)):
            size = draw.choice([b"0", b"17", b"00000001000", NEGATIVE, HUGE, b"zz", draw.randbytes(12)])
            kind = draw.choice(
                [b"0", b"1", b"2", b"5", b"L", b"K", b"S", b"x", b"g", b"X", b"D", b"\0", draw.randbytes(1)]
            )
            blocks += gzip.decompress(stated_size(size, kind)) + draw.randbytes(512 * draw.randrange(3))
        read_all(gzip.compress(blocks, 1))


def test_the_fuzzing_program_runs() -> None:
    """Run the coverage-guided search briefly."""
    pytest.importorskip("atheris")
    line = [sys.executable, "-m", "tests.data.download.fuzz_archives", "-runs=300", "-seed=1"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0 and "Done 300 runs" in done.stderr, done.stderr[-2000:]
