"""A folder of studies, header by header: which files are pictures, and which patient, study and series they belong to.

    files in order of their names --header, no pixels--> Instance, or the reason why a file is left out

Patient and study are known by keys only; a number is hashed as soon as it is read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydicom.dataset import Dataset

from llava.data.converters.alignment import Facts
from llava.data.dicom.pseudonyms import key_of
from llava.data.dicom_facts import FACT_TAGS, facts_of, side_of
from llava.errors import DataError
from llava.imaging.dicom.header import quiet, read, whole
from llava.imaging.dicom.sniff import is_dicom, may_be_bare
from llava.imaging.dicom.sop_classes import check_picture

IDENTITY_TAGS: dict[str, str] = {
    "patient": "PatientID",
    "study": "StudyInstanceUID",
    "series": "SeriesInstanceUID",
    "instance": "SOPInstanceUID",
}
"""Kind of key to the field that it is made of."""

JOIN_TAGS: dict[str, str] = {**IDENTITY_TAGS, "accession": "AccessionNumber"}
"""What a table of texts may name its rows by, besides the path."""

HEADER_TAGS = (
    *("SOPClassUID", "Rows", "Columns", "NumberOfFrames", "InstanceNumber", "SharedFunctionalGroupsSequence"),
    *FACT_TAGS,
    *IDENTITY_TAGS.values(),
)
"""All that is read of a file here."""


@dataclass(frozen=True, slots=True)
class Instance:
    """One picture file.

    Attributes:
        path: relative to the folder, with slashes.
        keys: kind of `IDENTITY_TAGS` to key; a kind whose field is empty is missing.
        facts: what the header says about the picture.
        side: left, right or both.
        number: place in its series.
        num_frames: pictures in the file.
        join: value that a table of texts knows it by; never written.
    """

    path: str
    keys: dict[str, str]
    facts: Facts
    side: str | None
    number: int
    num_frames: int
    join: str


class NotDicom(DataError):
    """The file is of another format."""


class Repeated(DataError):
    """Another file of the folder holds the same instance."""


def files_of(folder: str | Path) -> list[str]:
    """Return the regular files below a folder, relative and in order; links are not followed.

    Raises:
        DataError: there is no such folder.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"{root} is no folder; expected one that holds DICOM files")
    found = []
    for place, folders, names in os.walk(root):
        folders.sort()
        for name in names:
            path = Path(place, name)
            if path.is_file() and not path.is_symlink():
                found.append(path.relative_to(root).as_posix())
    return sorted(found)


def scan(
    folder: str | Path, paths: Sequence[str], *, salt: bytes, join: str = "path"
) -> Iterator[tuple[str, Instance | DataError]]:
    """Yield each path with what its header says, or with the reason why it is left out.

    Args:
        folder: the root.
        paths: relative to it, see `files_of`.
        salt: of the keys.
        join: `path` or a key of `JOIN_TAGS`.
    """
    seen: set[str] = set()
    for path in paths:
        try:
            instance = _instance(Path(folder), path, salt, join)
            if (identity := instance.keys.get("instance", path)) in seen:
                raise Repeated(f"image {path} repeats an instance of this folder; the first file is used")
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
                raise NotDicom(f"image {path} is no DICOM file")
            dataset = read(stream, tags, name=path, pixels=False)
            check_picture(dataset)
            keys = {kind: field_text(dataset, tag) for kind, tag in IDENTITY_TAGS.items()}
            return Instance(
                path=path,
                keys={kind: key_of(kind, value, salt) for kind, value in keys.items() if value},
                facts=facts_of(dataset),
                side=side_of(dataset),
                number=whole(dataset, "InstanceNumber", default=0),
                num_frames=whole(dataset, "NumberOfFrames", default=1),
                join=path if join == "path" else field_text(dataset, JOIN_TAGS[join]),
            )
    except OSError as error:
        raise DataError(f"image {path} cannot be read: {error.strerror}") from error
    except DataError as error:
        raise error if str(error).startswith("image ") else type(error)(f"image {path} {error}") from None


def field_text(dataset: Dataset, keyword: str) -> str:
    """Return a field as text without the space that pads it; only to be hashed or compared."""
    with quiet(f"has a field {keyword} that cannot be understood"):
        value = dataset.get(keyword)
        return "" if value is None else str(value).strip(" \0")
