"""Decode the pixels of one frame of a DICOM file, with pydicom and a fixed decoder per compression.

    Dataset --PixelFormat.of (sizes checked)--> PixelFormat --frame_values--> [H, W] or [H, W, 3], as stored

The decoders are fixed so that all machines with the extra `data` get the same pixels.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import uid
from pydicom.dataset import FileDataset
from pydicom.encaps import get_frame
from pydicom.pixels.decoders.base import Decoder, get_decoder
from pydicom.pixels.utils import as_pixel_options
from pydicom.uid import UID

from llava.errors import DataError, MissingDependency
from llava.imaging.dicom.header import PIXEL_TAGS, code_value, integer_value, number_value, suppress_pydicom_output

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


MAX_FRAMES = 1 << 20
"""A larger number of frames is treated as an error in the file."""

DECODERS: dict[str, tuple[str, ...]] = {
    uid.JPEGBaseline8Bit: ("pillow",),
    uid.JPEGExtended12Bit: ("pillow",),
    uid.JPEGLossless: ("gdcm",),
    uid.JPEGLosslessSV1: ("gdcm",),
    uid.JPEGLSLossless: ("pyjpegls",),
    uid.JPEGLSNearLossless: ("pyjpegls",),
    uid.JPEG2000Lossless: ("pillow", "gdcm"),
    uid.JPEG2000: ("pillow", "gdcm"),
    uid.HTJ2KLossless: ("pylibjpeg",),
    uid.HTJ2KLosslessRPCL: ("pylibjpeg",),
    uid.HTJ2K: ("pylibjpeg",),
    uid.RLELossless: ("pydicom",),
}
"""Decoder plugins of pydicom for each compression, in the order in which they are tried."""

PACKAGES = {
    "gdcm": "python-gdcm",
    "pillow": "pillow",
    "pyjpegls": "pyjpegls",
    "pylibjpeg": "pylibjpeg and pylibjpeg-openjpeg",
}

Stored = NDArray[Any]


@dataclass(frozen=True, slots=True)
class PixelFormat:
    """Checked fields that describe the pixel data.

    Attributes:
        height: rows of pixels.
        width: columns of pixels.
        num_frames: number of frames in the file.
        samples: values per pixel, 1 or 3.
        color: photometric interpretation.
        bits: significant bits of a value.
        bits_allocated: stored bits of a value.
        is_signed: whether values may be negative.
        keyword: field that holds the pixels; the two floating-point fields do not state bits.
    """

    height: int
    width: int
    num_frames: int
    samples: int
    color: str
    bits: int
    bits_allocated: int
    is_signed: bool
    keyword: str

    @property
    def is_float(self) -> bool:
        """Return whether values are floating point."""
        return self.keyword != "PixelData"

    @classmethod
    def of(cls, dataset: FileDataset, *, max_pixels: int) -> PixelFormat:
        """Return the pixel format of a file.

        Raises:
            DataError: a field is missing or invalid, or a frame has more than `max_pixels`.
        """
        keyword = next((key for key in PIXEL_TAGS if key in dataset), "")
        height, width = integer_value(dataset, "Rows"), integer_value(dataset, "Columns")
        if height * width > max_pixels:
            raise DataError(f"has {width} x {height} pixels, more than the limit of {max_pixels}; scale it down first")
        if height < 1 or width < 1:
            raise DataError(f"is empty ({width} x {height} pixels)")
        if not keyword:
            raise DataError(f"states {width} x {height} pixels but has no pixel data; is the file truncated?")
        num_frames = integer_value(dataset, "NumberOfFrames", default=1) or 1
        if not 1 <= num_frames <= MAX_FRAMES:
            raise DataError(f"states {num_frames} frames; expected 1 to {MAX_FRAMES}")
        allocated = integer_value(dataset, "BitsAllocated", default={"FloatPixelData": 32}.get(keyword, 64))
        bits = integer_value(dataset, "BitsStored", default=allocated)
        if allocated not in (1, 8, 16, 32, 64) or not 1 <= bits <= allocated:
            raise DataError(f"states {bits} bits stored in {allocated}; expected up to 1, 8, 16 or 32")
        samples = integer_value(dataset, "SamplesPerPixel", default=1)
        if samples not in (1, 3):
            raise DataError(f"states {samples} values per pixel; expected 1 (gray, palette) or 3 (color)")
        color = code_value(dataset, "PhotometricInterpretation") or ("MONOCHROME2" if samples == 1 else "RGB")
        signed = integer_value(dataset, "PixelRepresentation", default=0) == 1
        return cls(height, width, num_frames, samples, color, bits, allocated, signed, keyword)


def frame_values(dataset: FileDataset, pixel_format: PixelFormat, index: int) -> tuple[Stored, str]:
    """Return one frame as stored, `[H, W]` or `[H, W, 3]`, and its color space after decoding.

    Raises:
        DataError: the frame is damaged, truncated, or in a compression that is not decoded.
        MissingDependency: the decoder is not installed; the message names the package and the extra.
    """
    with suppress_pydicom_output("has a header that cannot be parsed"):
        syntax = UID(dataset.file_meta.TransferSyntaxUID)
    if syntax.name == str(syntax):
        raise DataError("is stored in a transfer syntax that the standard does not define")
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise DataError(f"is stored as {syntax.name}, which is not supported; convert it to frames first") from None
    plugins = DECODERS.get(syntax, ())
    if plugins:
        _check_extent(dataset, pixel_format, index)
        plugins = tuple(name for name in plugins if name in decoder.available_plugins)
        if not plugins:
            names = " or ".join(PACKAGES[name] for name in DECODERS[syntax])
            raise MissingDependency(
                f"a DICOM image is stored as {syntax.name}, and its decoder {names} is not installed; install it "
                "with: pip install 'llava[data]'"
            )
    else:
        _check_length(dataset, pixel_format)
    return _decode(decoder, dataset, index, plugins or ("",), pixel_format)


def _decode(
    decoder: Decoder, dataset: FileDataset, index: int, plugins: tuple[str, ...], pixel_format: PixelFormat
) -> tuple[Stored, str]:
    for plugin in plugins:
        try:
            with suppress_pydicom_output("cannot be decoded"):
                options = as_pixel_options(dataset)
                values, properties = decoder.as_array(dataset, index=index, decoding_plugin=plugin, **options)
                break
        except DataError:
            if plugin == plugins[-1]:
                raise
    expected = (
        (pixel_format.height, pixel_format.width)
        if pixel_format.samples == 1
        else (pixel_format.height, pixel_format.width, 3)
    )
    if values.shape != expected:
        raise DataError(f"decodes to shape {values.shape}, but its header states {expected}")
    return values, str(properties["photometric_interpretation"])


def _check_extent(dataset: FileDataset, pixel_format: PixelFormat, index: int) -> None:
    """Raise `DataError` if the size stated by the compressed frame differs from the header."""
    with suppress_pydicom_output("cannot be decoded"):
        frame = get_frame(dataset.PixelData, index, number_of_frames=pixel_format.num_frames, **_offsets(dataset))
    found = extent_of(frame)
    if found is None:  # run-length encoded frames do not state a size; the header limits their output
        if dataset.file_meta.TransferSyntaxUID == uid.RLELossless:
            return
        raise DataError("cannot be decoded: the compressed image has an invalid start; is the file truncated?")
    if (found.height, found.width, found.samples) != (pixel_format.height, pixel_format.width, pixel_format.samples):
        raise DataError(
            f"holds a compressed image of {found.width} x {found.height} x {found.samples}, but its header states "
            f"{pixel_format.width} x {pixel_format.height} x {pixel_format.samples}"
        )
    if dataset.file_meta.TransferSyntaxUID == uid.JPEGExtended12Bit and found.bits != 8:
        raise DataError(
            f"is stored as lossy JPEG of {found.bits} bits, for which no decoder has a free license; convert the file "
            "to JPEG 2000 or to an uncompressed form first"
        )


def _offsets(dataset: FileDataset) -> dict[str, Any]:
    if "ExtendedOffsetTable" not in dataset or "ExtendedOffsetTableLengths" not in dataset:
        return {}
    return {"extended_offsets": (dataset.ExtendedOffsetTable, dataset.ExtendedOffsetTableLengths)}


def _check_length(dataset: FileDataset, pixel_format: PixelFormat) -> None:
    """Raise `DataError` if uncompressed pixel data are shorter than the header states."""
    values = pixel_format.height * pixel_format.width * pixel_format.num_frames
    values = values * 2 if pixel_format.color == "YBR_FULL_422" else values * pixel_format.samples
    expected = -(-values * pixel_format.bits_allocated // 8)
    with suppress_pydicom_output("cannot be read"):
        found = len(dataset[pixel_format.keyword].value or b"")
    if found < expected:
        raise DataError(f"is truncated: it has {found} bytes of pixels, but its header states {expected}")


def padding_of(dataset: FileDataset, stored: Stored, pixel_format: PixelFormat) -> NDArray[np.bool_] | None:
    """Return the mask of padding pixels; None if the file does not state a padding value."""
    value = number_value(dataset, "PixelPaddingValue")
    if value is None:
        return None
    end = number_value(dataset, "PixelPaddingRangeLimit")
    bounds = [_signed(bound, pixel_format) for bound in (value, value if end is None else end)]
    found: NDArray[np.bool_] = (stored >= min(bounds)) & (stored <= max(bounds))
    return found


def _signed(value: float, pixel_format: PixelFormat) -> float:
    """Return a padding value that may be stored with the wrong signedness (63536 for -2000)."""
    span = float(2**pixel_format.bits_allocated)
    if pixel_format.is_signed and value >= span / 2:
        return value - span
    return value + span if value < 0 and not pixel_format.is_signed else value
