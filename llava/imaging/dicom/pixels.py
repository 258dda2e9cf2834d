"""The pixels of one frame of a DICOM file, decoded by pydicom and the one decoder that is chosen for the compression.

    Dataset --Layout.of (sizes checked)--> Layout --frame_values--> [H, W] or [H, W, 3], as stored

The choice of decoder is part of the rules: two machines with the extra `data` installed see the same pixels.
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
from llava.imaging.dicom.header import PIXEL_TAGS, number, quiet, whole, word

_JPEG_FRAMES = frozenset({0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF, 0xF7})
"""Start-of-frame markers of JPEG and JPEG-LS."""

_ALONE = frozenset({0x01, *range(0xD0, 0xD9)})
"""Markers without a length."""


@dataclass(frozen=True, slots=True)
class Extent:
    """Size of one compressed frame: pixels, samples a pixel, and bits a sample."""

    height: int
    width: int
    samples: int
    bits: int


def extent_of(frame: bytes) -> Extent | None:
    """Return the size that a JPEG, JPEG-LS or JPEG 2000 frame states, or None where it states none."""
    jpeg2000 = frame.find(b"\xff\x4f\xff\x51", 0, 4096)  # a JP2 box may stand before it
    if jpeg2000 >= 0:
        return _jpeg2000(frame, jpeg2000 + 4)
    return _jpeg(frame) if frame[:2] == b"\xff\xd8" else None


def _jpeg2000(frame: bytes, start: int) -> Extent | None:
    """Read the SIZ segment whose length field is at `start`."""
    if len(frame) < start + 39:
        return None
    x_end, y_end, x_start, y_start = struct.unpack(">4I", frame[start + 4 : start + 20])
    (samples,) = struct.unpack(">H", frame[start + 36 : start + 38])
    return Extent(y_end - y_start, x_end - x_start, samples, (frame[start + 38] & 0x7F) + 1)


def _jpeg(frame: bytes) -> Extent | None:
    """Walk over the segments to the first start of frame."""
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
"""More images than this in one file are a broken count."""

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
"""Compression to pydicom's plugins, in the order in which they are asked; the second takes what the first cannot."""

PACKAGES = {
    "gdcm": "python-gdcm",
    "pillow": "pillow",
    "pyjpegls": "pyjpegls",
    "pylibjpeg": "pylibjpeg and pylibjpeg-openjpeg",
}

Stored = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Layout:
    """The fields that say what the pixel data are, checked.

    Attributes:
        height: pixels.
        width: pixels.
        num_frames: images in the file.
        samples: values a pixel: 1 or 3.
        color: photometric interpretation.
        bits: significant bits of a value.
        bits_allocated: bits that a value takes.
        is_signed: whether values may be negative.
        keyword: field that holds the pixels; the two of floating point have no bits.
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
        """Whether values are floating point."""
        return self.keyword != "PixelData"

    @classmethod
    def of(cls, dataset: FileDataset, *, max_pixels: int) -> Layout:
        """Return the layout of a file's pixel data.

        Raises:
            DataError: a field is missing or makes no sense, or a frame has more than `max_pixels`.
        """
        keyword = next((key for key in PIXEL_TAGS if key in dataset), "")
        height, width = whole(dataset, "Rows"), whole(dataset, "Columns")
        if height * width > max_pixels:
            raise DataError(f"has {width} x {height} pixels, more than {max_pixels}; scale it down first")
        if height < 1 or width < 1:
            raise DataError(f"is empty ({width} x {height} pixels)")
        if not keyword:
            raise DataError(f"describes {width} x {height} pixels but holds none; is the file cut off?")
        num_frames = whole(dataset, "NumberOfFrames", default=1) or 1
        if not 1 <= num_frames <= MAX_FRAMES:
            raise DataError(f"states {num_frames} frames; expected 1 to {MAX_FRAMES}")
        allocated = whole(dataset, "BitsAllocated", default={"FloatPixelData": 32}.get(keyword, 64))
        bits = whole(dataset, "BitsStored", default=allocated)
        if allocated not in (1, 8, 16, 32, 64) or not 1 <= bits <= allocated:
            raise DataError(f"states {bits} bits stored in {allocated}; expected up to 1, 8, 16 or 32")
        samples = whole(dataset, "SamplesPerPixel", default=1)
        if samples not in (1, 3):
            raise DataError(f"states {samples} values a pixel; expected 1 (gray, palette) or 3 (color)")
        color = word(dataset, "PhotometricInterpretation") or ("MONOCHROME2" if samples == 1 else "RGB")
        signed = whole(dataset, "PixelRepresentation", default=0) == 1
        return cls(height, width, num_frames, samples, color, bits, allocated, signed, keyword)


def frame_values(dataset: FileDataset, layout: Layout, index: int) -> tuple[Stored, str]:
    """Return one frame as stored, `[H, W]` or `[H, W, 3]`, and the color space that it is in now.

    Raises:
        DataError: damaged, cut off, or compressed in a way that is not decoded.
        MissingDependency: the decoder is not installed; names the package and the extra.
    """
    with quiet("has a head that cannot be understood"):
        syntax = UID(dataset.file_meta.TransferSyntaxUID)
    if syntax.name == str(syntax):
        raise DataError("is stored in a transfer syntax that the standard does not know")
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise DataError(f"is stored as {syntax.name}, which is not decoded; convert it to frames first") from None
    plugins = DECODERS.get(syntax, ())
    if plugins:
        _check_extent(dataset, layout, index)
        plugins = tuple(name for name in plugins if name in decoder.available_plugins)
        if not plugins:
            names = " or ".join(PACKAGES[name] for name in DECODERS[syntax])
            raise MissingDependency(
                f"a DICOM image is stored as {syntax.name}, and its decoder {names} is not installed; install it "
                "with: pip install 'llava[data]'"
            )
    else:
        _check_length(dataset, layout)
    return _decode(decoder, dataset, index, plugins or ("",), layout)


def _decode(
    decoder: Decoder, dataset: FileDataset, index: int, plugins: tuple[str, ...], layout: Layout
) -> tuple[Stored, str]:
    for plugin in plugins:
        try:
            with quiet("cannot be decoded"):
                options = as_pixel_options(dataset)
                values, properties = decoder.as_array(dataset, index=index, decoding_plugin=plugin, **options)
                break
        except DataError:
            if plugin == plugins[-1]:
                raise
    expected = (layout.height, layout.width) if layout.samples == 1 else (layout.height, layout.width, 3)
    if values.shape != expected:
        raise DataError(f"decodes to shape {values.shape}, but its header promises {expected}")
    return values, str(properties["photometric_interpretation"])


def _check_extent(dataset: FileDataset, layout: Layout, index: int) -> None:
    """Compare the size that the compressed frame states with the header's."""
    with quiet("cannot be decoded"):
        frame = get_frame(dataset.PixelData, index, number_of_frames=layout.num_frames, **_offsets(dataset))
    found = extent_of(frame)
    if found is None:  # run-length coding states no size: its output is bounded by the header's
        if dataset.file_meta.TransferSyntaxUID == uid.RLELossless:
            return
        raise DataError("cannot be decoded: the compressed image does not begin as it should; is the file cut off?")
    if (found.height, found.width, found.samples) != (layout.height, layout.width, layout.samples):
        raise DataError(
            f"holds a compressed image of {found.width} x {found.height} x {found.samples}, but its header says "
            f"{layout.width} x {layout.height} x {layout.samples}"
        )
    if dataset.file_meta.TransferSyntaxUID == uid.JPEGExtended12Bit and found.bits != 8:
        raise DataError(
            f"is stored as lossy JPEG of {found.bits} bits, for which there is no decoder under a free licence; "
            "convert the file to JPEG 2000 or to an uncompressed form first"
        )


def _offsets(dataset: FileDataset) -> dict[str, Any]:
    if "ExtendedOffsetTable" not in dataset or "ExtendedOffsetTableLengths" not in dataset:
        return {}
    return {"extended_offsets": (dataset.ExtendedOffsetTable, dataset.ExtendedOffsetTableLengths)}


def _check_length(dataset: FileDataset, layout: Layout) -> None:
    """Compare the length of uncompressed pixel data with what the header promises."""
    values = layout.height * layout.width * layout.num_frames
    values = values * 2 if layout.color == "YBR_FULL_422" else values * layout.samples
    expected = -(-values * layout.bits_allocated // 8)
    with quiet("cannot be read"):
        found = len(dataset[layout.keyword].value or b"")
    if found < expected:
        raise DataError(f"is cut off: it holds {found} bytes of pixels, and its header promises {expected}")


def padding_of(dataset: FileDataset, stored: Stored, layout: Layout) -> NDArray[np.bool_] | None:
    """Return which pixels are padding, which is no part of the image; None where the file names no padding value."""
    value = number(dataset, "PixelPaddingValue")
    if value is None:
        return None
    end = number(dataset, "PixelPaddingRangeLimit")
    bounds = [_signed(bound, layout) for bound in (value, value if end is None else end)]
    found: NDArray[np.bool_] = (stored >= min(bounds)) & (stored <= max(bounds))
    return found


def _signed(value: float, layout: Layout) -> float:
    """Read a padding value that was stored as the other kind of integer (63536 for -2000)."""
    span = float(2**layout.bits_allocated)
    if layout.is_signed and value >= span / 2:
        return value - span
    return value + span if value < 0 and not layout.is_signed else value
