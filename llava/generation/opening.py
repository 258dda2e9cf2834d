"""From a checkpoint's path to an engine that answers.

path --load--> model + processor --to the device--> LocalEngine
"""

from __future__ import annotations

from typing import Any

import torch

from llava.generation.local import LocalEngine
from llava.model.loading import load


def open_engine(
    path: str,
    *,
    base: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    bits: int = 16,
    vision_tower: str | None = None,
    template: str | None = None,
    dicom_window: str | None = None,
    dicom_frame: str | None = None,
) -> LocalEngine:
    """Load a model and return its engine.

    Args:
        path: checkpoint folder of any known layout, or a hub name.
        base: base model of an adapter; default: the one it names.
        dtype: name of the weights' precision; `auto` keeps the checkpoint's.
        device: cpu, cuda, cuda:0 ...; default: the accelerator when there is one.
        bits: 4 and 8 quantize the weights (bitsandbytes).
        vision_tower: tower of a checkpoint that does not hold or name one.
        template: name of a template to use instead of the checkpoint's own.
        dicom_window: window of DICOM files instead of the checkpoint's own, see `DicomPolicy`.
        dicom_frame: frame of DICOM files, likewise.

    Raises:
        CheckpointError: the folder cannot be loaded.
        ConfigError: the template is unknown.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    precision: Any = "auto" if dtype == "auto" else getattr(torch, dtype)
    given: dict[str, Any] = {"vision_tower": vision_tower} if vision_tower else {}
    device_map = None if device == "cpu" else device
    loaded = load(path, base=base, dtype=precision, device_map=device_map, bits=bits, **given)
    if bits == 16:
        torch.nn.Module.to(loaded.model, device)
    if template:
        loaded.processor.use_template(template)
    loaded.processor.use_dicom(loaded.processor.dicom.changed(dicom_window, dicom_frame))
    return LocalEngine(loaded.model, loaded.processor)
