"""Defaults of training commands: of `llava train`, and the published ones of the original trainers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Defaults:
    """Defaults that differ between the commands; those of a new model do not apply to a loaded checkpoint.

    Attributes:
        image_grouping: `--image-grouping`.
        bf16: `--bf16`.
        template: `--version` of a new model; None for the published one.
        image_mode: `--image-aspect-ratio` of a new model; None for the published one.
        projector_type: `--mm-projector-type` of a new model.
        calibrates: `--calibrate-mm-projector` of a new model, where its projector and the data allow it.
        log_lines: `--log-lines`.
    """

    image_grouping: str = "off"
    bf16: bool | Literal["auto"] = False
    template: str | None = None
    image_mode: str | None = None
    projector_type: str = "linear"
    calibrates: bool = False
    log_lines: int = 0


PUBLISHED = Defaults()
"""Defaults of `train_mem.py`, `train.py` and the preference trainers, as in the original code."""

TODAY = Defaults(
    image_grouping="auto",
    bf16="auto",
    template="auto",
    image_mode="pad",
    projector_type="mlp2x_gelu",
    calibrates=True,
    log_lines=100,
)
"""Defaults of `llava train`."""
