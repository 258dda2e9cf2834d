"""DICOM objects that are not images, by their class or, where a file does not say its class, by their modality.

Doses, label maps and parameter maps hold grids of numbers, but nobody reads them as images: shown as one they would
train a model on noise.
"""

from __future__ import annotations

from pydicom.dataset import FileDataset
from pydicom.uid import UID

from llava.errors import DataError, NotAPicture
from llava.imaging.dicom.header import quiet, word

_STORAGE = "1.2.840.10008.5.1.4.1.1."

NOT_PICTURES: dict[str, str] = {
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
"""Class, or the beginning of a family of classes, to what it is."""

PICTURES = frozenset({_STORAGE + "481.1", _STORAGE + "481.23", _STORAGE + "481.24"})
"""Members of those families that are images after all: radiotherapy images."""

NOT_PICTURE_MODALITIES: dict[str, str] = {
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
    """Return what a file's object is called in the standard; files can state any text, so only known names are told."""
    uid = class_of(dataset)
    return str(uid.name) if is_known(uid) else "an object of no known class"


def is_known(uid: UID) -> bool:
    """Whether the standard defines this identifier; any other text in its place is not shown to anybody."""
    return bool(uid.name != str(uid))


def class_of(dataset: FileDataset) -> UID:
    """Return the class of a file's object, from the data or else from the file's head; empty where neither says it.

    Raises:
        DataError: the head is damaged.
    """
    with quiet("has a head that cannot be understood"):
        meta = dataset.file_meta.get("MediaStorageSOPClassUID", "")
        return UID(word(dataset, "SOPClassUID") or (meta if isinstance(meta, str) else ""))


def check_picture(dataset: FileDataset) -> None:
    """Refuse what is no image; the messages follow the name of the file.

    Args:
        dataset: with at least class, modality and size.

    Raises:
        NotAPicture: says which object it is.
        DataError: the file ends before it says anything.
    """
    uid = class_of(dataset)
    kind = None if uid in PICTURES else next(filter(None, map(NOT_PICTURES.get, _families(uid))), None)
    if kind is None and not is_known(uid):
        kind = NOT_PICTURE_MODALITIES.get(word(dataset, "Modality"))
    if kind is not None:
        called = f" ({uid.name})" if is_known(uid) else ""
        raise NotAPicture(f"is not an image: it is {kind}{called}; leave the file out")
    if not len(dataset):  # what pydicom leaves of a file that ends inside a field
        raise DataError("holds nothing that an image needs; is the file cut off?")
    if "Rows" not in dataset and "Columns" not in dataset:
        raise NotAPicture(f"is not an image: it is {object_name(dataset)} without pixels; leave it out")


def _families(uid: UID) -> list[str]:
    """Return an identifier and all that it begins with, the longest first."""
    parts = str(uid).split(".")
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
