"""One-line errors for machine faults: full disk, file-size limit, read-only or removed folder."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llava.errors import WRONG_SETTINGS, CheckpointError, LlavaError

FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file-size limit (ulimit -f) is reached",
}
READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
FULL_OR_LIMITED = "the disk is full, or the file-size limit (ulimit -f) is reached"
HOW_ON = "free space and rerun the same command to continue"

SHORT_WRITE = re.compile(
    r"PytorchStreamWriter failed|file write failed|unexpected pos \d+ vs \d+|\d+ requested and \d+ written"
)
"""Messages of torch's and numpy's writers, which do not pass on the error of the system."""

RUST_CODE = re.compile(r"\(os error (\d+)\)")
"""End of messages of safetensors and tokenizers."""

NO_PLACE = re.compile(r"Parent directory (.+?) does not exist|File (\S+) cannot be opened")
"""Messages of torch's writer for a folder that is missing or read-only."""

CONTEXT_DEPTH = 10

MAX_LINE = 400
"""Characters of a library's message that are shown; some list the names of everything they know."""


def start_of(error: BaseException) -> str:
    """Return the first line of an error's message, or the start of a long one, for one-line messages."""
    lines = str(error).strip().splitlines()
    line = lines[0].strip() if lines else type(error).__name__
    return line if len(line) <= MAX_LINE else line[:MAX_LINE] + " ..."


@contextmanager
def sensible(path: object, done: str, kinds: tuple[type[Exception], ...] = WRONG_SETTINGS) -> Iterator[None]:
    """Turn what libraries raise for settings that make no sense into one line.

    Args:
        path: the checkpoint whose settings the block uses.
        done: what is done with it, such as `loaded`.
        kinds: the exceptions.

    Raises:
        CheckpointError: the block raised one of them.
    """
    try:
        yield
    except LlavaError:
        raise
    except kinds as error:
        raise CheckpointError(f"{path} cannot be {done}; its settings make no sense: {start_of(error)}") from error


def fault_line(error: BaseException) -> str | None:
    """Return one line for an error that the machine caused, or None for any other error.

    The causes of an error are looked at too: libraries raise errors of their own after one of the system.
    """
    for cause in _chain(error):
        number = _number(cause)
        if number in FULL:
            return f"{_subject(cause)} cannot be written: {FULL[number]}; {HOW_ON}"
        if SHORT_WRITE.search(str(cause)):
            return f"a file cannot be written: {FULL_OR_LIMITED}; {HOW_ON}"
    if isinstance(error, OSError):
        return _system_line(error)
    if place := NO_PLACE.search(str(error)):
        return f"{place[1] or place[2]} cannot be written; its folder is missing or read-only"
    return None if _number(error) is None else _one_line(error)


def fault_of(path: Path, error: BaseException) -> str:
    """Return one line for an error while `path`, or a temporary file that becomes it, was written."""
    number = _number(error)
    if number is None:
        return f"{path} cannot be written: {start_of(error)}"
    if number in FULL or number in READ_ONLY:
        return fault_line(OSError(number, os.strerror(number), str(path))) or ""
    return f"{path} cannot be written: {os.strerror(number)}"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what caused it."""
    cause: BaseException | None = error
    for _ in range(CONTEXT_DEPTH):
        if cause is None:
            return
        yield cause
        cause = cause.__cause__ or cause.__context__


def _number(error: BaseException) -> int | None:
    """Return the system's number of an error."""
    if isinstance(error, OSError):
        return error.errno
    code = RUST_CODE.search(str(error))
    return int(code[1]) if code else None


def _subject(error: BaseException) -> str:
    name = getattr(error, "filename", None)
    return "a file" if name is None else os.fsdecode(name) if isinstance(name, (str, bytes)) else "a file"


def _system_line(error: OSError) -> str:
    """Return the line for an error of the system; a folder that cannot be written is named as such."""
    names = [os.fsdecode(name) for name in (error.filename2, error.filename) if isinstance(name, (str, bytes))]
    if names and error.errno in READ_ONLY:
        folder = _read_only_folder(Path(names[0]))
        if error.errno == errno.EROFS or folder is not None:
            where = folder if folder is not None else Path(names[0]).parent
            return f"{names[0]} cannot be written: the folder {where} is read-only; make it writable, or name another"
        return f"{names[0]}: permission denied; the file belongs to another user, or its mode forbids this"
    return _one_line(error)


def _read_only_folder(path: Path) -> Path | None:
    """Return the folder in which `path` cannot be created, or None if that is not what failed."""
    if path.is_file():
        return None
    for folder in (path, *path.parents):
        if folder.is_dir():
            return None if os.access(folder, os.W_OK | os.X_OK) else folder
    return None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
