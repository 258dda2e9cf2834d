"""DICOM objects that are not images, by SOP class or, for files without a known class, by modality.

Doses, label maps and parameter maps hold grids of numbers, but are not read as images: rendering them would train a
model on noise.
"""

from __future__ import annotations

from pydicom.dataset import FileDataset
from pydicom.uid import UID

from llava.errors import DataError, NotAnImageError
from llava.imaging.dicom.header import code_value, suppress_pydicom_output

_STORAGE = "1.2.840.10008.5.1.4.1.1."

NON_IMAGE_CLASSES: dict[str, str] = {
    "1.2.840.10008.1.3.10": "a DICOMDIR, the table of contents of a medium",
    _STORAGE + "4.2": "an MR spectrum",
    _STORAGE + "9": "a waveform",
    _STORAGE + "11": "a presentation state",
    _STORAGE + "30": "a parametric map",
    _STORAGE + "66": "a segmentation, a registration or raw data",
    _STORAGE + "67": "a mapping of values",
    _STORAGE + "68": "a surface scan",
    _STORAGE + "78": "a measurement",
    _STORAGE + "79": "a measurement",
    _STORAGE + "80": "a report",
    _STORAGE + "88": "a structured report",
    _STORAGE + "104": "an encapsulated document",
    _STORAGE + "481": "a radiotherapy object",
}
"""Description of the objects of a class, or of a family of classes with this prefix."""

IMAGE_CLASSES = frozenset({_STORAGE + "481.1", _STORAGE + "481.23", _STORAGE + "481.24"})
"""Members of these families that are images: radiotherapy images."""

NON_IMAGE_MODALITIES: dict[str, str] = {
    "DOC": "an encapsulated document",
    "ECG": "a waveform",
    "EPS": "a waveform",
    "HD": "a waveform",
    "KO": "a structured report",
    "PR": "a presentation state",
    "REG": "a registration",
    "RTDOSE": "a radiotherapy dose",
    "RTPLAN": "a radiotherapy plan",
    "RTRECORD": "a radiotherapy record",
    "RTSTRUCT": "a radiotherapy structure set",
    "SEG": "a segmentation",
    "SR": "a structured report",
}


def object_name(dataset: FileDataset) -> str:
    """Return the name of a file's object in the standard."""
    uid = class_of(dataset)
    # A file can state any text, so only names of the standard are shown.
    return str(uid.name) if is_known(uid) else "an object of unknown class"


def is_known(uid: UID) -> bool:
    """Return whether the standard defines this identifier; other texts must not be shown."""
    return bool(uid.name != str(uid))


def class_of(dataset: FileDataset) -> UID:
    """Return the SOP class of a file, from the data set or else the file header; empty if not stated.

    Raises:
        DataError: the header is damaged.
    """
    with suppress_pydicom_output("has a header that cannot be parsed"):
        meta = dataset.file_meta.get("MediaStorageSOPClassUID", "")
        return UID(code_value(dataset, "SOPClassUID") or (meta if isinstance(meta, str) else ""))


def check_image_object(dataset: FileDataset) -> None:
    """Raise for an object that is not an image; the messages continue after the name of the file.

    Args:
        dataset: data set with at least class, modality and size.

    Raises:
        NotAnImageError: the object is not an image; the message says what it is.
        DataError: the file ends before its first complete field.
    """
    uid = class_of(dataset)
    kind = None if uid in IMAGE_CLASSES else next(filter(None, map(NON_IMAGE_CLASSES.get, _families(uid))), None)
    if kind is None and not is_known(uid):
        kind = NON_IMAGE_MODALITIES.get(code_value(dataset, "Modality"))
    if kind is not None:
        called = f" ({uid.name})" if is_known(uid) else ""
        raise NotAnImageError(f"is not an image: it is {kind}{called}; exclude the file")
    if not len(dataset):  # pydicom returns an empty data set for a file that ends inside a field
        raise DataError("has no fields that describe an image; is the file truncated?")
    if "Rows" not in dataset and "Columns" not in dataset:
        raise NotAnImageError(f"is not an image: it is {object_name(dataset)} without pixels; exclude the file")


def _families(uid: UID) -> list[str]:
    """Return an identifier and all its prefixes, the longest first."""
    parts = str(uid).split(".")
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
