"""Pseudonyms of patients and studies: keyed hashes, equal in every run with the same salt.

    PatientID, StudyInstanceUID ... --HMAC-SHA256 with the salt--> key of a row, or a new DICOM identifier

Without a salt, anyone who knows a number can compute its key, and short numbers can be enumerated.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from pathlib import Path

from llava.errors import DataError

MIN_SALT = 16
"""Minimum length of a salt in bytes."""

NUM_DIGITS = 20
"""Hexadecimal digits of a key: 80 bits, so that collisions among a billion keys are improbable."""


def read_salt(path: str | Path) -> bytes:
    """Return the secret in a file; a missing file is created, readable by its owner only.

    Raises:
        DataError: the file cannot be read or written, or its secret is too short.
    """
    path = Path(path)
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "w", encoding="ascii") as stream:
                stream.write(secrets.token_hex(32) + "\n")
        salt = path.read_bytes().strip()
    except OSError as error:
        raise DataError(f"--salt-file {path} cannot be used: {error.strerror}") from error
    if len(salt) < MIN_SALT:
        raise DataError(f"--salt-file {path} holds {len(salt)} bytes; expected at least {MIN_SALT} random bytes")
    return salt


def key_of(kind: str, value: str, salt: bytes) -> str:
    """Return the key of a value; equal values of different kinds (patient, study) have different keys."""
    return _digest(kind, value, salt).hex()[:NUM_DIGITS]


def new_uid(value: str, salt: bytes) -> str:
    """Return a new DICOM identifier for another one (PS3.5 B.2: `2.25.` and a 128-bit number)."""
    return f"2.25.{int.from_bytes(_digest('uid', value, salt)[:16], 'big')}"


def _digest(kind: str, value: str, salt: bytes) -> bytes:
    return hmac.new(salt, f"{kind}\0{value}".encode(), hashlib.sha256).digest()
