"""Atomically created folders, written by one process at a time.

.NAME-abcd1234/NAME  --renamed when complete-->  NAME      (a killed process leaves the first; the next removes it)
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, NoReturn

from safetensors import SafetensorError

from llava.errors import CheckpointError, LlavaError
from llava.utils.faults import fault_of
from llava.utils.jsonl import follow_umask

TERMINATED = 143
"""Exit status of a program that SIGTERM ended, as shells report it."""


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to `path` if the block succeeds, and removed if it fails.

    What a killed process left of the same folder is removed first.

    Raises:
        CheckpointError: `path` exists and is not an empty folder, or cannot be written (a full disk).
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(f"{path} exists already; nothing is overwritten, so name a new folder")
    path = path.resolve()  # also through a link
    if path.is_mount():
        raise CheckpointError(f"{path} is a mount point, which cannot be replaced; name a new folder inside it")
    missing = [parent for parent in path.parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        private, lock = _private_folder(path)
    except OSError as error:
        raise CheckpointError(fault_of(path, error)) from error
    try:
        with _terminable():
            temporary = private / path.name  # has the final name, which model cards contain
            temporary.mkdir()
            yield temporary
            follow_umask(temporary)
            os.replace(temporary, path)
            private.rmdir()
    except BaseException as error:
        shutil.rmtree(private, ignore_errors=True)
        with suppress(OSError):  # another process may have written there meanwhile
            for parent in missing:
                parent.rmdir()
        if isinstance(error, OSError | SafetensorError) and not isinstance(error, LlavaError):
            raise CheckpointError(fault_of(path, error)) from error
        raise
    finally:
        os.close(lock)


def final_path(folder: Path) -> Path:
    """Return the path that a temporary folder of `new_folder` will have; other folders are unchanged."""
    return folder.parent.parent / folder.name if _private_name(folder.name).fullmatch(folder.parent.name) else folder


def _private_name(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(f".{name[:200]}-") + r"[a-z0-9_]{8}")


def _private_folder(path: Path) -> tuple[Path, int]:
    """Return a new hidden folder beside `path`, and its open file, whose lock ends with the process."""
    while True:
        private = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name[:200]}-"))
        lock = os.open(private, os.O_RDONLY)
        if _lock_state(lock) != "held" and private.is_dir():
            return private, lock
        os.close(lock)  # another process removed it as a leftover before it was locked


def _lock_state(file: int) -> Literal["locked", "held", "unsupported"]:
    """Lock an open folder and return "locked"; "held" if another process has the lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return "held"
    except OSError:  # some network file systems
        return "unsupported"
    return "locked"


def _remove_leftovers(path: Path) -> None:
    """Remove the hidden folders of earlier processes that wrote `path` and were killed."""
    pattern = _private_name(path.name)
    for folder in path.parent.iterdir():
        if not pattern.fullmatch(folder.name) or folder.is_symlink() or not folder.is_dir():
            continue
        with suppress(OSError):  # that of another user
            lock = os.open(folder, os.O_RDONLY)
            try:
                if _lock_state(lock) == "locked" and {item.name for item in folder.iterdir()} <= {path.name}:
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


@contextmanager
def _terminable() -> Iterator[None]:
    """Turn SIGTERM (the end of a batch job) into an exception, so that the temporary folder is removed."""

    def stop(number: int, frame: Any) -> NoReturn:
        raise SystemExit(TERMINATED)

    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
