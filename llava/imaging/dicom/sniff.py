"""Detect DICOM files by their first bytes, without importing pydicom."""

from __future__ import annotations

import struct

MARK = b"DICM"
NUM_BEFORE_DATA = 132
"""Number of bytes of the preamble, which may hold anything, and the mark after it."""


def is_dicom(data: bytes) -> bool:
    """Return whether the first bytes of a file are those of a DICOM file (the mark after the preamble)."""
    return data[:NUM_BEFORE_DATA].endswith(MARK) and len(data) >= NUM_BEFORE_DATA


def may_be_bare(data: bytes) -> bool:
    """Return whether a file may be a DICOM data set without preamble."""
    # It starts with two fields in ascending order, the first of group 2 or 8, in either byte order.
    for order in "<>":
        if len(data) < 16:
            return False
        group, element, kind = struct.unpack(f"{order}HH2s", data[:6])
        if group not in (2, 8) or element > 0x0100:
            continue
        explicit = kind.isalpha() and kind.isupper()
        length = struct.unpack(f"{order}H", data[6:8])[0] if explicit else struct.unpack(f"{order}I", data[4:8])[0]
        following = data[8 + length : 12 + length]
        if length % 2 == 0 and len(following) == 4:
            second = struct.unpack(f"{order}HH", following)
            if second > (group, element) and second[0] in (2, 8):
                return True
    return False
