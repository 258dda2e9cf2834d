"""What a file is that was given in place of JSON rows, by its first bytes."""

from __future__ import annotations

from pathlib import Path

HEAD = 132
"""Number of leading bytes to inspect; DICOM's mark ends there."""

_MARKS: dict[bytes, str] = {
    b"\xff\xfe": "UTF-16 text; save it as UTF-8",
    b"\xfe\xff": "UTF-16 text; save it as UTF-8",
    b"[\x00": "UTF-16 text; save it as UTF-8",
    b"{\x00": "UTF-16 text; save it as UTF-8",
    b"\x89PNG": "an image (PNG)",
    b"\xff\xd8\xff": "an image (JPEG)",
    b"GIF8": "an image (GIF)",
    b"BM": "an image (BMP)",
    b"II*\x00": "an image (TIFF)",
    b"MM\x00*": "an image (TIFF)",
    b"PK\x03\x04": "a zip archive or a spreadsheet; unpack it, or save the table as CSV for `llava data csv`",
    b"PAR1": "Parquet; convert it with `llava data csv`",
    b"%PDF": "a PDF document",
    b"\x80\x02": "a pickle, which is never read",
    b"\x80\x03": "a pickle, which is never read",
    b"\x80\x04": "a pickle, which is never read",
    b"\x80\x05": "a pickle, which is never read",
}
"""First bytes of other files, and what such a file is."""

_TABLES = (".csv", ".tsv")


def other_kind(path: str | Path, head: bytes) -> str | None:
    """Return what a file without JSON rows is and what to do about it; None if it may hold rows.

    >>> other_kind("rows.json", bytes([0xFF, 0xFE, 0x5B, 0x00]))
    'UTF-16 text; save it as UTF-8'

    Args:
        path: the file; only its suffix is used.
        head: its first `HEAD` bytes, decompressed.
    """
    for mark, kind in _MARKS.items():
        if head.startswith(mark):
            return kind
    if head[128:132] == b"DICM":
        return "an image (DICOM); `llava data dicom` makes rows of a folder of them"
    is_json = head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"[", b"{")
    return "a table; convert it with `llava data csv`" if Path(path).suffix in _TABLES and not is_json else None
