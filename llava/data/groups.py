"""Groups of rows by patient, study or image: field names, their values, and a union-find."""

from __future__ import annotations

import math
import posixpath
import re
import unicodedata
from collections.abc import Hashable, Iterable, Sequence
from typing import Any
from urllib.parse import unquote

GROUP_FIELDS = (
    "patient",
    "patient_id",
    "subject",
    "subject_id",
    "study",
    "study_id",
    "study_instance_uid",
    "mrn",
)
"""Fields whose values name a patient or a study; written with or without `_`, in any case."""


def field_key(name: str) -> str:
    """Return the name of a field without case and punctuation: `PatientID` and `patient_id` are equal."""
    return "".join(filter(str.isalnum, name.lower()))


NO_NAMES = frozenset({"", "nan", "none", "null", "unknown", "na", "n/a", "-"})
"""Values that stand for a missing name, in lower case."""


def written_name(value: Any) -> str:
    """Return a name as text, empty if the value is not a name: `12`, `"12"` and `12.0` are equal."""
    # Readers of tables turn whole numbers into floats where a column has gaps.
    if isinstance(value, float):
        value = int(value) if math.isfinite(value) and value.is_integer() else None
    return str(value).strip() if isinstance(value, str | int) and not isinstance(value, bool) else ""


def is_known_name(name: str) -> bool:
    """Return whether a text from `written_name` is a name, not a mark for a missing one."""
    return name.lower() not in NO_NAMES


_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://([^/]*)(.*)", re.DOTALL)


def image_name_key(name: str) -> str:
    """Return a key that is equal for spellings of one image name: `0.png`, `./0.png`, `a//../0.png`.

    Names are compared as paths, without files: `.`, `..`, repeated slashes, backslashes, Unicode forms, and the parts
    of URLs that name no other file. Links are not followed; compare the bytes of the files for that.
    """
    text = unicodedata.normalize("NFC", name)
    scheme, host = "", ""
    if url := _URL.fullmatch(text):
        scheme, host = url[1].lower(), url[2].lower()
        text = unquote(url[3].partition("#")[0]) or "/"
    path = posixpath.normpath(re.sub(r"[\\/]+", "/", text))
    return path if scheme in ("", "file") else f"{scheme}://{host}{path}"


class UnionFind:
    """Union-find: disjoint groups of keys, joined step by step."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}

    def join(self, keys: Sequence[str]) -> None:
        """Put these keys, and all groups that they belong to, into one group."""
        roots = sorted({self.group(key) for key in keys})
        for other in roots[1:]:
            self._parent[other] = roots[0]

    def group(self, key: str) -> str:
        """Return the name of a key's group: its smallest key, independent of the order of the joins."""
        path = []
        while (parent := self._parent.setdefault(key, key)) != key:
            path.append(key)
            key = parent
        for passed in path:
            self._parent[passed] = key
        return key


def most_frequent(values: Iterable[Hashable]) -> Hashable:
    """Return the most frequent value; ties are broken by the smallest text."""
    counts: dict[Hashable, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    return min(counts, key=lambda value: (-counts[value], str(value)))
