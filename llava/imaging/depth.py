"""Lossless reading of images of more than 8 bits.

Pillow would keep 8 bits or ignore that white is zero.

    file --open_stored--> opened image --load_pixels--> L or RGB, windowed from the smallest to the largest value

Pillow keeps the high byte of 16-bit color only. The other byte is decoded in a second pass, which reads the samples in
the opposite byte order.
"""

from __future__ import annotations

import io
import struct
import sys
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import TiffImageFile

from llava.errors import DataError
from llava.imaging.dicom.streams import check_scans, extent_of
from llava.imaging.geometry import to_gray_or_rgb, windowed_levels

_PHOTOMETRIC, _BITS, _PLANES = 262, 258, 284
"""TIFF fields PhotometricInterpretation (0: white is zero), BitsPerSample and PlanarConfiguration (2: planes)."""

_SWAPPED = {";16B": ";16L", ";16L": ";16B", ";16N": ";16B" if sys.byteorder == "little" else ";16L"}
"""End of a raw mode of Pillow to that of the opposite byte order."""

TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

NOT_OPENED = ("EPS", "IPTC", "WMF")
"""Formats for which Pillow runs a program that reads the file (PostScript), asks the system to draw it, or opens a file
of any format inside it."""


def open_stored(data: bytes) -> tuple[ImageFile, bool]:
    """Return the bytes of a file as an opened image, and whether its gray levels must be inverted.

    Raises:
        UnidentifiedImageError: the format is unknown, or one of `NOT_OPENED`.
    """
    try:
        return _open(data), False
    except UnidentifiedImageError:
        # Pillow supports white-is-zero for some depths and byte orders only; other files differ in this one number.
        black_is_zero = _as_black_is_zero(data)
        if black_is_zero is None:
            raise
        return _open(black_is_zero), True


def _open(data: bytes) -> ImageFile:
    Image.preinit()
    try:
        return Image.open(io.BytesIO(data), formats=_formats())
    except UnidentifiedImageError:
        if not Image.init():  # Pillow imports rare formats on demand, and has already done so
            raise
        return Image.open(io.BytesIO(data), formats=_formats())


def _formats() -> list[str]:
    return [name for name in Image.ID if name not in NOT_OPENED]


def load_pixels(image: ImageFile, data: bytes, *, inverted: bool = False) -> Image.Image:
    """Decode an opened image to mode L or RGB; more than 8 bits are windowed over all channels together.

    Args:
        image: opened, not yet decoded image.
        data: bytes of its file.
        inverted: see `open_stored`.

    Raises:
        DataError: the image has color of more than 8 bits in a form that is not supported, or too many scans.
    """
    if isinstance(image, JpegImageFile):
        check_scans(data)
    samples = _deep_samples(image, data)
    if samples is not None:
        return windowed_levels(samples)
    image.load()
    shown = to_gray_or_rgb(image)
    is_deep = image.mode.startswith(("I", "F"))  # Pillow inverts 8 bits and less itself
    if isinstance(image, TiffImageFile) and is_deep and image.tag_v2.get(_PHOTOMETRIC) == 0:
        inverted = True
    return ImageOps.invert(shown) if inverted else shown


def _deep_samples(image: ImageFile, data: bytes) -> NDArray[np.uint16] | None:
    """Return the samples of 16-bit color, `[H, W, 3]` or `[H, W]`; None for any other image."""
    if isinstance(image, PngImageFile) and image.tile:
        return _png_samples(image, data)
    if isinstance(image, TiffImageFile) and not image.mode.startswith(("I", "F")):
        return _tiff_samples(image, data) if max(image.tag_v2.get(_BITS, (1,))) > 8 else None
    if isinstance(image, PpmImageFile) and image.mode == "RGB":
        return _ppm_samples(image, data)
    if image.format == "FITS" and image.mode != "L":  # its bytes are big-endian, and Pillow reads them as native
        raise _unsupported("FITS", "gray")
    if image.format == "SGI" and image.mode != "L" and data[3:4] == b"\2":  # the byte states the bytes per sample
        raise _unsupported("SGI")
    if image.format == "JPEG2000" and not image.mode.startswith("I"):
        extent = extent_of(data)
        if extent is not None and extent.samples > 1 and extent.bits > 8:
            raise _unsupported("JPEG 2000")
    return None


def _png_samples(image: PngImageFile, data: bytes) -> NDArray[np.uint16] | None:
    raw_mode = image.tile[0].args
    if not isinstance(raw_mode, str) or not raw_mode.endswith(";16B") or image.mode not in ("RGB", "RGBA"):
        return None
    image.load()
    if raw_mode.startswith("LA"):  # as RGBA of 8 bits: the two bytes of gray, then those of alpha
        pair = _second_pass(data, ["RGBA"])
        return _joined(pair[:, :, 0], pair[:, :, 1])
    return _joined(np.asarray(image)[:, :, :3], _second_pass(data, [_swapped(raw_mode)])[:, :, :3])


def _tiff_samples(image: TiffImageFile, data: bytes) -> NDArray[np.uint16]:
    if image.mode not in ("RGB", "RGBA"):
        raise _unsupported(f"TIFF {image.mode}")
    stated = [str(cast(tuple[Any, ...], tile.args)[0]) for tile in image.tile]
    if image.tag_v2.get(_PLANES, 1) == 2:
        if any(len(raw_mode) > 1 for raw_mode in stated):  # one compressed tile, which is always read in native order
            raise _unsupported("compressed TIFF in planes")
        order = ";16L" if image.tag_v2.prefix == b"II" else ";16B"
        stated = [band + order for band in stated]  # Pillow reads planes as 8 bits
        _set_raw_modes(image, stated)
    if any(raw_mode[-4:] not in _SWAPPED or raw_mode.startswith("RGBa") for raw_mode in stated):
        raise _unsupported("TIFF with premultiplied transparency")
    image.load()
    low = _second_pass(data, [_swapped(raw_mode) for raw_mode in stated])
    return _joined(np.asarray(image)[:, :, :3], low[:, :, :3])


def _ppm_samples(image: PpmImageFile, data: bytes) -> NDArray[np.uint16] | None:
    args = image.tile[0].args
    largest = args[1] if isinstance(args, tuple) else 255
    if not isinstance(largest, int) or largest <= 255:
        return None
    if image.tile[0].codec_name == "ppm_plain":
        raise _unsupported("PPM in plain text")
    width, height = image.size
    found = np.frombuffer(data, ">u2", count=width * height * 3, offset=image.tile[0].offset)
    return found.astype(np.uint16).reshape(height, width, 3)


def _second_pass(data: bytes, raw_modes: list[str]) -> NDArray[np.uint8]:
    """Return the bytes that a file gives when its tiles are read in other raw modes."""
    with _open(data) as image:
        _set_raw_modes(image, raw_modes)
        image.load()
        return np.asarray(image)


def _set_raw_modes(image: ImageFile, raw_modes: list[str]) -> None:
    def changed(args: Any, raw_mode: str) -> Any:
        return (raw_mode, *args[1:]) if isinstance(args, tuple) else raw_mode

    image.tile = [
        tile._replace(args=changed(tile.args, raw_mode)) for tile, raw_mode in zip(image.tile, raw_modes, strict=True)
    ]


def _swapped(raw_mode: str) -> str:
    return raw_mode[:-4] + _SWAPPED[raw_mode[-4:]]


def _joined(high: NDArray[np.uint8], low: NDArray[np.uint8]) -> NDArray[np.uint16]:
    found: NDArray[np.uint16] = high.astype(np.uint16) * np.uint16(256) + low
    return found


def _unsupported(form: str, kind: str = "color") -> DataError:
    return DataError(
        f"it has {kind} of more than 8 bits as {form}; expected 8 bits, or 16 bits as PNG or TIFF; convert the image"
    )


def _as_black_is_zero(data: bytes) -> bytes | None:
    """Return a white-is-zero TIFF file with its first image declared black-is-zero; None for other files."""
    if data[:4] not in TIFF_STARTS:
        return None
    order = "<" if data[:2] == b"II" else ">"
    # Offset of the directory, then the number of entries: sizes differ in BigTIFF.
    is_big = 43 in data[2:4]
    offset_type, count_type, entry_size = ("Q", "Q", 20) if is_big else ("I", "H", 12)
    try:
        (start,) = struct.unpack_from(order + offset_type, data, 8 if is_big else 4)
        (num_entries,) = struct.unpack_from(order + count_type, data, start)
        first = start + struct.calcsize(count_type)
        for place in range(first, first + min(num_entries, 4096) * entry_size, entry_size):
            value_place = place + entry_size - struct.calcsize(offset_type)
            if struct.unpack_from(order + "HH", data, place) == (_PHOTOMETRIC, 3):
                if struct.unpack_from(order + "H", data, value_place) != (0,):
                    return None
                one = struct.pack(order + "H", 1)
                return data[:value_place] + one + data[value_place + 2 :]
    except struct.error:
        return None
    return None
