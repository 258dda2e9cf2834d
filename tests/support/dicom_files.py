"""Small DICOM files made from arrays, and the packaged files of pydicom without downloads."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.data import get_testdata_files
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import (
    ComputedRadiographyImageStorage,
    CTImageStorage,
    ExplicitVRLittleEndian,
    MRImageStorage,
    SecondaryCaptureImageStorage,
    UltrasoundImageStorage,
)

SECRET = "Zzyzx^Quentin"
"""Patient name in every file made here; no message, log line or row may contain it."""

RAMP = np.arange(-128, 128, dtype=np.int16).reshape(16, 16) * 8
"""Pixel values from -1024 to 1016."""

CLASSES = {
    "CR": ComputedRadiographyImageStorage,
    "CT": CTImageStorage,
    "MR": MRImageStorage,
    "OT": SecondaryCaptureImageStorage,
    "US": UltrasoundImageStorage,
}

Fields = dict[str, Any]


def make_dataset(values: NDArray[Any], **fields: Any) -> FileDataset:
    """Return a data set of `[H, W]`, `[H, W, 3]` or, with `NumberOfFrames`, one more dimension in front.

    `fields` are added or replace what is made; a field that is None is taken away.
    """
    modality = fields.get("Modality", "OT")
    shape = values.shape[1:] if "NumberOfFrames" in fields else values.shape
    bits = values.dtype.itemsize * 8
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = fields.pop("TransferSyntaxUID", ExplicitVRLittleEndian)
    meta.MediaStorageSOPClassUID = CLASSES[modality]
    meta.MediaStorageSOPInstanceUID = fields.get("SOPInstanceUID", "1.2.3.4.5")
    dataset = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    made: Fields = {
        "SOPClassUID": CLASSES[modality],
        "SOPInstanceUID": "1.2.3.4.5",
        "StudyInstanceUID": "1.2.3",
        "SeriesInstanceUID": "1.2.3.4",
        "PatientName": SECRET,
        "PatientID": "ID-4711",
        "PatientBirthDate": "19010203",
        "Modality": modality,
        "Rows": shape[0],
        "Columns": shape[1],
        "SamplesPerPixel": 3 if len(shape) == 3 else 1,
        "PhotometricInterpretation": "RGB" if len(shape) == 3 else "MONOCHROME2",
        "BitsAllocated": bits,
        "BitsStored": bits,
        "HighBit": fields.get("BitsStored", bits) - 1,
        "PixelRepresentation": int(values.dtype.kind == "i"),
    }
    if len(shape) == 3:
        made["PlanarConfiguration"] = 0
    for name, value in {**made, **fields}.items():
        if value is not None:
            setattr(dataset, name, value)
    raw = values.tobytes()
    dataset.PixelData = raw + b"\0" * (len(raw) % 2)
    dataset["PixelData"].VR = "OB" if bits == 8 else "OW"
    return dataset


def to_bytes(dataset: Dataset) -> bytes:
    """Return the bytes of a data set as a file."""
    stream = io.BytesIO()
    dataset.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def make(values: NDArray[Any], **fields: Any) -> bytes:
    """Return a DICOM file; see `make_dataset`."""
    return to_bytes(make_dataset(values, **fields))


def lookup_table(first: int, entries: NDArray[Any], bits: int) -> Dataset:
    """Return an item of a Modality LUT or VOI LUT sequence."""
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [len(entries) % 65536, first, bits])
    item.add_new("LUTData", "OW", entries.astype("<u2").tobytes())
    return item


def corpus() -> Iterator[tuple[str, Path]]:
    """Yield `(name, path)` of every packaged file of pydicom and pydicom-data; files with equal content once.

    The name tells files of one name apart by their content.
    """
    seen = set()
    for path in sorted(map(Path, get_testdata_files())):
        if not path.is_file() or path.suffix in (".py", ".pyc"):
            continue
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest not in seen:
            seen.add(digest)
            yield f"{path.name}-{digest[:6]}", path
