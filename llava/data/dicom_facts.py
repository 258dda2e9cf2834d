"""What a DICOM header says about a picture, as words of closed lists: modality, part of the body, view.

Whatever is not in a list is left out: these fields are typed by people, and people type names into them.
"""

from __future__ import annotations

import numpy as np
from pydicom.dataset import Dataset

from llava.data.converters.alignment import Facts
from llava.imaging.dicom.header import items, numbers, word

FACT_TAGS = ("Modality", "BodyPartExamined", "ViewPosition", "ImageOrientationPatient", "Laterality", "ImageLaterality")
"""Fields that are read for this; the orientation may also stand in functional groups."""

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
"""Code of a modality to the word for it; codes without one (OT) say nothing."""

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
"""Body Part Examined to words; spaces and signs in the field do not matter."""

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
"""View Position to words."""

PLANES = ("sagittal", "coronal", "axial")
"""Planes whose normals are the patient's x, y and z axis."""

MIN_ALIGNMENT = 0.9
"""Cosine from which on a slice is called by its plane; oblique ones are not."""

SIDES = {"L": "left", "R": "right", "B": "both"}


def facts_of(dataset: Dataset) -> Facts:
    """Return modality, organ and plane or view, where the header states them in a known word."""
    view = VIEWS.get(_letters(word(dataset, "ViewPosition")))
    part = BODY_PARTS.get(_letters(word(dataset, "BodyPartExamined")))
    return Facts(organ=part, modality=MODALITIES.get(word(dataset, "Modality")), plane=view or plane_of(dataset))


def side_of(dataset: Dataset) -> str | None:
    """Return left, right or both, where the header says it of the picture or of the part."""
    return SIDES.get(word(dataset, "ImageLaterality") or word(dataset, "Laterality"))


def plane_of(dataset: Dataset) -> str | None:
    """Return the plane of a slice by the directions of its rows and columns; None where oblique or not stated."""
    sides = numbers(dataset, "ImageOrientationPatient")
    if not sides:
        for groups in items(dataset, "SharedFunctionalGroupsSequence")[:1]:
            for item in items(groups, "PlaneOrientationSequence")[:1]:
                sides = numbers(item, "ImageOrientationPatient")
    if len(sides) != 6:
        return None
    normal = np.abs(np.cross(sides[:3], sides[3:]))
    axis = int(normal.argmax())
    return PLANES[axis] if normal[axis] >= MIN_ALIGNMENT * max(float(np.linalg.norm(normal)), 1e-9) > 0 else None


def _letters(text: str) -> str:
    return "".join(letter for letter in text if letter.isalnum())
