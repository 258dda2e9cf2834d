"""Coverage-guided fuzzing of the archive reader.

python -m tests.data.download.fuzz_archives -max_total_time=300 [FOLDER OF FINDINGS]

The input is an unzipped archive, whose first byte selects one of three forms, because gzip's checksum would stop the
search. Only errors with a reason may be raised, no figure may exceed its limit, and only listed names may be yielded.
"""

from __future__ import annotations

import gzip
import sys
import tarfile
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["llava.data.download.archives", "tarfile"]):
    from llava.data.download.archives import Archive, ArchiveLimits, iter_members, pax_records
    from llava.data.download.transfer import REASONS
    from llava.errors import ArchiveError
    from tests.support.archive_files import plain, special, tar, tar_gz

NAMES = ["P/a.jpg", "P/b.png", "P/c"]
LIMITS = ArchiveLimits(
    max_members=50, max_figure=4096, max_held=4096, max_unpacked=1 << 18, ratio_from=1 << 14, max_header=2048
)


class Pieces:
    """Source of bytes in pieces of 700."""

    def __init__(self, data: bytes) -> None:
        self._data, self._place = data, 0

    def read(self) -> bytes:
        """Return the next bytes."""
        self._place += 700
        return self._data[self._place - 700 : self._place]


def with_checksums(data: bytes) -> bytes:
    """Write a valid checksum into every block, which makes any block a header."""
    blocks = bytearray(data)
    for start in range(0, len(blocks) - 511, 512):
        blocks[start + 148 : start + 156] = b" " * 8
        blocks[start + 148 : start + 156] = f"{sum(blocks[start : start + 512]):06o}\0 ".encode()
    return bytes(blocks)


def one_input(data: bytes) -> None:
    """Read one input in the form that its first byte selects."""
    way, rest = data[:1], data[1:]
    unzipped = rest if way < b"\x80" else with_checksums(rest)
    packed = rest if way < b"\x40" else gzip.compress(unzipped, 0)
    try:
        for taken in iter_members(Pieces(packed), NAMES, LIMITS):
            assert taken.name in NAMES and len(taken.data) <= LIMITS.max_figure
            assert not taken.reason or taken.reason in REASONS
        for member in Archive(Pieces(packed), LIMITS):
            assert member.size >= 0
        pax_records(rest)
    except ArchiveError as error:
        assert error.reason in REASONS


def main() -> None:
    """Fuzz, starting from archives of every format."""
    members = [plain("P/a.jpg", b"a" * 600), plain("P/" + "n" * 150, b"x"), special("P/c", tarfile.SYMTYPE, "/etc")]
    with tempfile.TemporaryDirectory() as folder:
        for number, form in enumerate((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
            chosen = members if form != tarfile.USTAR_FORMAT else members[::2]
            for way in (b"\x50", b"\x90"):
                Path(folder, f"{number}{way[0]}").write_bytes(way + tar(chosen, form))
            Path(folder, f"{number}").write_bytes(b"\0" + tar_gz(chosen, form))
        atheris.Setup([*sys.argv, folder], one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
