"""Read DICOM headers without patient data: a list of permitted fields, and no output of pydicom.

    file --pydicom, only IMAGE_TAGS--> Dataset --word, number, numbers--> checked plain values

Warnings, log lines and exceptions of pydicom may quote field values, so they are suppressed or replaced: errors name
the field and the kind of problem.
"""

from __future__ import annotations

import io
import logging
import math
import threading
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO

import pydicom
from pydicom.dataset import Dataset, FileDataset
from pydicom.filereader import read_dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from llava.errors import DataError, LlavaError
from llava.imaging.dicom.sniff import NUM_BEFORE_DATA, is_dicom

IMAGE_TAGS = (
    *("SOPClassUID", "Modality", "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration"),
    *("NumberOfFrames", "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"),
    *("PixelPaddingValue", "PixelPaddingRangeLimit", "RescaleIntercept", "RescaleSlope", "ModalityLUTSequence"),
    *("WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence"),
    *("PixelAspectRatio", "PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing"),
    *("RedPaletteColorLookupTableDescriptor", "RedPaletteColorLookupTableData"),
    *("GreenPaletteColorLookupTableDescriptor", "GreenPaletteColorLookupTableData"),
    *("BluePaletteColorLookupTableDescriptor", "BluePaletteColorLookupTableData"),
    *("SegmentedRedPaletteColorLookupTableData", "SegmentedGreenPaletteColorLookupTableData"),
    *("SegmentedBluePaletteColorLookupTableData", "SharedFunctionalGroupsSequence"),
    *("PerFrameFunctionalGroupsSequence", "ExtendedOffsetTable", "ExtendedOffsetTableLengths"),
)
"""Fields that are read to render an image, in addition to the pixels; none of them describes a person."""

PIXEL_TAGS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")

MAX_INFLATED = 1 << 29
"""Largest size in bytes of the data set of a deflated file after decompression."""


class _Silence:
    """Context manager that turns off warnings and log lines of pydicom while any thread reads DICOM."""

    # The settings are global to the process, so readers are counted and the last one restores them.

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_readers = 0
        self._filters: Any = None
        self._level = logging.NOTSET

    def __enter__(self) -> None:
        logger = logging.getLogger("pydicom")
        with self._lock:
            if self._num_readers == 0:
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.filterwarnings("ignore", module=r"pydicom(\.|$)")
                self._level = logger.level
                logger.setLevel(logging.CRITICAL + 1)
            self._num_readers += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._num_readers -= 1
            if self._num_readers == 0:
                logging.getLogger("pydicom").setLevel(self._level)
                self._filters.__exit__(None, None, None)


silence = _Silence()


@contextmanager
def suppress_pydicom_output(problem: str) -> Iterator[None]:
    """Run pydicom without output; turn its exceptions into a `DataError` that does not quote values.

    Args:
        problem: start of the message, such as "cannot be read"; callers put the name of the file before it.

    Raises:
        DataError: an exception other than an error of this package was raised inside.
    """
    try:
        with silence:
            yield
    except LlavaError:
        raise
    except Exception as error:  # parsers and decoders raise exceptions of any type
        # `from None`: the cause may quote a value, which a traceback would print.
        raise DataError(
            f"{problem}: the DICOM file is damaged or does not follow the standard ({type(error).__name__})"
        ) from None


def read_header(source: bytes | BinaryIO, tags: Sequence[str], *, name: str, pixels: bool) -> FileDataset:
    """Return the fields `tags` of a DICOM file, and its pixels if requested; no other field is kept.

    Args:
        source: bytes of the file, or the file opened for reading.
        tags: keywords of the fields.
        name: name of the file in messages.
        pixels: whether to read the pixel data.

    Raises:
        DataError: the file is damaged, truncated, or decompresses to more than `MAX_INFLATED` bytes.
    """
    stream = io.BytesIO(source) if isinstance(source, bytes) else source
    wanted = [*tags, *PIXEL_TAGS] if pixels else list(tags)
    with suppress_pydicom_output(f"image {name} cannot be read"):
        check_inflated(stream, name)
        dataset = pydicom.dcmread(stream, force=True, specific_tags=list(wanted), stop_before_pixels=not pixels)
        fill_syntax(dataset)
    return dataset


def check_inflated(stream: BinaryIO, name: str) -> None:
    """Raise `DataError` for a deflated file that decompresses to more than `MAX_INFLATED` bytes."""
    # pydicom would decompress it completely, whatever its size.
    start = stream.tell()
    try:
        if not is_dicom(stream.read(NUM_BEFORE_DATA)):
            stream.seek(start)
        # The file header always has explicit types and little-endian order; reading it leaves the stream after it.
        head = read_dataset(stream, False, True, stop_when=lambda tag, *_: tag.group != 2)
        if head.get("TransferSyntaxUID") != DeflatedExplicitVRLittleEndian:
            return
        inflater, total = zlib.decompressobj(-zlib.MAX_WBITS), 0
        while not inflater.eof and (packed := inflater.unconsumed_tail or stream.read(1 << 16)):
            total += len(inflater.decompress(packed, 1 << 20))
            if total > MAX_INFLATED:
                raise DataError(f"image {name} decompresses to more than {MAX_INFLATED} bytes; expected a smaller file")
    finally:
        stream.seek(start)


def fill_syntax(dataset: FileDataset) -> None:
    """Set the transfer syntax that pydicom detected for a file that does not state it."""
    if dataset.file_meta.get("TransferSyntaxUID"):
        return
    is_implicit, is_little = dataset.original_encoding
    plain = ExplicitVRLittleEndian if is_little else ExplicitVRBigEndian
    dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if is_implicit else plain


def code_value(dataset: Dataset, keyword: str) -> str:
    """Return a code such as `MONOCHROME2` in capitals, the first of several; empty if the field is absent."""
    value = _value(dataset, keyword)
    value = value[0] if isinstance(value, Sequence) and not isinstance(value, str) and value else value
    return value.strip(" \0").upper() if isinstance(value, str) else ""


def number_values(dataset: Dataset, keyword: str) -> list[float]:
    """Return the finite numbers of a field; an empty list if it is absent or empty.

    Raises:
        DataError: a value is not a finite number.
    """
    value = _value(dataset, keyword)
    if value is None or value == "":
        return []
    parts = list(value) if isinstance(value, Sequence) and not isinstance(value, str | bytes) else [value]
    try:
        found = [float(part) for part in parts if part is not None and part != ""]
    except (TypeError, ValueError, OverflowError):
        raise DataError(f"has a value that is not a number in field {keyword}") from None
    if not all(map(math.isfinite, found)):
        raise DataError(f"has a value that is not finite in field {keyword}")
    return found


def number_value(dataset: Dataset, keyword: str) -> float | None:
    """Return the first number of a field, or None if it is absent or empty.

    Raises:
        DataError: the value is not a finite number.
    """
    found = number_values(dataset, keyword)
    return found[0] if found else None


def integer_value(dataset: Dataset, keyword: str, *, default: int | None = None) -> int:
    """Return the integer of a field, or `default` if the field is absent.

    Raises:
        DataError: the field is absent and has no default, or its value is not an integer.
    """
    found = number_value(dataset, keyword)
    if found is None:
        if default is None:
            raise DataError(f"lacks field {keyword}; expected an integer")
        return default
    if found != int(found):
        raise DataError(f"has a value that is not an integer in field {keyword}")
    return int(found)


def sequence_items(dataset: Dataset, keyword: str) -> list[Dataset]:
    """Return the items of a sequence; an empty list if it is absent.

    Raises:
        DataError: the field is not a sequence.
    """
    value = _value(dataset, keyword)
    if value is None:
        return []
    found = list(value) if isinstance(value, Sequence) and not isinstance(value, str | bytes) else [value]
    if not all(isinstance(item, Dataset) for item in found):
        raise DataError(f"has a value that is not a sequence in field {keyword}")
    return found


def _value(dataset: Dataset, keyword: str) -> Any:
    """Return the value of a field."""
    with suppress_pydicom_output(f"has a field {keyword} that cannot be parsed"):  # pydicom converts values on access
        return dataset.get(keyword)
