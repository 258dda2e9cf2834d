"""Remove everything but the image from compressed frames: JPEG, JPEG-LS, JPEG 2000 and RLE.

    frame --clean_jpeg, clean_jpeg2000, clean_rle--> the same image without comments, metadata and surplus bytes

Only segments that a decoder needs are kept; `Found` counts the rest. Callers decode both and compare the pixels.
"""

from __future__ import annotations

import re
import struct
from collections import Counter

from llava.errors import DataError

Found = Counter[str]
"""What was removed, to its number of occurrences."""


class PixelsHeldBack(DataError):
    """Error: the pixel field has content that cannot be removed, so no clean copy is written."""


_TEXT = re.compile(rb"[\x20-\x7e]{24,}")
MIN_CHARACTERS = 10
"""Coded pixels, which are close to random, hold 24 printable bytes once in 20 GB by chance; flat areas repeat a pattern
of fewer different bytes."""


def check_coded(data: bytes) -> None:
    """Raise `PixelsHeldBack` if the coded pixels of a JPEG or JPEG 2000 stream hold readable text."""
    # Decoders skip bytes after the last pixel of a scan or tile, and only they know where that is.
    if any(len(set(text)) >= MIN_CHARACTERS for text in _TEXT.findall(data)):
        raise PixelsHeldBack("has readable text among its coded pixels")


_JPEG_END, _SCAN = 0xD9, 0xDA
_JPEG_KEPT = frozenset({*range(0xC0, 0xD0), 0xDA, 0xDB, 0xDC, 0xDD, 0xDE, 0xDF, 0xF7, 0xF8} - {0xC8})
"""Frames, tables, scans and restart intervals of JPEG, and the frame (F7) and parameters (F8) of JPEG-LS."""

_MARK = re.compile(rb"\xff+")
_AFTER_SCAN = re.compile(rb"\xff+[\x01-\xcf\xd8-\xfe]")
_AFTER_LS_SCAN = re.compile(rb"\xff+[\x80-\xcf\xd8-\xfe]")
"""Next marker in the data of a scan; JPEG marks other bytes FF by a byte 0 after them, JPEG-LS by a bit 0."""

_APPLICATION = {0xE0: (b"JFIF\0", 14), 0xEE: (b"Adobe", 12), 0xE8: (b"mrfx", 5)}
"""Application segments that state the color space, with the length of the part that does."""


def clean_jpeg(frame: bytes, found: Found, *, is_ls: bool) -> bytes:
    """Return a JPEG or JPEG-LS image without metadata.

    Raises:
        PixelsHeldBack: the stream has a structure that cannot be cleaned.
    """
    if frame[:2] != b"\xff\xd8":
        raise PixelsHeldBack("has a compressed frame without a JPEG start")
    kept, place = bytearray(frame[:2]), 2
    next_marker = _AFTER_LS_SCAN if is_ls else _AFTER_SCAN
    while place < len(frame):
        start = _MARK.search(frame, place)
        _count_surplus(frame[place : start.start() if start else len(frame)], found, "between segments")
        if start is None or start.end() == len(frame):
            break
        place, marker = start.end() + 1, frame[start.end()]
        if marker == _JPEG_END:
            _count_surplus(frame[place:], found, "behind the end of the stream")
            break
        if marker in (0x00, 0x01, *range(0xD0, 0xD9)):
            raise PixelsHeldBack("has a JPEG stream inside another one, or restart marks outside of a scan")
        content = _segment(frame, place)
        place += 2 + len(content)
        plain = _kept_content(marker, content, found)
        kept += b"" if plain is None else struct.pack(">BBH", 0xFF, marker, len(plain) + 2) + plain
        if marker == _SCAN:
            following = next_marker.search(frame, place)
            end = following.start() if following else len(frame)
            check_coded(frame[place:end])
            kept += frame[place:end]
            place = end
    return bytes(kept) + b"\xff\xd9"


def _segment(frame: bytes, place: int) -> bytes:
    """Return the content of the segment whose length field is at `place`."""
    length = int.from_bytes(frame[place : place + 2], "big")
    if length < 2 or place + length > len(frame):
        raise PixelsHeldBack("has a compressed frame that ends inside a segment")
    return frame[place + 2 : place + length]


def _kept_content(marker: int, content: bytes, found: Found) -> bytes | None:
    """Return the part of a JPEG segment to keep; None to drop it."""
    if marker in _JPEG_KEPT:
        if len(content) != _exact_length(marker, content):
            raise PixelsHeldBack("has a JPEG segment that is longer than its content")
        return content
    start, length = _APPLICATION.get(marker, (b"", 0))
    if length and content.startswith(start) and len(content) >= length:
        plain = content[:12] + b"\0\0" if marker == 0xE0 else content[:length]  # JFIF without its thumbnail
        if plain != content:
            found[f"JPEG segment APP{marker & 15}: surplus"] += 1
        return plain
    if marker == 0xFE:
        found["JPEG comment"] += 1
    else:
        found[f"JPEG segment APP{marker & 15}" if 0xE0 <= marker <= 0xEF else f"JPEG segment {marker:02X}"] += 1
    return None


def _exact_length(marker: int, content: bytes) -> int:
    """Return the length that the content of a segment states; it may be the length given."""
    try:
        if marker == _SCAN:
            return 4 + 2 * content[0]
        if marker in (0xDB, 0xC4):  # tables of quantization and of codes, one after another
            place = 0
            while place < len(content):
                codes = sum(content[place + 1 : place + 17]) + 16
                place += 1 + (codes if marker == 0xC4 else 64 * (1 + (content[place] >> 4)))
            return place
        if marker in (0xF8, 0xDD, 0xCC, 0xDC, 0xDE, 0xDF):
            longest = {0xDD: 4, 0xDC: 4, 0xDF: 1, 0xF8: 11 if content[0] == 1 else len(content)}
            return min(len(content), longest.get(marker, len(content)))
        return 6 + 3 * content[5]
    except IndexError:
        raise PixelsHeldBack("has a JPEG segment that is too short") from None


_CODESTREAM = b"\xff\x4f\xff\x51"
_TILE, _DATA, _J2K_END = b"\xff\x90", b"\xff\x93", b"\xff\xd9"
_J2K_KEPT = frozenset({0x50, 0x51, 0x52, 0x53, 0x56, 0x57, 0x58, 0x59, 0x5C, 0x5D, 0x5E, 0x5F, 0x60, 0x61})
"""Second bytes of the segments of JPEG 2000 that are kept: all but comments (64) and those with lengths or positions
that decoders do not need (55, 63), which a removed comment makes wrong."""


_PLAIN_BOXES = frozenset({b"jP  ", b"ftyp", b"rreq", b"jp2h"})
"""Boxes that every file has; they are removed without being counted."""


def clean_jpeg2000(frame: bytes, found: Found) -> bytes:
    """Return a JPEG 2000 image as a codestream without comments and boxes.

    Raises:
        PixelsHeldBack: the stream has a structure that cannot be cleaned.
    """
    if not frame.startswith(_CODESTREAM):
        frame = _codestream_of(frame, found)
    headers, place = _j2k_segments(frame, 2, _TILE, found)
    kept = bytearray(b"\xff\x4f" + headers)
    while frame[place : place + 2] == _TILE:
        length, head_end = int.from_bytes(frame[place + 6 : place + 10], "big"), place + 12
        headers, data_start = _j2k_segments(frame, head_end, _DATA, found)
        data_start += 2
        end = place + length if length else max(frame.find(_J2K_END, data_start), data_start)
        if not data_start <= end <= len(frame):
            raise PixelsHeldBack("has a JPEG 2000 tile that is truncated")
        data = frame[data_start:end]
        check_coded(data)
        total = struct.pack(">I", 14 + len(headers) + len(data))
        kept += frame[place : place + 6] + total + frame[place + 10 : head_end] + headers + _DATA + data
        place = end
    if place < len(frame) and frame[place : place + 2] != _J2K_END:
        raise PixelsHeldBack("has bytes between the tiles of a JPEG 2000 image")
    _count_surplus(frame[place + 2 :], found, "behind the end of the stream")
    return bytes(kept) + _J2K_END


def _j2k_segments(frame: bytes, place: int, end: bytes, found: Found) -> tuple[bytes, int]:
    """Return the segments from `place` that are kept, and the position of the marker `end`."""
    kept = bytearray()
    while frame[place : place + 2] != end:
        if frame[place : place + 1] != b"\xff":
            raise PixelsHeldBack("has a JPEG 2000 header that cannot be parsed")
        marker, content = frame[place + 1], _segment(frame, place + 2)
        if marker in _J2K_KEPT:
            kept += frame[place : place + 4 + len(content)]
        elif marker != 0x55:  # lengths of tiles are no identity
            found["JPEG 2000 comment" if marker == 0x64 else f"JPEG 2000 segment {marker:02X}"] += 1
        place += 4 + len(content)
    return bytes(kept), place


def _codestream_of(frame: bytes, found: Found) -> bytes:
    """Return the codestream in the boxes of a JP2 file."""
    place, codestream = 0, b""
    while place + 8 <= len(frame):
        length, kind = struct.unpack_from(">I4s", frame, place)
        start = place + 8
        if length == 1:
            length, start = int.from_bytes(frame[start : start + 8], "big"), start + 8
        end = place + length if length else len(frame)
        if not start <= end <= len(frame):
            break
        if kind == b"jp2c":
            codestream = codestream or frame[start:end]
        elif kind not in _PLAIN_BOXES:
            found[f"JPEG 2000 box {kind.decode('ascii') if kind.isalnum() else 'of unknown kind'}"] += 1
        place = end
    _count_surplus(frame[place:], found, "behind the boxes of JPEG 2000")
    if not codestream.startswith(_CODESTREAM):
        raise PixelsHeldBack("has a compressed frame without a JPEG 2000 start")
    return codestream


_RLE_HEADER = 64


def clean_rle(frame: bytes, found: Found, *, num_values: int, num_segments: int) -> bytes:
    """Return a run-length encoded frame whose segments end where their values do.

    Args:
        frame: header of 64 bytes and segments.
        found: what was removed.
        num_values: values that each segment encodes (pixels of a frame).
        num_segments: number of segments that the pixels need.

    Raises:
        PixelsHeldBack: the frame is damaged, or has another number of segments.
    """
    if len(frame) < _RLE_HEADER:
        raise PixelsHeldBack("has a run-length encoded frame that is truncated")
    count, *offsets = struct.unpack("<16I", frame[:_RLE_HEADER])
    if count != num_segments or count > 15:
        raise PixelsHeldBack(f"has a run-length encoded frame of {count} segments; its header states {num_segments}")
    starts = offsets[:count]
    if sorted(starts) != starts or starts[0] < _RLE_HEADER or starts[-1] > len(frame):
        raise PixelsHeldBack("has a run-length encoded frame with invalid offsets")
    if any(offsets[count:]):
        found["RLE header: surplus"] += 1
    _count_surplus(frame[_RLE_HEADER : starts[0]], found, "before the first RLE segment")
    body, places = bytearray(), []
    for start, end in zip(starts, [*starts[1:], len(frame)], strict=True):
        used = _rle_length(frame, start, end, num_values)
        _count_surplus(frame[start + used : end], found, "behind an RLE segment")
        places.append(_RLE_HEADER + len(body))
        body += frame[start : start + used] + b"\0" * (used % 2)
    return struct.pack("<16I", count, *places, *[0] * (15 - count)) + bytes(body)


def _rle_length(frame: bytes, start: int, end: int, num_values: int) -> int:
    """Return the number of bytes of a segment that encode `num_values` values."""
    place, decoded = start, 0
    while decoded < num_values and place < end:
        head = frame[place]
        if head < 128:
            decoded, place = decoded + head + 1, place + head + 2
        elif head > 128:
            decoded, place = decoded + 257 - head, place + 2
        else:
            place += 1
    if decoded != num_values or place > end:
        raise PixelsHeldBack("has a run-length encoded segment that does not fit the number of pixels")
    return place - start


def _count_surplus(rest: bytes, found: Found, where: str) -> None:
    """Count nonzero bytes outside the image; zeros are padding and identify no one."""
    if rest.strip(b"\0"):
        found[f"bytes {where}"] += 1
