"""Exceptions of this package; each is also a built-in exception, so callers can catch either.

A message names the subject, the fact, the expected value and the fix. `llava.utils.cli.run_program` catches every
`LlavaError` of a command, prints the message and exits with status 2.
"""

from __future__ import annotations

WRONG_SETTINGS = (
    ValueError, KeyError, TypeError, ArithmeticError, AttributeError, IndexError, AssertionError, RecursionError,
)  # fmt: skip
"""Exceptions that libraries raise for settings that make no sense."""


class LlavaError(Exception):
    """Base class of all errors that this package raises."""


class ConfigError(LlavaError, ValueError):
    """Invalid flag, argument or configuration value."""


class DataError(LlavaError, ValueError):
    """Invalid record, image or data file; the message names file and row."""


class BrokenFileError(DataError):
    """Data file whose further rows cannot be read: a broken array, text after it, or a damaged gzip file."""


class NotUnicodeError(DataError):
    """Row with text that is not Unicode, such as half of a surrogate pair."""


class PromptTooLongError(DataError):
    """Prompt that does not fit the context of the model."""


class EmptyAnswerError(DataError):
    """Training row with empty answers only; it is left out, not refused."""


class CheckpointError(LlavaError, RuntimeError):
    """Checkpoint that cannot be read, does not fit the model, or is not safe to load."""


class GenerationError(LlavaError, RuntimeError):
    """Failed generation of an answer."""


class MemoryLimitError(GenerationError):
    """Prompt whose keys and values, with those of its answer, can never fit the memory for them."""


class MissingDependency(LlavaError, ImportError):
    """Missing optional package; the message names the extra that installs it."""


class DownloadError(LlavaError, OSError):
    """Failed download of a URL.

    Attributes:
        reason: one word for manifests, a key of `llava.data.download.transfer.REASONS`.
    """

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class ArchiveError(DataError):
    """Archive that cannot be read, or not safely.

    Attributes:
        reason: a key of `llava.data.download.transfer.REASONS`.
    """

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class NotAnImageError(DataError):
    """DICOM file without an image: a dose, a plan, a report or a waveform; the message names which."""
