"""What in a DICOM file may tell whose it is: fields by name, private fields, and writing in the picture itself.

data set + picture --inspect--> Findings: names and numbers of fields, never what they hold
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.uid import SecondaryCaptureImageStorage

from llava.data.dicom.deid_profile import fields_of
from llava.imaging.dicom.header import silence, word

OFTEN_WRITTEN_ON = frozenset({"DOC", "ES", "GM", "IVUS", "OP", "OT", "SC", "SM", "US", "XC"})
"""Modalities whose pictures often bear names, dates and numbers."""

BAND = 1 / 40
"""Height of a line of writing, as a share of the picture's."""

BRIGHT, DARK = 0.75, 0.35
"""Shares of the largest value above which a stroke and below which its sides lie."""

MAX_BRIGHT = 0.25
"""Share of bright pixels in a row above which it is no line of writing on a dark ground, but a bright part or noise."""

MIN_STROKES = 8
"""Thin bright strokes in one band from which on it is taken for writing: some four letters."""


@dataclass(frozen=True, slots=True)
class Findings:
    """What was found in one file.

    Attributes:
        fields: name of a field to what happens to it (removed, emptied, replaced).
        num_private: private fields, also inside sequences.
        suspicions: reasons to think that something is written in the picture.
    """

    fields: dict[str, str]
    num_private: int
    suspicions: tuple[str, ...]


def inspect(dataset: Dataset, picture: Image.Image | None) -> Findings:
    """Return what a file holds that does not stay as it is.

    Args:
        dataset: all its fields.
        picture: shown from its smallest to its largest value; None where it cannot be decoded.
    """
    fields: dict[str, str] = {}
    num_private = 0
    with silence:
        for tag, element, fate in fields_of(dataset):
            if tag.is_private:
                num_private += 1
            elif element is None or fate != "kept":
                fields[(element is not None and element.keyword) or str(tag)] = fate
            elif element.VR == "SQ":
                inner = [inspect(item, None) for item in element.value]
                num_private += sum(found.num_private for found in inner)
                fields.update(
                    {f"{element.keyword}.{name}": each for found in inner for name, each in found.fields.items()}
                )
    return Findings(fields, num_private, tuple(suspicions(dataset, picture)))


def suspicions(dataset: Dataset, picture: Image.Image | None) -> list[str]:
    """Return the reasons to think that the picture itself tells whose it is; none where the header says it does not."""
    found = []
    said = word(dataset, "BurnedInAnnotation")
    if said == "YES":
        found.append("the header says that something is written in the picture")
    if word(dataset, "RecognizableVisualFeatures") == "YES":
        found.append("the header says that somebody can be recognised")
    if said != "NO":
        if word(dataset, "Modality") in OFTEN_WRITTEN_ON:
            found.append("pictures of this modality often bear writing, and the header does not deny it")
        with silence:
            image_type = str(dataset.get("ImageType", ""))
        is_capture = word(dataset, "SOPClassUID") == SecondaryCaptureImageStorage or "SCREEN" in image_type
        if is_capture or word(dataset, "ConversionType"):
            found.append("a scan or a picture of a screen, and the header does not deny writing")
    if picture is not None and most_strokes(picture) >= MIN_STROKES:
        found.append("bright strokes side by side, as writing has")
    return found


def most_strokes(picture: Image.Image) -> int:
    """Return the largest number of thin bright strokes beside each other in any band of rows.

    Writing is drawn near the largest value, in strokes a few pixels wide with dark sides; a line of it has many.
    """
    grey = np.asarray(picture.convert("RGB"), dtype=np.int16).max(axis=2)
    counts = np.array([_num_strokes(row, int(grey.max())) for row in grey])
    height = max(8, round(len(grey) * BAND))
    bands = (np.sort(counts[top : top + height])[::-1] for top in range(0, len(counts), height // 2))
    # Several rows of a band must agree: noise is bright in single rows.
    return max((int(band[3]) for band in bands if len(band) > 3), default=0)


def _num_strokes(row: NDArray[np.int16], largest: int) -> int:
    """Return the number of thin bright runs with dark sides in one row of a picture."""
    bright = row >= max(BRIGHT * largest, 64)
    if bright.mean() > MAX_BRIGHT:
        return 0
    edges = np.flatnonzero(np.diff(np.concatenate(([0], bright.view(np.int8), [0]))))
    starts, ends = edges[::2], edges[1::2]
    inside = (starts > 2) & (ends < len(row) - 3) & (ends - starts <= max(4, len(row) // 150))
    starts, ends = starts[inside], ends[inside]
    left = np.minimum(row[starts - 2], row[starts - 3])
    right = np.minimum(row[ends + 1], row[ends + 2])
    return int(((left < DARK * largest) & (right < DARK * largest)).sum())
