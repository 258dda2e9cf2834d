"""Values of class fields that a report may show: known words, and values of many rows.

A value that is rare and not in a vocabulary may be text about a patient in the wrong column.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from llava.scoring.decisions import CLOSED_TYPES, OPEN_TYPES

MIN_ROWS = 5
"""Rows in which a value outside the vocabularies must occur to be shown."""

MAX_CHARACTERS = 40
"""Maximum length of a class name; longer values are texts, which the report must not show."""

OTHER = "(other)"
"""Name for classes that are not shown: rare ones, those beyond a limit, and those that look like identifiers."""

LONG = "(long text)"


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_ORGANS = _set(
    "head brain neck chest lung heart breast abdomen abd liver kidney spleen bowel pelvis spine limb bone skin eye "
    "chest_heart chest_lung chest_mediastinal brain_face brain_tissue pelvic_cavity"
)

KNOWN: Mapping[str, frozenset[str]] = {
    "answer_type": CLOSED_TYPES | OPEN_TYPES,
    "question_type": _set(
        "pres abn modality organ pos size attrib color count plane other yes/no what where how when why who whose "
        "which findings impression conversation detail"
    )
    | {"multiple choice"},
    "content_type": _set("modality position organ abnormality quantity size shape color plane kg"),
    "image_organ": _ORGANS,
    "organ": _ORGANS,
    "location": _ORGANS,
    "modality": _set(
        "ct mr mri cr dx dr us mg pt pet nm xa rf xr io px op opt gm sm es ot sc ivus x-ray xray ultrasound "
        "mammography pathology histology fluoroscopy endoscopy angiography dermoscopy fundus pet-ct pet/ct"
    )
    | {"not stated"},
    "domain": _set("chest_xray mri histology gross ct_scan"),
    "view": _set("pa ap lateral ll lao rao axial sagittal coronal frontal oblique"),
    "official_split": _set("train val valid validate validation dev test"),
    "closed answers": frozenset({"yes", "no", "neither yes nor no"}),
}
"""Known values of fields, in lower case."""


def is_known_class(name: str, word: str) -> bool:
    """Return whether a value of a field is in its vocabulary, or a number below 100 or one letter."""
    is_index = word.isascii() and word.isalnum() and (len(word) == 1 or (len(word) == 2 and word.isdigit()))
    return is_index or word in (OTHER, LONG) or word.lower() in KNOWN.get(name, ())


def shown_counts(name: str, counts: Mapping[str, int]) -> dict[str, int]:
    """Return value counts of a field, most frequent first; values that must stay private count as `OTHER`."""
    shown: Counter[str] = Counter()
    for word, count in counts.items():
        may_show = is_known_class(name, word) or (count >= MIN_ROWS and len(word) <= MAX_CHARACTERS)
        shown[word if may_show else OTHER] += count
    return dict(shown.most_common())
