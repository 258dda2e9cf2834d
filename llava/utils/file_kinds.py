"""Kind of a file given instead of JSON rows, by its first bytes, and the encoding of a text."""

from __future__ import annotations

import codecs
from pathlib import Path

HEAD = 132
"""Number of leading bytes to inspect; DICOM's mark ends there."""

_MARKS: dict[bytes, str] = {
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


_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32",  # before UTF-16, whose mark is the first half of one
    codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16",
}  # fmt: skip
_ZEROS = {(1,): "UTF-16LE", (0,): "UTF-16BE", (1, 2, 3): "UTF-32LE", (0, 1, 2): "UTF-32BE"}
"""Bytes of each Latin character that are zero, in encodings without a byte order mark."""


def wide_encoding(head: bytes) -> str | None:
    """Return the encoding of a text in UTF-16 or UTF-32 by its first bytes; None if it is in neither.

    >>> wide_encoding("a,b".encode("utf-16-be"))
    'UTF-16BE'
    """
    for mark, name in _BYTE_ORDER_MARKS.items():
        if head.startswith(mark):
            return name
    for places, name in _ZEROS.items():
        width = 4 if len(places) == 3 else 2
        whole = head[: min(len(head), 32) // width * width]
        if whole and all((byte == 0) == (index % width in places) for index, byte in enumerate(whole)):
            return name
    return None


def utf8_text(content: bytes, *, takes_mark: bool = True) -> str:
    """Return the text of UTF-8 bytes.

    Args:
        content: the bytes.
        takes_mark: whether a byte order mark is dropped, or refused for a library that does not know it.

    Raises:
        ValueError: the text is in another encoding; the message names it and how to convert the file.
    """
    if name := wide_encoding(content[:HEAD]):
        raise ValueError(f"the text is {name}; {expected_utf8(name)}")
    if content.startswith(codecs.BOM_UTF8) and not takes_mark:
        raise ValueError("the text begins with a byte order mark; save it as UTF-8 without one")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"not UTF-8 text in line {line}; {expected_utf8()}") from None


def expected_utf8(encoding: str = "WINDOWS-1252") -> str:
    """Return how to convert a text; without a name, its encoding is that of most old texts."""
    return f"expected UTF-8; save it so, or run: iconv -f {encoding} -t UTF-8 OLD > NEW"


def other_kind(path: str | Path, head: bytes) -> str | None:
    """Return what a file without JSON rows is and what to do about it; None if it may hold rows.

    >>> other_kind("rows.json", bytes([0xFF, 0xFE, 0x5B, 0x00]))
    'UTF-16 text; expected UTF-8; save it so, or run: iconv -f UTF-16 -t UTF-8 OLD > NEW'

    Args:
        path: the file; only its suffix is used.
        head: its first `HEAD` bytes, decompressed.
    """
    if name := wide_encoding(head):
        return f"{name} text; {expected_utf8(name)}"
    for mark, kind in _MARKS.items():
        if head.startswith(mark):
            return kind
    if head[128:132] == b"DICM":
        return "an image (DICOM); `llava data dicom` makes rows of a folder of them"
    is_json = head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"[", b"{")
    return "a table; convert it with `llava data csv`" if Path(path).suffix in _TABLES and not is_json else None
