"""The cache folder, checks of output paths, file locks, and exclusive claims on output folders.

Of two runs that write into one folder, the second ends at once. Locks are those of the operating system, so they end
with the process, however that ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import os
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from llava.errors import ConfigError, LlavaError
from llava.utils.cli import flag
from llava.utils.jsonl import write_atomic

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "LLAVA_CACHE"
"""Environment variable that names the cache folder."""

CLAIM_FILE = ".claim"
"""Lock file; it exists while a run writes into the folder, and after a kill until the next run."""

MAX_HOLDER_BYTES = 200
_HELD: set[int] = set()
"""Descriptors of this process that hold locks."""


def _close_in_child() -> None:
    """Close inherited locks, which would outlive the parent in a forked worker process."""
    for handle in _HELD:
        with contextlib.suppress(OSError):
            os.close(handle)
    _HELD.clear()


os.register_at_fork(after_in_child=_close_in_child)


def cache_folder() -> Path:
    """Return the folder of recomputable files: `$LLAVA_CACHE` or `~/.cache/llava`; it may not exist.

    Raises:
        ConfigError: the variable is not set, and the user has no home folder.
    """
    named = os.environ.get(CACHE_VARIABLE)
    try:
        return Path(named).expanduser() if named else Path.home() / ".cache" / "llava"
    except RuntimeError:
        raise ConfigError(f"this user has no home folder for the cache; set {CACHE_VARIABLE} to a folder") from None


def cache_problem(path: str | Path, error: OSError) -> str:
    """Return the message for a cache file or folder that cannot be written."""
    reason = (error.strerror or str(error)).lower()
    return f"cache {path} cannot be written ({reason}); set {CACHE_VARIABLE} to a writable folder"


def write_cache(path: Path, content: str, *, lost: str) -> bool:
    """Write a file of the cache that only its user can read, atomically; return whether it was written.

    A failure is logged once per folder; the caller works without the cache.

    Args:
        path: the file.
        content: its text.
        lost: what the next run does without the file, for the message.
    """
    try:
        write_atomic(path, content, private=True)
    except OSError as error:
        _warn_once(f"{cache_problem(path.parent, error)}; {lost}")
        return False
    return True


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning("%s", message)


def refuse_overwriting(read: Iterable[str | Path | None], written: Mapping[str, str | Path | None]) -> None:
    """Check that no output file overwrites an input file or another output file.

    Args:
        read: input files; None is ignored.
        written: output files by the name of their flag.

    Raises:
        ConfigError: a file would be overwritten.
    """
    taken = {Path(path).resolve() for path in read if path is not None}
    for name, path in written.items():
        if path is None:
            continue
        if Path(path).resolve() in taken:
            raise ConfigError(f"{flag(name)} {path} would overwrite an input or another output; choose another file")
        taken.add(Path(path).resolve())


@dataclass(frozen=True, slots=True)
class Claim:
    """Claim on a folder.

    Attributes:
        folder: the folder.
        handle: descriptor of the locked file; None on a file system without locks.
    """

    folder: Path
    handle: int | None

    def check(self) -> None:
        """Check that the folder is still the claimed one.

        Raises:
            LlavaError: it was removed or replaced since.
        """
        if self.handle is not None and not _is_at(self.handle, self.folder / CLAIM_FILE):
            raise LlavaError(
                f"{self.folder} was removed while this run was writing into it, so the run ends; rerun the same "
                "command to start from the beginning, or restore the folder to resume"
            )


@contextmanager
def exclusive_folder(folder: str | Path, *, option: str) -> Iterator[Claim]:
    """Claim an output folder, which is created, inside the block; one that stays empty is removed again.

    Args:
        folder: output folder.
        option: the flag that sets it, for the message.

    Raises:
        ConfigError: another run holds the folder, or it cannot be created.
    """
    path = Path(folder)
    created = [parent for parent in (path, *path.parents) if not parent.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ConfigError(f"{option} {path} is a file; expected a folder") from None
    handle = _lock(path / CLAIM_FILE, path, option)
    try:
        yield Claim(path, handle)
    finally:
        _release(handle, path / CLAIM_FILE)
        with contextlib.suppress(OSError):  # not empty
            for parent in created:
                parent.rmdir()


@contextmanager
def exclusive_file(path: str | Path, *, option: str) -> Iterator[None]:
    """Claim an output file that is extended line by line, inside the block.

    Raises:
        ConfigError: another run holds it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    claim = path.with_name(f".{path.name}{CLAIM_FILE}")
    handle = _lock(claim, path, option)
    try:
        yield
    finally:
        _release(handle, claim)


def _lock(file: Path, output: Path, option: str) -> int | None:
    """Return the descriptor of the locked file, or None on a file system without locks."""
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(handle, MAX_HOLDER_BYTES, 0).decode("utf-8", "replace")
            os.close(handle)
            raise ConfigError(
                f"another run is writing into {output} ({ascii(holder)[1:-1] or 'unknown process'}); wait until it "
                f"ends, or set another {option}"
            ) from None
        except OSError as error:
            os.close(handle)
            logger.warning("%s cannot be locked (%s); do not start a second run with it", output, error.strerror)
            return None
        if _is_at(handle, file):
            break
        os.close(handle)  # removed by its owner between the two calls
    _HELD.add(handle)
    with contextlib.suppress(OSError):  # a full disk; the content is only for the message
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    return handle


def _release(handle: int | None, file: Path) -> None:
    if handle is None:
        return
    with contextlib.suppress(OSError):
        if _is_at(handle, file):
            file.unlink()
    _HELD.discard(handle)
    os.close(handle)


def _is_at(handle: int, file: Path) -> bool:
    """Return whether an open file is the one at this path."""
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(file))
    except OSError:
        return False


@contextmanager
def hold_lock(path: str | Path, *, purpose: str) -> Iterator[None]:
    """Hold an exclusive lock on the file `path` inside the block, after waiting for it.

    Args:
        path: lock file; it is created empty and not removed.
        purpose: what the holder of the lock does, for the log message of waiting processes.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting for another process: %s (%s)", purpose, path)
            fcntl.flock(handle, fcntl.LOCK_EX)
        _HELD.add(handle)
        yield
    finally:
        _HELD.discard(handle)
        os.close(handle)
