"""Every exception this package raises on purpose; each is also a built-in, so callers may catch either.

Messages say what was got, what was expected, and what to change.
"""

from __future__ import annotations


class LlavaError(Exception):
    """Base class of all deliberate errors."""


class ConfigError(LlavaError, ValueError):
    """A flag, an argument or a configuration value cannot be used."""


class DataError(LlavaError, ValueError):
    """A record, an image or a data file cannot be used; the message names file and row."""


class CheckpointError(LlavaError, RuntimeError):
    """A checkpoint cannot be read, does not fit, or is not safe to load."""


class GenerationError(LlavaError, RuntimeError):
    """An answer could not be generated."""


class MissingDependency(LlavaError, ImportError):
    """An optional package is needed; the message names the extra that installs it."""


class DownloadError(LlavaError, OSError):
    """A file cannot be had from an address.

    Attributes:
        reason: one word for manifests, a key of `llava.data.download.failures.REASONS`.
    """

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class ArchiveError(DataError):
    """An archive cannot be read, or not safely; `reason` is a key of `llava.data.download.failures.REASONS`."""

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class NotAPicture(DataError):
    """A DICOM file holds something else than a picture: a dose, a plan, a report, a waveform; the message says what."""
