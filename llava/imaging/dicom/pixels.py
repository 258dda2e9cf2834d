"""Decode the pixels of one frame of a DICOM file, with pydicom and a fixed decoder per compression.

    Dataset --PixelFormat.of (sizes checked)--> PixelFormat --frame_values--> [H, W] or [H, W, 3], as stored

The decoders are fixed so that all machines with the extra `data` get the same pixels.
"""

from __future__ import annotations

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
from llava.imaging.dicom.streams import check_scans, extent_of

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

UNMASKED = frozenset({uid.JPEGLSLossless, uid.JPEG2000Lossless, uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL})
"""Lossless compressions for which pydicom does not clear the bits above the stored ones, which may hold an overlay."""

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
        shift: unused bits below the significant ones; not 0 only for left-justified values.
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
    shift: int = 0

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
        color = code_value(dataset, "PhotometricInterpretation")
        samples = integer_value(dataset, "SamplesPerPixel", default=3 if color.startswith(("RGB", "YBR")) else 1)
        if samples not in (1, 3):
            raise DataError(f"states {samples} values per pixel; expected 1 (gray, palette) or 3 (color)")
        color = color or _default_color(dataset, samples)
        values = height * width * num_frames * (2 if color == "YBR_FULL_422" else samples)
        allocated = _bits_allocated(dataset, keyword, values)
        bits = integer_value(dataset, "BitsStored", default=allocated)
        if allocated not in (1, 8, 16, 32, 64) or not 1 <= bits <= allocated:
            raise DataError(f"states {bits} bits stored in {allocated}; expected up to 1, 8, 16 or 32")
        signed = integer_value(dataset, "PixelRepresentation", default=0) == 1
        shift = _bit_shift(dataset, bits, allocated) if keyword == "PixelData" else 0
        return cls(height, width, num_frames, samples, color, bits, allocated, signed, keyword, shift)

    def missing_options(self, dataset: FileDataset) -> dict[str, Any]:
        """Return values for the decoder options of fields that the file lacks."""
        known = {
            "SamplesPerPixel": ("samples_per_pixel", self.samples),
            "PhotometricInterpretation": ("photometric_interpretation", self.color),
            "PlanarConfiguration": ("planar_configuration", 0),
            "BitsAllocated": ("bits_allocated", self.bits_allocated),
            "BitsStored": ("bits_stored", self.bits),
            "PixelRepresentation": ("pixel_representation", 0),
        }
        return dict(option for keyword, option in known.items() if dataset.get(keyword) in (None, ""))


def is_compressed(dataset: FileDataset) -> bool:
    """Return whether the pixels are stored in compressed frames."""
    return bool(dataset.file_meta.TransferSyntaxUID in DECODERS)


def _default_color(dataset: FileDataset, samples: int) -> str:
    """Return the color of a file that does not state it, where only one is sensible.

    Raises:
        DataError: the field is needed.
    """
    if samples == 1 and "RedPaletteColorLookupTableDescriptor" not in dataset:
        return "MONOCHROME2"
    if samples == 3 and not is_compressed(dataset):
        return "RGB"
    raise DataError("lacks field PhotometricInterpretation, and its pixels may have several meanings")


def _bits_allocated(dataset: FileDataset, keyword: str, num_values: int) -> int:
    """Return the stored bits of a value; for a file that does not state them, those that its length gives.

    Raises:
        DataError: the field is missing, and the length of the pixel data fits no number of bits.
    """
    if dataset.get("BitsAllocated") is not None:
        return integer_value(dataset, "BitsAllocated")
    if keyword != "PixelData":
        return 32 if keyword == "FloatPixelData" else 64
    with suppress_pydicom_output("cannot be read"):
        raw = dataset.PixelData or b""
    if is_compressed(dataset):
        bits = integer_value(dataset, "BitsStored")
        return next(allocated for allocated in (8, 16, 32, 64) if bits <= allocated or allocated == 64)
    for allocated in (8, 16, 32):
        expected = num_values * allocated // 8
        if len(raw) in (expected, expected + expected % 2):
            return allocated
    raise DataError(f"lacks field BitsAllocated, and {len(raw)} bytes of pixels fit no number of bits")


def _bit_shift(dataset: FileDataset, bits: int, allocated: int) -> int:
    """Return the number of unused bits below the stored bits, from HighBit.

    Raises:
        DataError: the stored bits do not fit.
    """
    high = integer_value(dataset, "HighBit", default=bits - 1)
    if not bits - 1 <= high < allocated:
        raise DataError(f"states HighBit {high} with {bits} bits stored in {allocated}; expected {bits - 1}")
    return high - bits + 1


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
    shift, stream_bits = pixel_format.shift, 0
    if plugins:
        stream_bits = _check_extent(dataset, pixel_format, index)
        shift = shift if stream_bits > pixel_format.bits else 0  # a stream of fewer bits has no room for a shift
        plugins = tuple(name for name in plugins if name in decoder.available_plugins)
        if not plugins:
            names = " or ".join(PACKAGES[name] for name in DECODERS[syntax])
            raise MissingDependency(
                f"a DICOM image is stored as {syntax.name}, and its decoder {names} is not installed; install it "
                "with: pip install 'llava[data]'"
            )
    else:
        _check_length(dataset, pixel_format)
    if not shift:
        values, color = _decode(decoder, dataset, index, plugins or ("",), pixel_format)
        if syntax in UNMASKED and stream_bits > pixel_format.bits:
            spare = values.dtype.itemsize * 8 - pixel_format.bits
            values = values << spare >> spare
        return values, color
    if pixel_format.color.startswith("YBR"):
        raise DataError(f"states HighBit {shift + pixel_format.bits - 1} with {pixel_format.bits} bits stored as YBR")
    whole = {"bits_stored": pixel_format.bits_allocated, "pixel_representation": 0}
    values, color = _decode(decoder, dataset, index, plugins or ("",), pixel_format, **whole)
    return _shifted(values, pixel_format), color


def unmasked_values(dataset: FileDataset, pixel_format: PixelFormat, index: int) -> Stored:
    """Return one frame with all allocated bits, unsigned, of a file that `frame_values` decodes."""
    decoder = get_decoder(UID(dataset.file_meta.TransferSyntaxUID))
    plugins = tuple(name for name in DECODERS[decoder.UID] if name in decoder.available_plugins)
    whole = {"bits_stored": pixel_format.bits_allocated, "pixel_representation": 0}
    return _decode(decoder, dataset, index, plugins, pixel_format, **whole)[0]


def _shifted(values: Stored, pixel_format: PixelFormat) -> Stored:
    """Return left-justified values, all allocated bits of each, as those that are stored."""
    spare = values.dtype.itemsize * 8 - pixel_format.bits
    upper = values << (spare - pixel_format.shift)  # bits above the stored ones are lost
    return (upper.view(f"i{upper.dtype.itemsize}") if pixel_format.is_signed else upper) >> spare


def _decode(
    decoder: Decoder,
    dataset: FileDataset,
    index: int,
    plugins: tuple[str, ...],
    pixel_format: PixelFormat,
    **changed: Any,
) -> tuple[Stored, str]:
    for plugin in plugins:
        try:
            with suppress_pydicom_output("cannot be decoded"):
                options = as_pixel_options(dataset, **{**pixel_format.missing_options(dataset), **changed})
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


def _check_extent(dataset: FileDataset, pixel_format: PixelFormat, index: int) -> int:
    """Return the bits of a value in a compressed frame.

    Raises:
        DataError: the size stated by the frame differs from the header, or the frame is not one that is decoded.
    """
    with suppress_pydicom_output("cannot be decoded"):
        frame = get_frame(dataset.PixelData, index, number_of_frames=pixel_format.num_frames, **_offsets(dataset))
    found = extent_of(frame)
    if found is None:  # run-length encoded frames do not state a size; the header limits their output
        if dataset.file_meta.TransferSyntaxUID == uid.RLELossless:
            return pixel_format.bits_allocated
        raise DataError("cannot be decoded: the compressed image has an invalid start; is the file truncated?")
    if (found.height, found.width, found.samples) != (pixel_format.height, pixel_format.width, pixel_format.samples):
        raise DataError(
            f"holds a compressed image of {found.width} x {found.height} x {found.samples}, but its header states "
            f"{pixel_format.width} x {pixel_format.height} x {pixel_format.samples}"
        )
    check_scans(frame)
    if dataset.file_meta.TransferSyntaxUID == uid.JPEGExtended12Bit and found.bits != 8:
        raise DataError(
            f"is stored as lossy JPEG of {found.bits} bits, for which no decoder has a free license; convert the file "
            "to JPEG 2000 or to an uncompressed form first"
        )
    return found.bits


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
