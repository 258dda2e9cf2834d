"""Scan of a folder of DICOM studies: image files with their patient, study and series.

    files, sorted by name --header, no pixels--> Instance, or the reason why a file is skipped

Patients and studies are identified by keys only; their ids are hashed immediately after reading.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset

from llava.data.converters.alignment import ImageFacts
from llava.data.pseudonyms import key_of
from llava.errors import DataError
from llava.imaging.dicom.header import (
    code_value,
    integer_value,
    number_values,
    read_header,
    sequence_items,
    suppress_pydicom_output,
)
from llava.imaging.dicom.sniff import is_dicom, may_be_bare
from llava.imaging.dicom.sop_classes import check_image_object

FACT_TAGS = ("Modality", "BodyPartExamined", "ViewPosition", "ImageOrientationPatient", "Laterality", "ImageLaterality")
"""Fields for the facts about an image; the orientation may also be in functional groups."""

MODALITIES: dict[str, str] = {
    "BMD": "bone densitometry",
    "CR": "X-ray",
    "CT": "CT",
    "DR": "X-ray",
    "DX": "X-ray",
    "ES": "endoscopy",
    "GM": "microscopy",
    "IO": "dental X-ray",
    "IVOCT": "intravascular OCT",
    "IVUS": "intravascular ultrasound",
    "MG": "mammography",
    "MR": "MRI",
    "NM": "scintigraphy",
    "OCT": "OCT",
    "OP": "fundus photography",
    "OPT": "OCT",
    "PT": "PET",
    "PX": "dental X-ray",
    "RF": "fluoroscopy",
    "RG": "X-ray",
    "SM": "microscopy",
    "US": "ultrasound",
    "XA": "angiography",
    "XC": "photography",
}
"""Code of a modality to its name; other codes (OT) are ignored."""

BODY_PARTS: dict[str, str] = {
    "ABDOMEN": "abdomen",
    "ABDOMENPELVIS": "abdomen and pelvis",
    "ANKLE": "ankle",
    "AORTA": "aorta",
    "ARM": "arm",
    "BLADDER": "bladder",
    "BRAIN": "brain",
    "BREAST": "breast",
    "CAROTID": "carotid artery",
    "CERVIX": "cervix",
    "CHEST": "chest",
    "CHESTABDOMEN": "chest and abdomen",
    "CHESTABDPELVIS": "chest, abdomen and pelvis",
    "CLAVICLE": "clavicle",
    "COLON": "colon",
    "CSPINE": "cervical spine",
    "ELBOW": "elbow",
    "EXTREMITY": "extremity",
    "EYE": "eye",
    "FEMUR": "femur",
    "FINGER": "finger",
    "FOOT": "foot",
    "FOREARM": "forearm",
    "HAND": "hand",
    "HEAD": "head",
    "HEADNECK": "head and neck",
    "HEART": "heart",
    "HIP": "hip",
    "HUMERUS": "humerus",
    "JAW": "jaw",
    "KIDNEY": "kidney",
    "KNEE": "knee",
    "LEG": "leg",
    "LIVER": "liver",
    "LOWERLEG": "lower leg",
    "LSPINE": "lumbar spine",
    "LUNG": "lung",
    "MANDIBLE": "mandible",
    "NECK": "neck",
    "PANCREAS": "pancreas",
    "PELVIS": "pelvis",
    "PROSTATE": "prostate",
    "RIB": "rib",
    "SHOULDER": "shoulder",
    "SKULL": "skull",
    "SPINE": "spine",
    "SPLEEN": "spleen",
    "SSPINE": "sacrum",
    "STOMACH": "stomach",
    "THIGH": "thigh",
    "THYROID": "thyroid",
    "TOE": "toe",
    "TSPINE": "thoracic spine",
    "UTERUS": "uterus",
    "WHOLEBODY": "whole body",
    "WRIST": "wrist",
}
"""Body Part Examined to its name; spaces and punctuation in the field are ignored."""

VIEWS: dict[str, str] = {
    "AP": "AP",
    "CC": "craniocaudal",
    "LAT": "lateral",
    "LATERAL": "lateral",
    "LL": "lateral",
    "LLD": "lateral decubitus",
    "LLO": "oblique",
    "LPO": "oblique",
    "ML": "mediolateral",
    "MLO": "mediolateral oblique",
    "OBLIQUE": "oblique",
    "PA": "PA",
    "RL": "lateral",
    "RLD": "lateral decubitus",
    "RLO": "oblique",
    "RPO": "oblique",
}
"""View Position to its name."""

PLANES = ("sagittal", "coronal", "axial")
"""Planes whose normals are the x, y and z axes of the patient."""

MIN_ALIGNMENT = 0.9
"""Minimum cosine between the normal of a slice and an axis; other slices are oblique."""

SIDES = {"L": "left", "R": "right", "B": "both"}


def facts_of(dataset: Dataset) -> ImageFacts:
    """Return modality, organ and plane or view, if the header states them in a known word."""
    view = VIEWS.get(_letters(code_value(dataset, "ViewPosition")))
    part = BODY_PARTS.get(_letters(code_value(dataset, "BodyPartExamined")))
    return ImageFacts(
        organ=part, modality=MODALITIES.get(code_value(dataset, "Modality")), plane=view or plane_of(dataset)
    )


def side_of(dataset: Dataset) -> str | None:
    """Return left, right or both, if the header states it for the image or the body part."""
    return SIDES.get(code_value(dataset, "ImageLaterality") or code_value(dataset, "Laterality"))


def plane_of(dataset: Dataset) -> str | None:
    """Return the plane of a slice from the directions of rows and columns; None if oblique or not stated."""
    sides = number_values(dataset, "ImageOrientationPatient")
    if not sides:
        for groups in sequence_items(dataset, "SharedFunctionalGroupsSequence")[:1]:
            for item in sequence_items(groups, "PlaneOrientationSequence")[:1]:
                sides = number_values(item, "ImageOrientationPatient")
    if len(sides) != 6:
        return None
    normal = np.abs(np.cross(sides[:3], sides[3:]))
    axis = int(normal.argmax())
    return PLANES[axis] if normal[axis] >= MIN_ALIGNMENT * max(float(np.linalg.norm(normal)), 1e-9) > 0 else None


def _letters(text: str) -> str:
    return "".join(letter for letter in text if letter.isalnum())


IDENTITY_TAGS: dict[str, str] = {
    "patient": "PatientID",
    "study": "StudyInstanceUID",
    "series": "SeriesInstanceUID",
    "instance": "SOPInstanceUID",
}
"""Kind of key to its field."""

JOIN_TAGS: dict[str, str] = {**IDENTITY_TAGS, "accession": "AccessionNumber"}
"""Identifiers, other than the path, that the key column of a table may hold."""

HEADER_TAGS = (
    *("SOPClassUID", "Rows", "Columns", "NumberOfFrames", "InstanceNumber", "SharedFunctionalGroupsSequence"),
    *FACT_TAGS,
    *IDENTITY_TAGS.values(),
)
"""All fields that the scan reads."""


@dataclass(frozen=True, slots=True)
class Instance:
    """One image file.

    Attributes:
        path: path relative to the folder, with slashes.
        keys: kind of `IDENTITY_TAGS` to key, without kinds whose field is empty.
        facts: facts in the header.
        side: left, right or both.
        number: position in its series.
        num_frames: number of frames in the file.
        join: value in the key column of a table; never written.
    """

    path: str
    keys: dict[str, str]
    facts: ImageFacts
    side: str | None
    number: int
    num_frames: int
    join: str


class NotDicom(DataError):
    """Error: the file is not a DICOM file."""


class RepeatedInstance(DataError):
    """Error: another file in the folder has the same instance."""


def files_of(folder: str | Path) -> list[str]:
    """Return the relative paths of the regular files below a folder, sorted; links are not followed.

    Raises:
        DataError: the folder does not exist.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; expected a folder of DICOM files")
    found = []
    for place, folders, names in os.walk(root):
        folders.sort()
        for name in names:
            path = Path(place, name)
            if path.is_file() and not path.is_symlink():
                found.append(path.relative_to(root).as_posix())
    return sorted(found)


def scan_instances(
    folder: str | Path, paths: Sequence[str], *, salt: bytes, join: str = "path"
) -> Iterator[tuple[str, Instance | DataError]]:
    """Yield each path with its instance, or with the reason why it is skipped.

    Args:
        folder: root folder.
        paths: paths relative to it; see `files_of`.
        salt: salt of the keys.
        join: `path` or a key of `JOIN_TAGS`.
    """
    seen: set[str] = set()
    for path in paths:
        try:
            instance = _instance(Path(folder), path, salt, join)
            if (identity := instance.keys.get("instance", path)) in seen:
                raise RepeatedInstance(f"image {path} repeats an instance in this folder; only the first file is used")
            seen.add(identity)
            yield path, instance
        except DataError as error:
            yield path, error


def _instance(folder: Path, path: str, salt: bytes, join: str) -> Instance:
    tags = HEADER_TAGS if join == "path" else (*HEADER_TAGS, JOIN_TAGS[join])
    try:
        with open(folder / path, "rb") as stream:
            head = stream.read(4096)
            stream.seek(0)
            if not is_dicom(head) and not may_be_bare(head):
                raise NotDicom(f"image {path} is not a DICOM file")
            dataset = read_header(stream, tags, name=path, pixels=False)
            check_image_object(dataset)
            keys = {kind: field_text(dataset, tag) for kind, tag in IDENTITY_TAGS.items()}
            return Instance(
                path=path,
                keys={kind: key_of(kind, value, salt) for kind, value in keys.items() if value},
                facts=facts_of(dataset),
                side=side_of(dataset),
                number=integer_value(dataset, "InstanceNumber", default=0),
                num_frames=integer_value(dataset, "NumberOfFrames", default=1),
                join=path if join == "path" else field_text(dataset, JOIN_TAGS[join]),
            )
    except OSError as error:
        raise DataError(f"image {path} cannot be read: {error.strerror}") from error
    except DataError as error:
        raise error if str(error).startswith("image ") else type(error)(f"image {path} {error}") from None


def field_text(dataset: Dataset, keyword: str) -> str:
    """Return a field as text without padding, to be hashed or compared only."""
    with suppress_pydicom_output(f"has a field {keyword} that cannot be parsed"):
        value = dataset.get(keyword)
        return "" if value is None else str(value).strip(" \0")
