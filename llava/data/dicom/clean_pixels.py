"""Clean the pixel field of a DICOM file: only the shown pixels are kept, verified by decoding.

    dataset --clean_pixel_field--> CleanPixels (new value, what was removed) --put_pixels--> clean copy
    original, copy --check_copy--> nothing, or PixelsHeldBack

A pixel field can hold more than pixels: metadata in compressed streams, bytes behind an image or a frame, overlays in
unused bits. Where these cannot be removed without a change of the shown pixels, the file is held back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pydicom
from pydicom import uid
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, generate_frames, parse_basic_offsets

from llava.data.dicom.clean_streams import Found, PixelsHeldBack, clean_jpeg, clean_jpeg2000, clean_rle
from llava.errors import DataError
from llava.imaging.dicom.header import PIXEL_TAGS, suppress_pydicom_output
from llava.imaging.dicom.pixels import PixelFormat, frame_values, is_compressed, unmasked_values
from llava.imaging.dicom.streams import extent_of
from llava.imaging.geometry import MAX_PIXELS

OVERLAY = "overlay in the bits above or below the stored bits"
OFFSET_TABLES = ("ExtendedOffsetTable", "ExtendedOffsetTableLengths")

_LS = frozenset({uid.JPEGLSLossless, uid.JPEGLSNearLossless})
_JPEG = frozenset({uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit, uid.JPEGLossless, uid.JPEGLosslessSV1, *_LS})


@dataclass(frozen=True, slots=True)
class CleanPixels:
    """Cleaned pixel field.

    Attributes:
        pixel_format: checked fields that describe the pixels.
        value: new value of the field.
        found: what was removed, to its number of occurrences.
    """

    pixel_format: PixelFormat
    value: bytes
    found: Found


def clean_pixel_field(dataset: pydicom.FileDataset) -> CleanPixels:
    """Return the pixel field of a file with its frames only.

    Raises:
        PixelsHeldBack: it has content that cannot be removed.
        DataError: it is damaged.
    """
    pixel_format = PixelFormat.of(dataset, max_pixels=MAX_PIXELS)
    found: Found = Counter()
    if is_compressed(dataset):
        with suppress_pydicom_output("has a compressed frame that cannot be parsed"):
            stored = _frames(dataset, pixel_format, found)
            frames = [_clean_frame(dataset, frame, pixel_format, found) for frame in stored]
            has_offsets = sum(map(len, frames)) < 1 << 31 and _has_offsets(dataset)
            return CleanPixels(pixel_format, encapsulate(frames, has_bot=has_offsets), found)
    with suppress_pydicom_output("cannot be read"):
        raw = bytes(dataset[pixel_format.keyword].value)
        is_swapped = dataset[pixel_format.keyword].VR == "OW" and not dataset.original_encoding[1]
    return CleanPixels(pixel_format, _clean_values(raw, pixel_format, found, dataset, is_swapped=is_swapped), found)


def _has_offsets(dataset: Dataset) -> bool:
    """Return whether a clean copy states its frame offsets: in a basic or an extended table."""
    return "ExtendedOffsetTable" in dataset or bool(parse_basic_offsets(dataset.PixelData))


def _frames(dataset: Dataset, pixel_format: PixelFormat, found: Found) -> Iterator[bytes]:
    """Yield the compressed frames of a file; fragments of one frame are joined."""
    offsets: dict[str, Any] = {}
    if all(keyword in dataset for keyword in OFFSET_TABLES):
        offsets = {"extended_offsets": (dataset.ExtendedOffsetTable, dataset.ExtendedOffsetTableLengths)}
    count = pixel_format.num_frames
    with suppress_pydicom_output("cannot be decoded"):
        frames = list(islice(generate_frames(dataset.PixelData, number_of_frames=count, **offsets), count + 1))
        num_bytes = sum(len(frame) for frame in frames[:count])
        num_stored = len(dataset.PixelData)
    if len(frames) < count:
        raise DataError(f"has {len(frames)} compressed frames; its header states {count}")
    # Items have 8 bytes each; offsets of an extended table may also pass over fragments.
    if len(frames) > count or (offsets and num_stored - num_bytes > 8 * (count + 2) + count):
        found["fragments outside of the frames"] += 1
    yield from frames[:count]


def _clean_frame(dataset: pydicom.FileDataset, frame: bytes, pixel_format: PixelFormat, found: Found) -> bytes:
    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax in _JPEG:
        return clean_jpeg(frame, found, is_ls=syntax in _LS)
    if syntax != uid.RLELossless:
        return clean_jpeg2000(frame, found)
    num_segments = pixel_format.samples * pixel_format.bits_allocated // 8
    num_values = pixel_format.height * pixel_format.width
    return clean_rle(frame, found, num_values=num_values, num_segments=num_segments)


def _clean_values(
    raw: bytes, pixel_format: PixelFormat, found: Found, dataset: pydicom.FileDataset, *, is_swapped: bool
) -> bytes:
    """Return uncompressed pixels of the stated length, without content in unused bits."""
    num_values = pixel_format.height * pixel_format.width * pixel_format.num_frames
    num_values *= 2 if pixel_format.color == "YBR_FULL_422" else pixel_format.samples
    num_bits = num_values * pixel_format.bits_allocated
    length = -(-num_bits // 8)
    if len(raw) < length:
        raise DataError(f"is truncated: it has {len(raw)} bytes of pixels, but its header states {length}")
    # Values of 8 bits in words of the other byte order: the last word begins with the padding.
    swaps = is_swapped and pixel_format.bits_allocated <= 8
    if swaps:
        raw = np.frombuffer(raw[: len(raw) // 2 * 2], "<u2").byteswap().tobytes()
    if raw[length:].strip(b"\0"):
        found["bytes behind the pixels"] += 1
    kept = bytearray(raw[:length])
    if num_bits % 8:
        if kept[-1] >> num_bits % 8:
            found["bits behind the pixels"] += 1
        kept[-1] &= (1 << num_bits % 8) - 1
    if pixel_format.bits < pixel_format.bits_allocated and not pixel_format.is_float:
        order = "<" if dataset.original_encoding[1] else ">"
        kept = bytearray(_without_overlays(bytes(kept), pixel_format, order, found))
    kept += b"\0" * (len(kept) % 2)
    return np.frombuffer(kept, "<u2").byteswap().tobytes() if swaps else bytes(kept)


def _without_overlays(raw: bytes, pixel_format: PixelFormat, order: str, found: Found) -> bytes:
    """Return values whose unused bits are zero or, above negative values, ones."""
    width = pixel_format.bits_allocated // 8
    values = np.frombuffer(raw, f"{order}u{width}").astype(f"u{width}")
    mask = values.dtype.type(((1 << pixel_format.bits) - 1) << pixel_format.shift)
    plain = values & mask
    extended = plain
    if pixel_format.is_signed:
        spare = pixel_format.bits_allocated - pixel_format.bits - pixel_format.shift
        extended = ((plain << spare).view(f"i{width}") >> spare).view(f"u{width}")
    # A file without sign bits in all pixels is unchanged. If only some pixels have them, they may be an overlay.
    if np.array_equal(values, plain):
        return raw
    if num_changed := int((values != extended).sum()):
        found[OVERLAY] += min(num_changed, int((values != plain).sum()))
    cleaned: bytes = extended.astype(f"{order}u{width}").tobytes()
    return cleaned


def check_unused_bits(dataset: pydicom.FileDataset, pixel_format: PixelFormat) -> None:
    """Raise `PixelsHeldBack` for compressed frames with content in unused bits.

    Only recompression would remove that content.
    """
    if not is_compressed(dataset) or pixel_format.bits >= pixel_format.bits_allocated:
        return
    for index, frame in enumerate(_frames(dataset, pixel_format, Counter())):
        extent = extent_of(frame)
        if extent is not None and extent.bits <= pixel_format.bits:
            continue
        kind = f"u{pixel_format.bits_allocated // 8}"
        values = unmasked_values(dataset, pixel_format, index).astype(kind)
        if not pixel_format.shift:
            # Codecs without signed values shift all values by one offset.
            offsets = values - frame_values(dataset, pixel_format, index)[0].astype(kind)
            if offsets.min() == offsets.max():
                continue
        ignored: Found = Counter()
        _without_overlays(values.astype(f"<{kind}").tobytes(), pixel_format, "<", ignored)
        if ignored[OVERLAY]:
            raise PixelsHeldBack(
                f"has an {OVERLAY} of compressed pixels; convert the file to an uncompressed form first"
            )


def put_pixels(copy: Dataset, dataset: pydicom.FileDataset, cleaned: CleanPixels) -> None:
    """Set the cleaned pixel field in a copy, and remove other pixel fields and offset tables from it."""
    keyword = cleaned.pixel_format.keyword
    for other in (*PIXEL_TAGS, *OFFSET_TABLES):
        if other in copy:
            del copy[other]
    with suppress_pydicom_output("cannot be written as a clean copy"):
        element = DataElement(keyword, dataset[keyword].VR, cleaned.value)
        element.is_undefined_length = is_compressed(dataset)
        copy.add(element)


def trim_tables(dataset: Dataset, found: Found) -> None:
    """Cut lookup tables to the number of entries that they state, in a copy and its sequences."""
    for prefix in ("LUT", *(f"{color}PaletteColorLookupTable" for color in ("Red", "Green", "Blue"))):
        descriptor, keyword = f"{prefix}Descriptor", f"{prefix}Data"
        if descriptor not in dataset or keyword not in dataset:
            continue
        with suppress_pydicom_output("has a lookup table that cannot be read"):
            num_entries = int(dataset[descriptor].value[0]) % 65536 or 65536
            value = dataset[keyword].value
            is_bytes = isinstance(value, bytes)
            length = num_entries * (2 if is_bytes and len(value) >= 2 * num_entries else 1)
            if len(value) > length + length % 2 or (is_bytes and value[length:].strip(b"\0")):
                found["bytes behind a lookup table"] += 1
                kept = value[:length]
                dataset[keyword].value = kept + b"\0" * (length % 2) if is_bytes else kept
    for element in dataset:
        for item in element.value if element.VR == "SQ" else ():
            trim_tables(item, found)


def check_copy(
    original: pydicom.FileDataset, copy: pydicom.FileDataset, cleaned: CleanPixels, texts: frozenset[str]
) -> None:
    """Raise `PixelsHeldBack` unless a copy has the decoded pixels of the original and nothing else.

    Args:
        original: all fields of the original.
        copy: clean copy, parsed from its bytes.
        cleaned: pixel field of the copy.
        texts: values of the original that must not be in the pixel field.
    """
    pixel_format = cleaned.pixel_format
    again = clean_pixel_field(copy)
    with suppress_pydicom_output("cannot be read"):
        value = bytes(copy[pixel_format.keyword].value)
    if again.found or again.value != value:
        raise PixelsHeldBack("still has other content in its pixel field after cleaning")
    check_unused_bits(copy, pixel_format)
    for index in range(pixel_format.num_frames):
        before, color = frame_values(original, pixel_format, index)
        after, color_after = frame_values(copy, pixel_format, index)
        if color != color_after or before.tobytes() != after.tobytes():
            raise PixelsHeldBack("would look different as a clean copy")
    # Bytes inside the data of a scan or of a tile are not parsed; what the header names is found there too.
    if any(needle in value for text in texts for needle in _encoded(text)):
        raise PixelsHeldBack("has the text of a removed field among its pixels")


def _encoded(text: str) -> Iterator[bytes]:
    """Yield the bytes of a text in usual encodings."""
    for encoding in ("utf-8", "utf-16-le", "utf-16-be", "latin-1"):
        with suppress(UnicodeEncodeError):
            yield text.encode(encoding)
