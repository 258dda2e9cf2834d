"""Logging and progress bars on standard error, from the first rank only."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, Never, TypeVar

from tqdm import tqdm

from llava.utils.terminal import visible, visible_message

T = TypeVar("T")
_SEEN: set[tuple[str, str]] = set()


class StandardErrorHandler(logging.StreamHandler[Any]):
    """Log handler that writes to the current `sys.stderr`, even after it was replaced or closed."""

    @property
    def stream(self) -> Any:
        """Standard error."""
        return sys.stderr

    @stream.setter
    def stream(self, stream: Any) -> None:
        """Ignore the stream that the base class stores."""


class VisibleFormatter(logging.Formatter):
    """Log formatter that writes control characters of names and texts as visible escapes."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        return visible_message(super().format(record))


SILENT_LIBRARIES = ("PIL", "pydicom", "pylibjpeg", "openjpeg", "matplotlib", "bitsandbytes.backends.cpu.ops")
"""Loggers that are off in commands: readers may quote a file; bitsandbytes warns of kernels that are never used."""

NO_NEWS = "Setting accelerator to CPU"
"""Beginning of a warning that DeepSpeed prints on a machine without a GPU, also where it is imported but not used."""


def is_news(record: logging.LogRecord) -> bool:
    """Return whether a record of DeepSpeed says something that a user does not know."""
    return not record.getMessage().startswith(NO_NEWS)


@contextlib.contextmanager
def silent_libraries() -> Iterator[None]:
    """Turn off Python warnings, and the logs of libraries that read files, while a command runs.

    This package issues no Python warnings. Those of libraries may quote what a file holds, such as the name of a
    patient, and a user can rarely act on them. With `python -W` or PYTHONWARNINGS they are shown.
    """
    loggers = [logging.getLogger(name) for name in SILENT_LIBRARIES]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        deepspeed = logging.getLogger("DeepSpeed")  # a filter, since its import sets its level
        deepspeed.addFilter(is_news)
        try:
            yield
        finally:
            deepspeed.removeFilter(is_news)
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def process_rank() -> int:
    """Return the rank of this process among those that torchrun started; 0 for a single process."""
    return int(os.environ.get("RANK", "0"))


def setup_logging(level: int | str = logging.INFO) -> None:
    """Send the log of the package to standard error; ranks other than the first log only errors."""
    logger = logging.getLogger("llava")
    logger.setLevel(level if process_rank() == 0 else logging.ERROR)
    if not logger.handlers:
        handler = StandardErrorHandler()
        handler.setFormatter(VisibleFormatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"))
        logger.addHandler(handler)
    # peft asks for a property that transformers renames; users can do nothing about it.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


def warn_once(logger: logging.Logger, message: str) -> None:
    """Log a warning, unless this logger has logged the same warning before."""
    if (logger.name, message) not in _SEEN:
        _SEEN.add((logger.name, message))
        logger.warning("%s", message)


def with_progress(items: Iterable[T], *, title: str, total: int | None = None, unit: str = "it") -> tqdm[T]:
    """Return a progress bar around `items`; silent on ranks other than the first."""
    return tqdm(
        items,
        desc=visible(title),
        total=total,
        unit=unit,
        disable=process_rank() != 0,
        file=sys.stderr,
        mininterval=0.5,
    )


def progress_bar(total: int, *, title: str, unit: str = "it") -> tqdm[Never]:
    """Return a progress bar that the caller updates; silent on ranks other than the first."""
    off = process_rank() != 0
    return tqdm(total=total, desc=visible(title), unit=unit, disable=off, file=sys.stderr, mininterval=0.5)
