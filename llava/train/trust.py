"""Keyed mark of a checkpoint, so that one whose loaders unpickle is resumed only where it was written.

    write:  files --names, sizes, SHA-256--> table --HMAC with the user's key--> mark in the checkpoint
    resume: mark --HMAC--> table --compare--> files

DeepSpeed's and FSDP's sharded loaders unpickle, which can run code. The key is outside of every run folder, so write
access to one does not suffice to make a mark.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import logging
import os
import secrets
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava.errors import CheckpointError
from llava.utils.jsonl import JSON_ERRORS, write_json
from llava.utils.provenance import file_sha256

logger = logging.getLogger(__name__)

KEY_VARIABLE = "LLAVA_KEY_FILE"
"""Environment variable with the path of the key; by default it is in the user's configuration folder."""

KEY_BYTES = 32
MARK_FILE = "written_here-{}.json"
MARK_PATTERN = "written_here-*.json"
TRUST_FLAG = "--trust-checkpoint True"

Table = dict[str, list[Any]]
"""Size and SHA-256 of each file, by its path in the checkpoint."""


def key_file() -> Path:
    """Return the path of the key: `$LLAVA_KEY_FILE`, or `llava/checkpoint.key` in the config folder."""
    if given := os.environ.get(KEY_VARIABLE):
        return Path(given)
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "llava" / "checkpoint.key"


def read_key(path: Path) -> bytes | None:
    """Return the key, or None if the file does not exist.

    Raises:
        CheckpointError: others can read or write the file, or it holds no key.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"the key of checkpoints, {path}, cannot be read: {error.strerror}") from error
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise CheckpointError(
                f"the key of checkpoints, {path}, is not a file that only you can read; run `chmod 600 {path}`, or "
                f"remove it, after which earlier checkpoints need {TRUST_FLAG}"
            )
        content = os.read(handle, 4 * KEY_BYTES).strip()
    finally:
        os.close(handle)
    try:
        key = bytes.fromhex(content.decode("ascii"))
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise CheckpointError(f"{path} holds no key of checkpoints; remove it, and a new one is made")
    return key


def make_key(path: Path) -> bytes:
    """Return the key, after making it if it does not exist; readable by this user only.

    Raises:
        CheckpointError: see `read_key`.
        OSError: it cannot be written.
    """
    if (key := read_key(path)) is not None:
        return key
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
    try:
        with os.fdopen(handle, "w", encoding="ascii") as stream:
            stream.write(secrets.token_hex(KEY_BYTES) + "\n")
        with contextlib.suppress(FileExistsError):  # another process was first: its key is the key
            os.link(temporary, path)
    finally:
        Path(temporary).unlink()
    made = read_key(path)
    assert made is not None
    return made


def describe(checkpoint: Path) -> Table:
    """Return size and SHA-256 of every file of a checkpoint except marks.

    Raises:
        CheckpointError: it holds a link or something else that is neither a file nor a folder.
    """
    return {name: [file.stat().st_size, file_sha256(file)] for name, file in _files(checkpoint).items()}


def _files(checkpoint: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for folder, folders, names in os.walk(checkpoint):
        for name in (*folders, *names):
            path = Path(folder) / name
            mode = path.lstat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise CheckpointError(f"{path} is neither a file nor a folder; expected no links in a checkpoint")
        for name in names:
            path = Path(folder) / name
            if not (path.parent == checkpoint and path.match(MARK_PATTERN)):
                found[path.relative_to(checkpoint).as_posix()] = path
    return dict(sorted(found.items()))


def write_mark(checkpoint: Path) -> None:
    """Mark a complete checkpoint as written here; failures are logged, since they only affect resuming."""
    path = key_file()
    try:
        key = make_key(path)
        table = describe(checkpoint)
        write_json(checkpoint / _mark_name(key), {"files": table, "hmac": _hmac(key, table)})
    except (OSError, CheckpointError) as error:
        logger.warning("%s cannot be marked (%s), so resuming it needs %s", checkpoint, error, TRUST_FLAG)


def has_mark(checkpoint: Path) -> bool:
    """Return whether a checkpoint has a mark, of any key; it is written after all other files."""
    return any(checkpoint.glob(MARK_PATTERN))


def check_mark(checkpoint: Path) -> None:
    """Check that this user wrote a checkpoint on this machine, and that no file has changed since.

    Raises:
        CheckpointError: it has no such mark, or differs; the message says what to do.
    """
    key = read_key(key_file())
    mark = checkpoint / _mark_name(key) if key is not None else None
    if key is None or mark is None or not mark.is_file():
        raise CheckpointError(_refusal(checkpoint, f"it has no mark of the key {key_file()} of this user and machine"))
    try:
        content = json.loads(mark.read_text(encoding="utf-8"))
        table, stated = content["files"], content["hmac"]
        is_ours = isinstance(stated, str) and hmac.compare_digest(stated.encode(), _hmac(key, table).encode())
    except (OSError, KeyError, TypeError, *JSON_ERRORS):
        is_ours = False
    if not is_ours:
        raise CheckpointError(_refusal(checkpoint, f"its mark {mark.name} was not made with {key_file()}"))
    files = _files(checkpoint)
    if different := sorted(files.keys() ^ table.keys()):
        what = "was added to" if different[0] in files else "is missing from"
        raise CheckpointError(_refusal(checkpoint, f"{different[0]!a} {what} it"))
    for name, file in files.items():
        if file.stat().st_size != table[name][0] or file_sha256(file) != table[name][1]:
            raise CheckpointError(_refusal(checkpoint, f"{name!a} was changed"))


def _refusal(checkpoint: Path, reason: str) -> str:
    return (
        f"{checkpoint} cannot be resumed: {reason}, and resuming with --deepspeed or --fsdp unpickles its files, which "
        f"can run code. If you trust who wrote it, add {TRUST_FLAG}; else choose another --output-dir"
    )


def _mark_name(key: bytes) -> str:
    """Return the name of the mark of a key; machines that share a folder have one each."""
    return MARK_FILE.format(hashlib.sha256(b"name of the mark" + key).hexdigest()[:16])


def _hmac(key: bytes, table: Mapping[str, Any]) -> str:
    text = json.dumps(table, sort_keys=True, separators=(",", ":"))
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()
