"""Size and number of scans of a compressed image, read from its own bytes without decoding it."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

from llava.errors import DataError

MAX_SCANS = 100
"""Scans of a JPEG image, as libtiff limits them; progressive files have about ten."""

_JPEG_MARKER = re.compile(rb"\xff+[\xc0-\xcf\xd9-\xfe]")
"""Marker of a segment with a length, or of the end; the coded data of JPEG and JPEG-LS hold none."""

_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9

_JPEG_FRAMES = frozenset({0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF, 0xF7})
"""Start-of-frame markers of JPEG and JPEG-LS."""

_ALONE = frozenset({0x01, *range(0xD0, 0xD9)})
"""Markers without a length."""


@dataclass(frozen=True, slots=True)
class Extent:
    """Size of one compressed frame: pixels, samples per pixel, and bits per sample."""

    height: int
    width: int
    samples: int
    bits: int


def extent_of(frame: bytes) -> Extent | None:
    """Return the size that a JPEG, JPEG-LS or JPEG 2000 frame states, or None if it does not state one."""
    jpeg2000 = frame.find(b"\xff\x4f\xff\x51", 0, 4096)  # a JP2 box may precede it
    if jpeg2000 >= 0:
        return _jpeg2000(frame, jpeg2000 + 4)
    return _jpeg(frame) if frame[:2] == b"\xff\xd8" else None


def check_scans(frame: bytes) -> None:
    """Check the number of scans of a JPEG image; metadata, and bytes after its end, may hold anything.

    Raises:
        DataError: there are more than `MAX_SCANS`.
    """
    if frame[:2] != b"\xff\xd8":
        return
    # An empty scan takes a few bytes, and the decoder visits the whole image for it.
    position, number = 2, 0
    while (marker := _JPEG_MARKER.search(frame, position)) and frame[marker.end() - 1] != _END_OF_IMAGE:
        number += frame[marker.end() - 1] == _START_OF_SCAN
        position = marker.end() + int.from_bytes(frame[marker.end() : marker.end() + 2])
    if number > MAX_SCANS:
        raise DataError(f"has {number} JPEG scans; expected at most {MAX_SCANS}; save the image again")


def _jpeg2000(frame: bytes, start: int) -> Extent | None:
    """Return the size in the SIZ segment whose length field is at `start`."""
    if len(frame) < start + 39:
        return None
    x_end, y_end, x_start, y_start = struct.unpack(">4I", frame[start + 4 : start + 20])
    (samples,) = struct.unpack(">H", frame[start + 36 : start + 38])
    return Extent(y_end - y_start, x_end - x_start, samples, (frame[start + 38] & 0x7F) + 1)


def _jpeg(frame: bytes) -> Extent | None:
    """Return the size in the first start-of-frame segment."""
    place = 2
    while place + 4 <= len(frame):
        if frame[place] != 0xFF:
            return None
        marker = frame[place + 1]
        if marker == 0xFF:  # fill byte
            place += 1
        elif marker in _ALONE:
            place += 2
        elif marker in _JPEG_FRAMES:
            if place + 10 > len(frame):
                return None
            bits, height, width, samples = struct.unpack(">BHHB", frame[place + 4 : place + 10])
            return Extent(height, width, samples, bits)
        else:
            place += 2 + int(struct.unpack(">H", frame[place + 2 : place + 4])[0])
    return None
