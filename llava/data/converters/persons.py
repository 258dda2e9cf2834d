"""Table columns that identify a person: replaced by salted keys, or reported if left in clear text.

column, cell --salt--> key, the same that `llava data dicom` gives the value with the same salt
             --none--> the cell, and a warning with the name of the column
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from llava.data.groups import GROUP_FIELDS, field_key
from llava.data.identifiers import identifier_rules
from llava.data.pseudonyms import key_of
from llava.utils.log import warn_once

logger = logging.getLogger(__name__)

PERSON_COLUMNS = frozenset(map(field_key, GROUP_FIELDS)) | {
    "accession",
    "accessionnumber",
    "birthdate",
    "casenumber",
    "dateofbirth",
    "dob",
    "firstname",
    "lastname",
    "medicalrecordnumber",
    "name",
    "patientname",
    "patientnumber",
    "person",
    "personid",
    "ssn",
    "studyuid",
    "surname",
}
"""Names of columns that identify a person or a study, without case and punctuation."""

MIN_CHARACTERS = 3
"""Length from which a person's value is searched in names of images; shorter ones occur by chance."""


class PersonColumns:
    """Columns of a table that identify persons.

    Args:
        patients: columns that the user names as those of patients and studies, to the kind of their keys.
        salt: secret of the keys; None writes values in clear.
    """

    def __init__(self, patients: dict[str, str], salt: bytes | None) -> None:
        self.patients = patients
        self.salt = salt

    def is_person(self, column: str) -> bool:
        """Return whether a column identifies persons: the user says so, or its name does."""
        return column in self.patients or field_key(column) in PERSON_COLUMNS

    def written(self, column: str, text: str) -> str:
        """Return a cell's value for the row: a key, or the text with a warning if it may identify a person."""
        if not text:
            return text
        if self.salt is not None and self.is_person(column):
            return key_of(self._kind(column), text, self.salt)
        if self.is_person(column):
            warn_once(logger, f"column {column!r} is written in clear; --salt-file FILE writes keys of persons instead")
        elif rules := identifier_rules([text]):
            found = ", ".join(rule.removeprefix("identifier-") for rule in rules)
            warn_once(logger, f"column {column!r} is kept in clear; a value looks like an identifier ({found})")
        return text

    def check_image_name(self, name: str, values: Sequence[str]) -> None:
        """Warn if an image name, which is written unchanged, contains the value of a person column."""
        if any(len(value) >= MIN_CHARACTERS and value.lower() in name.lower() for value in values):
            warn_once(logger, "names of images contain values of persons and are written in clear; rename the files")

    def _kind(self, column: str) -> str:
        """Return the kind of a column's keys: that of patients unless it names studies."""
        kind = self.patients.get(column)
        return kind or ("study" if field_key(column).startswith(("study", "accession")) else "patient")
