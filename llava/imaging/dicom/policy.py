"""Policy of rendering DICOM files: window and frame, saved with the processor.

--dicom-window, --dicom-frame --DicomPolicy--> llava_processor.json, image_fingerprint --imaging.dicom--> image
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llava.errors import ConfigError

DICOM_VERSION = 1
"""Version of the rules in `llava/imaging/dicom`. Versions may give different pixels, so it is part of the image
fingerprint."""

PRESETS: dict[str, tuple[float, float]] = {
    "abdomen": (60.0, 400.0),
    "angio": (300.0, 600.0),
    "bone": (400.0, 1800.0),
    "brain": (40.0, 80.0),
    "liver": (80.0, 150.0),
    "lung": (-600.0, 1500.0),
    "soft_tissue": (40.0, 400.0),
}
"""Center and width in Hounsfield units; used for CT only, other images use the window of their file."""

FRAME_NUMBER = re.compile(r"[0-9]{1,10}")
"""Number of a frame. Files have fewer than 2^31, and Python refuses to read thousands of digits."""

DICOM_WINDOW_HELP = (
    "window of gray DICOM images: file (first window of the file), full (smallest to largest value), "
    f"percentile:LOW,HIGH, CENTER,WIDTH, or for CT a preset: {', '.join(PRESETS)}"
)
DICOM_FRAME_HELP = "frame of a DICOM file with several frames: first, middle, or a number from 0"
CHECKPOINT_DEFAULT_HELP = "; default: that of the checkpoint"


@dataclass(frozen=True, slots=True)
class DicomPolicy:
    """Choices for rendering DICOM files; equal policies give equal pixels.

    Attributes:
        window: `file`, `full`, `percentile:LOW,HIGH`, `CENTER,WIDTH` or a key of `PRESETS`.
        frame: `first`, `middle` or a number from 0; ignored for files of a single frame.

    Raises:
        ConfigError: a value is invalid.
    """

    window: str = "file"
    frame: str = "first"

    def __post_init__(self) -> None:
        if not isinstance(self.window, str) or not isinstance(self.frame, str):
            raise ConfigError(f"DICOM window and frame must be text, got {self.window!r} and {self.frame!r}")
        if self.window not in ("file", "full", *PRESETS) and self.percentiles is None and self.fixed is None:
            known = ", ".join(["file", "full", "percentile:LOW,HIGH", "CENTER,WIDTH", *PRESETS])
            raise ConfigError(f"DICOM window {self.window!r} is unknown; expected one of {known}")
        if self.frame not in ("first", "middle") and not FRAME_NUMBER.fullmatch(self.frame):
            raise ConfigError(f"DICOM frame {self.frame!r} is unknown; expected first, middle or a number from 0")

    @property
    def percentiles(self) -> tuple[float, float] | None:
        """Return the lower and upper percentile of a window given as percentiles, else None."""
        name, _, text = self.window.partition(":")
        pair = _pair(text) if name == "percentile" else None
        return pair if pair is not None and 0 <= pair[0] < pair[1] <= 100 else None

    @property
    def fixed(self) -> tuple[float, float] | None:
        """Return the center and width of a window given as numbers, else None."""
        pair = _pair(self.window)
        return pair if pair is not None and pair[1] > 0 else None

    def frame_of(self, num_frames: int) -> int | None:
        """Return the index of the frame to show, or None if the file does not have that many frames."""
        if num_frames == 1 or self.frame == "first":
            return 0
        index = (num_frames - 1) // 2 if self.frame == "middle" else int(self.frame)
        return index if index < num_frames else None

    def settings(self) -> dict[str, Any]:
        """Return the settings that are saved with the processor and hashed into the image fingerprint."""
        return {"version": DICOM_VERSION, "window": self.window, "frame": self.frame}

    @classmethod
    def of(cls, settings: Mapping[str, Any] | None) -> DicomPolicy:
        """Return the policy of saved `settings`; the default for None (processors saved before DICOM support).

        Raises:
            ConfigError: the settings have another version or unknown fields.
        """
        if settings is None:
            return cls()
        rest = dict(settings)
        if (version := rest.pop("version", DICOM_VERSION)) != DICOM_VERSION:
            raise ConfigError(
                f"the DICOM policy has version {version!r}; this package supports version {DICOM_VERSION}"
            )
        try:
            return cls(**rest)
        except TypeError:
            known = ", ".join(cls.__dataclass_fields__)
            raise ConfigError(f"the DICOM policy has fields {', '.join(rest)}; expected {known}") from None

    def changed(self, window: str | None, frame: str | None) -> DicomPolicy:
        """Return the policy with the given values replaced; None keeps a value."""
        return DicomPolicy(self.window if window is None else window, self.frame if frame is None else frame)


DEFAULT_POLICY = DicomPolicy()


def _pair(text: str) -> tuple[float, float] | None:
    """Return two finite numbers written as `A,B`, or None."""
    first, comma, second = text.partition(",")
    try:
        pair = float(first), float(second)
    except ValueError:
        return None
    return pair if comma and all(map(math.isfinite, pair)) else None


def add_dicom_options(parser: argparse._ActionsContainer, *, suffix: str = CHECKPOINT_DEFAULT_HELP) -> None:
    """Register `--dicom-window` and `--dicom-frame`; `suffix` describes their default."""
    parser.add_argument("--dicom-window", help=DICOM_WINDOW_HELP.replace("%", "%%") + suffix)
    parser.add_argument("--dicom-frame", help=DICOM_FRAME_HELP + suffix)
