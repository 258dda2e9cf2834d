"""Reading DICOM headers without reading about the patient: a list of permitted fields, and silence.

    file --pydicom, only PICTURE_TAGS--> Dataset --word, number, numbers--> checked plain values

What pydicom says in warnings, log lines and exceptions may quote a field's value, so none of it leaves this module:
errors name the field and the kind of the problem.
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

PICTURE_TAGS = (
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
"""All that is read to show an image, besides the pixels; none of it is about a person."""

PIXEL_TAGS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")

MAX_INFLATED = 1 << 29
"""Largest data set, in bytes, that a deflated file may unpack to."""


class _Silence:
    """pydicom's warnings and log lines switched off while at least one thread reads DICOM; the switches are global."""

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
def quiet(problem: str) -> Iterator[None]:
    """Run pydicom without a word from it; whatever it raises becomes a `DataError` that quotes nothing.

    Args:
        problem: begins the message, such as "cannot be read"; what reads files puts the name before it.

    Raises:
        DataError: something that is not one of this package's own errors was raised inside.
    """
    try:
        with silence:
            yield
    except LlavaError:
        raise
    except Exception as error:  # parsers and decoders raise whatever they run into
        # `from None`: the cause may quote a value, and would be printed with a traceback.
        raise DataError(
            f"{problem}: the DICOM file is damaged or not to the standard ({type(error).__name__})"
        ) from None


def read(source: bytes | BinaryIO, tags: Sequence[str], *, name: str, pixels: bool) -> FileDataset:
    """Return the fields `tags` of a DICOM file, and its pixels if asked for; nothing else of it is kept.

    Args:
        source: the file's bytes, or the file opened for reading.
        tags: keywords of the fields.
        name: how messages call the file.
        pixels: whether to read the pixel data too.

    Raises:
        DataError: damaged, cut off, or unpacks to more than `MAX_INFLATED` bytes.
    """
    stream = io.BytesIO(source) if isinstance(source, bytes) else source
    wanted = [*tags, *PIXEL_TAGS] if pixels else list(tags)
    with quiet(f"image {name} cannot be read"):
        check_inflated(stream, name)
        dataset = pydicom.dcmread(stream, force=True, specific_tags=list(wanted), stop_before_pixels=not pixels)
        fill_syntax(dataset)
    return dataset


def check_inflated(stream: BinaryIO, name: str) -> None:
    """Refuse a deflated file that unpacks to too much; pydicom would unpack it whole, whatever its size."""
    start = stream.tell()
    try:
        if not is_dicom(stream.read(NUM_BEFORE_DATA)):
            stream.seek(start)
        # The head is always written with explicit types, little end first; reading it leaves the stream behind it.
        head = read_dataset(stream, False, True, stop_when=lambda tag, *_: tag.group != 2)
        if head.get("TransferSyntaxUID") != DeflatedExplicitVRLittleEndian:
            return
        inflater, total = zlib.decompressobj(-zlib.MAX_WBITS), 0
        while not inflater.eof and (packed := inflater.unconsumed_tail or stream.read(1 << 16)):
            total += len(inflater.decompress(packed, 1 << 20))
            if total > MAX_INFLATED:
                raise DataError(f"image {name} unpacks to more than {MAX_INFLATED} bytes; expected a smaller image")
    finally:
        stream.seek(start)


def fill_syntax(dataset: FileDataset) -> None:
    """Write down the transfer syntax that pydicom found out for a file that does not say it."""
    if dataset.file_meta.get("TransferSyntaxUID"):
        return
    is_implicit, is_little = dataset.original_encoding
    plain = ExplicitVRLittleEndian if is_little else ExplicitVRBigEndian
    dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if is_implicit else plain


def word(dataset: Dataset, keyword: str) -> str:
    """Return a code such as `MONOCHROME2` in capitals, the first of several; empty where there is none."""
    value = _value(dataset, keyword)
    value = value[0] if isinstance(value, Sequence) and not isinstance(value, str) and value else value
    return value.strip(" \0").upper() if isinstance(value, str) else ""


def numbers(dataset: Dataset, keyword: str) -> list[float]:
    """Return the finite numbers of a field; none where it is absent or empty.

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
        raise DataError(f"holds no number in field {keyword}") from None
    if not all(map(math.isfinite, found)):
        raise DataError(f"holds a value that is not finite in field {keyword}")
    return found


def number(dataset: Dataset, keyword: str) -> float | None:
    """Return the first number of a field, or None where there is none.

    Raises:
        DataError: it is not a finite number.
    """
    found = numbers(dataset, keyword)
    return found[0] if found else None


def whole(dataset: Dataset, keyword: str, *, default: int | None = None) -> int:
    """Return the whole number of a field, or `default` where the field is absent.

    Raises:
        DataError: it is absent and there is no default, or it is not a whole number.
    """
    found = number(dataset, keyword)
    if found is None:
        if default is None:
            raise DataError(f"lacks field {keyword}; expected a whole number")
        return default
    if found != int(found):
        raise DataError(f"holds no whole number in field {keyword}")
    return int(found)


def items(dataset: Dataset, keyword: str) -> list[Dataset]:
    """Return the items of a sequence; none where it is absent.

    Raises:
        DataError: the field is not a sequence.
    """
    value = _value(dataset, keyword)
    if value is None:
        return []
    found = list(value) if isinstance(value, Sequence) and not isinstance(value, str | bytes) else [value]
    if not all(isinstance(item, Dataset) for item in found):
        raise DataError(f"holds no sequence in field {keyword}")
    return found


def _value(dataset: Dataset, keyword: str) -> Any:
    """Return a field's value; pydicom converts it now, and may fail on it."""
    with quiet(f"has a field {keyword} that cannot be understood"):
        return dataset.get(keyword)
