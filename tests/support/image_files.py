"""PNG and TIFF files of forms that Pillow does not write: 16-bit color, interlacing, planes, white-is-zero."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

PNG_COLOR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}
"""Channels to the color type of PNG."""

ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""Passes of an interlaced PNG: first column and row, then the steps in both directions."""


def png_bytes(values: NDArray[np.uint16], *, interlaced: bool = False) -> bytes:
    """Return a 16-bit PNG of `[H, W, C]` samples whose rows use all five filters in turn."""
    height, width, channels = values.shape
    places = ADAM7 if interlaced else ((0, 0, 1, 1),)
    rows = b"".join(_filtered(values[top::down, left::right]) for left, top, right, down in places)
    head = struct.pack(">IIBBBBB", width, height, 16, PNG_COLOR_TYPES[channels], 0, 0, int(interlaced))
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def _filtered(values: NDArray[np.uint16]) -> bytes:
    """Return filtered rows of `[H, W, C]` samples."""
    if not values.size:
        return b""
    step = 2 * values.shape[2]
    rows = np.frombuffer(values.astype(">u2").tobytes(), np.uint8).reshape(len(values), -1).astype(int)
    before, out = np.zeros_like(rows[0]), b""
    for number, row in enumerate(rows):
        left, corner = (np.concatenate((np.zeros(step, int), line[:-step])) for line in (row, before))
        estimate = left + before - corner
        away = np.abs(np.stack((left, before, corner)) - estimate)
        paeth = np.choose(away.argmin(axis=0), (left, before, corner))
        kinds = (0, left, before, (left + before) // 2, paeth)
        out += bytes([number % 5]) + ((row - kinds[number % 5]) % 256).astype(np.uint8).tobytes()
        before = row
    return out


def tiff_bytes(
    values: NDArray[Any],
    *,
    photometric: int,
    order: str = "<",
    bits: int = 0,
    planes: bool = False,
    deflate: bool = False,
) -> bytes:
    """Return a TIFF of `[H, W]` or `[H, W, C]` samples in one strip, or one strip for each plane.

    Args:
        values: samples; for `bits` 1 and 12, integers that are packed row by row.
        photometric: 0 white is zero, 1 black is zero, 2 RGB.
        order: `<` or `>`.
        bits: bits of a sample; default: those of the type.
        planes: whether channels are stored one after another.
        deflate: whether the strips are compressed.
    """
    height, width = values.shape[:2]
    channels = values.shape[2] if values.ndim == 3 else 1
    bits = bits or values.dtype.itemsize * 8
    parts = [values[..., channel] for channel in range(channels)] if planes else [values]
    strips = [_packed(part, bits, order) for part in parts]
    strips = [zlib.compress(strip) for strip in strips] if deflate else strips
    sample_format = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    start = 8 + sum(map(len, strips))
    places = [8 + sum(map(len, strips[:number])) for number in range(len(strips))]
    fields = {
        256: (4, [width]), 257: (4, [height]), 258: (3, [bits] * channels), 259: (3, [8 if deflate else 1]),
        262: (3, [photometric]), 273: (4, places), 277: (3, [channels]), 278: (4, [height]),
        279: (4, list(map(len, strips))), 284: (3, [2 if planes else 1]), 339: (3, [sample_format] * channels),
    }  # fmt: skip
    if channels == 4 and photometric == 2:
        fields[338] = (3, [2])
    directory, extra = struct.pack(f"{order}H", len(fields)), b""
    extra_place = start + 2 + 12 * len(fields) + 4
    for tag in sorted(fields):
        kind, numbers = fields[tag]
        packed = struct.pack(f"{order}{len(numbers)}{'H' if kind == 3 else 'I'}", *numbers)
        if len(packed) > 4:
            packed, extra = struct.pack(f"{order}I", extra_place + len(extra)), extra + packed
        directory += struct.pack(f"{order}HHI", tag, kind, len(numbers)) + packed.ljust(4, b"\0")
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", start)
    return head + b"".join(strips) + directory + b"\0" * 4 + extra


def _packed(values: NDArray[Any], bits: int, order: str) -> bytes:
    if bits in (1, 12):
        wide = values.astype(">u2").view(np.uint8).reshape(len(values), -1, 2)
        each = np.unpackbits(wide, axis=2)[:, :, 16 - bits :].reshape(len(values), -1)
        return np.packbits(each, axis=1).tobytes()
    return values.astype(values.dtype.newbyteorder(order)).tobytes()
