"""De-identification profile: allowlist of the DICOM fields that a clean copy keeps.

    dataset --KEPT_* and ACTIONS, field by field--> new dataset of kept, emptied and replaced fields

The Basic Application Level Confidentiality Profile (PS3.15, annex E) lists the fields to remove, and grows with every
edition. This profile is stricter: a field stays only if its group, its type and, for a sequence, its name are in these
tables. Free text, dates, times, names, private fields, overlays and curves are always removed or replaced.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.tag import BaseTag
from pydicom.uid import UID

from llava.data.dicom.studies import BODY_PARTS
from llava.data.pseudonyms import key_of, new_uid
from llava.imaging.dicom.header import PIXEL_TAGS, silence
from llava.imaging.dicom.sop_classes import is_known

KEPT_GROUPS = frozenset({0x0008, 0x0018, 0x0020, 0x0022, 0x0028, 0x0048, 0x0054, 0x5200, 0x7FE0})
"""Groups: identification, acquisition, relationship, ophthalmic, image, slide, nuclear, frames, pixels."""

KEPT_TYPES = frozenset({"CS", "DS", "IS", "FD", "FL", "SL", "SS", "SV", "UL", "US", "UV", "AT", "UI", "SQ"})
"""Numbers, codes, identifiers (which are replaced) and sequences; no texts, names, dates, times or bytes."""

KEPT_SEQUENCES = frozenset(
    {
        "CTImageFrameTypeSequence",
        "DimensionIndexSequence",
        "DimensionOrganizationSequence",
        "FrameContentSequence",
        "FrameVOILUTSequence",
        "MRImageFrameTypeSequence",
        "ModalityLUTSequence",
        "PerFrameFunctionalGroupsSequence",
        "PixelMeasuresSequence",
        "PixelValueTransformationSequence",
        "PlaneOrientationSequence",
        "PlanePositionSequence",
        "SequenceOfUltrasoundRegions",
        "SharedFunctionalGroupsSequence",
        "VOILUTSequence",
    }
)
"""Sequences about display and position of the image; their items are cleaned recursively."""

KEPT_BYTES = frozenset(
    {
        "BluePaletteColorLookupTableData",
        "DoubleFloatPixelData",
        "ExtendedOffsetTable",
        "ExtendedOffsetTableLengths",
        "FloatPixelData",
        "GreenPaletteColorLookupTableData",
        "LUTData",
        "PixelData",
        "RedPaletteColorLookupTableData",
        "SegmentedBluePaletteColorLookupTableData",
        "SegmentedGreenPaletteColorLookupTableData",
        "SegmentedRedPaletteColorLookupTableData",
    }
)
"""Pixels and lookup tables, the only fields of bytes that stay."""

ACTIONS: dict[str, str] = {
    "AccessionNumber": "Z",
    "AnatomicalOrientationType": "X",
    "BodyPartExamined": "W",
    "ContentDate": "Z",
    "ContentTime": "Z",
    "FrameComments": "X",
    "IrradiationEventUID": "U",
    "PatientBirthDate": "Z",
    "PatientID": "K",
    "PatientName": "K",
    "PatientSex": "Z",
    "ReferringPhysicianName": "Z",
    "StudyDate": "Z",
    "StudyID": "Z",
    "StudyTime": "Z",
    "TimezoneOffsetFromUTC": "X",
}
"""Fields with their own action: Z emptied (the standard requires the field), X removed and U new identifier as in
PS3.15; K replaced by the key of the patient; W kept if the value is in a list of words.
"""

_TEXT_TYPES = frozenset({"AE", "DA", "DT", "LO", "LT", "PN", "SH", "ST", "TM", "UC", "UT"})
_BREAKS = re.compile(r"[\^=\\\s,;]+")

_CODE = re.compile(r"[A-Z0-9_ ]{0,16}")
METHOD = "llava: PS3.15 basic profile, kept-fields list"


def clean_dataset(dataset: Dataset, salt: bytes) -> Dataset:
    """Return a new dataset with the kept, emptied and replaced fields of `dataset`.

    Args:
        dataset: all fields of a file; not modified.
        salt: salt of the new identifiers and of the patient key.
    """
    found = Dataset()
    with silence:
        patient = str(dataset.get("PatientID") or "")
        _add_cleaned(found, dataset, salt, patient)
        found.PatientIdentityRemoved = "YES"
        found.DeidentificationMethod = METHOD
    return found


def _fate_of(element: DataElement) -> str:
    """Return the treatment of a field: kept, emptied, replaced or removed."""
    fate = _fate_by_name(element)
    return "removed" if fate == "kept" and not _is_harmless(element) else fate


def _fate_by_name(element: DataElement) -> str:
    action = ACTIONS.get(element.keyword)
    if action is not None:
        return {"Z": "emptied", "X": "removed", "U": "replaced", "K": "replaced", "W": "kept"}[action]
    if element.keyword in KEPT_BYTES:
        return "kept"
    if element.tag.is_private or element.tag.group not in KEPT_GROUPS or not element.keyword:
        return "removed"
    if element.VR == "SQ":
        return "kept" if element.keyword in KEPT_SEQUENCES else "removed"
    if element.VR == "UI":
        return "kept" if is_known(UID(str(element.value))) else "replaced"
    # Ambiguous types ("US or SS") are numbers.
    return "kept" if set(element.VR.split(" or ")) & KEPT_TYPES else "removed"


def fields_of(dataset: Dataset, *, is_item: bool = False) -> Iterator[tuple[BaseTag, DataElement | None, str]]:
    """Yield tag, field and treatment of every field; an unreadable field is None and removed.

    Args:
        dataset: a file, or an item of a sequence.
        is_item: whether it is an item, whose pixels (icons, references) are removed.
    """
    for tag in list(dataset.keys()):
        try:
            element = dataset[tag]
            fate = "removed" if is_item and element.keyword in PIXEL_TAGS else _fate_of(element)
        except Exception:  # pydicom raises errors of any type for damaged values; such a field must not stay
            yield tag, None, "removed"
        else:
            yield tag, element, fate


def removed_texts(dataset: Dataset) -> frozenset[str]:
    """Return the texts of removed fields, whole and in parts, which no byte of a clean copy may contain.

    Short texts and those of few or consecutive characters (`000000`, `123456`) are left out: pixels can equal them.
    """
    found: set[str] = set()
    with silence:
        for _, element, fate in fields_of(dataset):
            if element is not None and element.VR == "SQ":
                found.update(*map(removed_texts, element.value))
            elif element is not None and fate != "kept" and element.VR in _TEXT_TYPES:
                for value in element.value if element.VM > 1 else [element.value]:
                    found |= {str(value), *_BREAKS.split(str(value))}
    return frozenset(text for text in found if len(text) >= 6 and len(set(text)) >= 4 and not _is_ramp(text))


def _is_ramp(text: str) -> bool:
    """Return whether the character codes of a text have one constant step, as in `12345`."""
    return len({ord(after) - ord(before) for before, after in pairwise(text)}) == 1


def _add_cleaned(found: Dataset, dataset: Dataset, salt: bytes, patient: str, *, is_item: bool = False) -> None:
    """Add the kept, emptied and replaced fields of a dataset to `found`."""
    for _, element, fate in fields_of(dataset, is_item=is_item):
        if element is not None and fate != "removed":
            found.add(_cleaned(element, salt, patient))


def _cleaned(element: DataElement, salt: bytes, patient: str) -> DataElement:
    """Return a field that is not removed in its cleaned form."""
    rule = ACTIONS.get(element.keyword)
    if rule in ("Z", "K"):
        key = key_of("patient", patient, salt) if rule == "K" and patient else ""
        return DataElement(element.tag, element.VR, key)
    if element.VR == "SQ":
        return DataElement(element.tag, "SQ", Sequence([_clean_item(item, salt) for item in element.value]))
    if element.VR == "UI":
        return DataElement(element.tag, "UI", _each(element.value, lambda uid: _identifier(str(uid), salt)))
    return element


def _is_harmless(element: DataElement) -> bool:
    """Return whether the value of a kept field fits its type; codes and numbers may hold free text."""
    if ACTIONS.get(element.keyword) == "W":
        return str(element.value) in BODY_PARTS
    parts = element.value if _is_many(element.value) else [element.value]
    if element.VR == "CS" and element.keyword not in ACTIONS:
        return all(_CODE.fullmatch(str(part or "")) for part in parts)
    return element.VR not in ("DS", "IS") or _are_numbers(parts)


def _clean_item(item: Dataset, salt: bytes) -> Dataset:
    found = Dataset()
    _add_cleaned(found, item, salt, "", is_item=True)
    return found


def _identifier(uid: str, salt: bytes) -> str:
    """Return the new identifier for a UID; UIDs of the standard (classes, syntaxes) stay."""
    return uid if not uid or is_known(UID(uid)) else new_uid(uid, salt)


def _each(value: Any, change: Callable[[Any], str]) -> Any:
    return [change(part) for part in value] if _is_many(value) else change(value or "")


def _is_many(value: Any) -> bool:
    return hasattr(value, "__iter__") and not isinstance(value, str | bytes)


def _are_numbers(parts: Any) -> bool:
    try:
        return all(part is None or part == "" or math.isfinite(float(part)) for part in parts)
    except (TypeError, ValueError):
        return False
