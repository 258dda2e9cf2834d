"""Loading of a checkpoint as an engine.

path --load--> model + processor --to the device--> LocalEngine
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from llava.compat import parse_compat
from llava.errors import ConfigError
from llava.generation.engine import LocalEngine
from llava.model.checkpoint.load import load_checkpoint
from llava.model.precision import raise_slow_weights

TRAINING_LENGTH = "tokenizer_model_max_length"
"""Key of the training length in published configurations."""


def open_engine(
    path: str,
    *,
    base: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    bits: int = 16,
    vision_tower: str | None = None,
    template: str | None = None,
    compat: str = "none",
    dicom_window: str | None = None,
    dicom_frame: str | None = None,
    fast_jpeg: bool | None = None,
) -> LocalEngine:
    """Load a model and return its engine.

    Args:
        path: checkpoint folder in any known format, or a hub name.
        base: base model of an adapter; default: the one it names.
        dtype: precision of the weights by name; `auto`: as saved, or float32 where a CPU is faster with it.
        device: cpu, cuda, cuda:0 ...; default: the accelerator if present.
        bits: 4 and 8 quantize the weights (bitsandbytes).
        vision_tower: tower of a checkpoint that does not hold or name one.
        template: name of a conversation template that replaces the checkpoint's.
        compat: names of known defects of the original projects to reproduce, see `llava.compat`.
        dicom_window: window of DICOM files that replaces the checkpoint's, see `DicomPolicy`.
        dicom_frame: frame of DICOM files that replaces the checkpoint's.
        fast_jpeg: whether large JPEG files are decoded at a smaller scale; default: the checkpoint's setting.

    Raises:
        CheckpointError: the folder cannot be loaded.
        ConfigError: the template or a name of `compat` is unknown, or the checkpoint lacks a fact that `compat` needs.
    """
    names = parse_compat(compat, "answers")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    precision: Any = "auto" if dtype == "auto" else getattr(torch, dtype)
    given: dict[str, Any] = {"vision_tower": vision_tower} if vision_tower else {}
    device_map = None if device == "cpu" else device
    loaded = load_checkpoint(path, base=base, dtype=precision, device_map=device_map, bits=bits, **given)
    if bits == 16:
        torch.nn.Module.to(loaded.model, device)
        if dtype == "auto":
            raise_slow_weights(loaded.model)
    if template:
        loaded.processor.use_template(template)
    loaded.processor.use_dicom(loaded.processor.dicom.changed(dicom_window, dicom_frame))
    loaded.processor.use_fast_jpeg(fast_jpeg)
    engine = LocalEngine(loaded.model, loaded.processor)
    imitate_originals(engine, names)
    return engine


def imitate_originals(engine: LocalEngine, names: Collection[str]) -> None:
    """Reproduce known defects of the original projects in an engine.

    Args:
        engine: engine of a model that was just loaded.
        names: names of `llava.compat` that concern answers.

    Raises:
        ConfigError: the checkpoint does not name the length to which the original would cut prompts.
    """
    engine.beams_count_prompt = "beams_count_prompt" in names
    engine.processor.random_padding = "random_padding" in names
    if "cut_prompt" in names:
        source = engine.model.config.source or {}
        length = (source.get("config") or {}).get(TRAINING_LENGTH)
        if not length:
            raise ConfigError(
                f"--compat cut_prompt: the checkpoint does not name its training length ({TRAINING_LENGTH} of a "
                "published configuration); leave that name out"
            )
        engine.reader.longest = int(length)
