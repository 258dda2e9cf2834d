"""Loading of a checkpoint as an engine.

path --load, to the device, check weights--> model + processor --settings of the command--> LocalEngine
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

import torch

from llava.compat import parse_compat
from llava.errors import ConfigError
from llava.generation.engine import LocalEngine
from llava.generation.kv_buffers import context_length
from llava.generation.prompt_encoder import PromptReader
from llava.jinja_template import check_name
from llava.model.builder import LoadedModel
from llava.model.checkpoint.finite import check_finite, stored_tensors
from llava.model.checkpoint.load import CheckpointSource, Dtype, load_checkpoint, open_checkpoint
from llava.model.int8 import quantize_text_layers
from llava.model.precision import raise_slow_weights
from llava.processing import LlavaMedProcessor

logger = logging.getLogger(__name__)

SPREAD = "auto"
"""Device of a model that is spread over all visible GPUs."""

TRAINING_LENGTH = "tokenizer_model_max_length"
"""Key of the training length in published configurations."""


def open_engine(
    path: CheckpointSource,
    *,
    base: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    bits: int = 16,
    vision_tower: str | None = None,
    tower_adapter: str | None = None,
    template: str | None = None,
    compat: str = "none",
    dicom_window: str | None = None,
    dicom_frame: str | None = None,
    fast_jpeg: bool | None = None,
    num_gpus: int = 1,
    weights: str = "stored",
    **engine: Any,
) -> LocalEngine:
    """Load a model and return its engine.

    >>> engine = open_engine(model_folder, device="cpu")
    >>> engine.precision
    'float32'

    Args:
        path: checkpoint folder in any known format, or a hub name.
        base: base model of an adapter; default: the one it names.
        dtype: precision of the weights by name; `auto`: as saved, or float32 where a CPU is faster with it.
        device: cpu, cuda, cuda:0 ...; default: the accelerator if present.
        bits: 4 and 8 quantize the weights (bitsandbytes).
        vision_tower: tower of a checkpoint that does not hold or name one.
        tower_adapter: LoRA adapter of the tower of a checkpoint in another format.
        template: name of a conversation template that replaces the checkpoint's.
        compat: names of known defects of the original projects to reproduce, see `llava.compat`.
        dicom_window: window of DICOM files that replaces the checkpoint's, see `DicomPolicy`.
        dicom_frame: frame of DICOM files that replaces the checkpoint's.
        fast_jpeg: whether large JPEG files are decoded at a smaller scale; default: the checkpoint's setting.
        num_gpus: GPUs over which the model is spread; 1 uses `device`.
        weights: `int8` stores the text layers in 8 bits, on a CPU only; `stored`: as `dtype` and `bits` say.
        engine: other arguments of `LocalEngine`, such as `max_slots`.

    Raises:
        CheckpointError: the folder cannot be loaded, or holds weights that are not finite.
        ConfigError: the template or a name of `compat` is unknown, the checkpoint lacks a fact that `compat` needs, or
            the weights cannot be stored in 8 bits.
    """
    if weights == "int8" and bits != 16:
        raise ConfigError(f"--weights int8 quantizes stored weights, but --bits is {bits}; leave one of them out")
    if template is not None:
        check_name(template)
    names = parse_compat(compat, "answers")
    precision: Any = "auto" if dtype == "auto" else getattr(torch, dtype)
    parts = {"vision_tower": vision_tower, "tower_adapter": tower_adapter}
    given: dict[str, Any] = {name: value for name, value in parts.items() if value}
    if num_gpus > 1:
        device = spread_device(num_gpus, device)
    loaded = load_for_inference(path, base=base, dtype=precision, device=device, bits=bits, **given)
    if weights == "int8":
        quantize_text_layers(loaded.model)
    processor = loaded.processor.changed(
        template=template,
        dicom=loaded.processor.dicom.changed(dicom_window, dicom_frame),
        fast_jpeg=fast_jpeg,
        random_padding="random_padding" in names,
        image_mode="square" if "unpadded_images" in names and loaded.processor.image_mode == "pad" else None,
    )
    return LocalEngine(
        loaded.model,
        processor,
        reader=imitating_reader(loaded.model, processor, names),
        beams_count_prompt="beams_count_prompt" in names,
        **engine,
    )


def spread_device(num_gpus: int, device: str | None) -> str | None:
    """Return `auto`, which spreads a model over all visible GPUs, or `device` on a machine without GPUs.

    Raises:
        ConfigError: fewer GPUs are visible.
    """
    num_visible = torch.cuda.device_count()
    if num_visible == 0:
        logger.warning("--num-gpus %d has no effect: this machine has no GPU", num_gpus)
        return device
    if num_visible != num_gpus:
        raise ConfigError(f"--num-gpus is {num_gpus}, but {num_visible} are visible; set CUDA_VISIBLE_DEVICES")
    return SPREAD


def load_for_inference(
    path: CheckpointSource, *, dtype: Dtype = "auto", device: str | None = None, bits: int = 16, **parts: Any
) -> LoadedModel:
    """Load a model onto its device, in the precision that is fastest there, and check its weights.

    Args:
        path: checkpoint folder in any known format, or a hub name.
        dtype: precision of the weights; "auto": as saved, or float32 where a CPU is faster with it.
        device: cpu, cuda, cuda:0 ...; default: the accelerator if present.
        bits: 4 and 8 quantize the weights (bitsandbytes).
        parts: other arguments of `load_checkpoint`.

    Raises:
        CheckpointError: the folder cannot be loaded, or holds weights that are not finite.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    checkpoint = open_checkpoint(path)
    device_map = None if device == "cpu" else device
    if bits != 16:
        check_finite(stored_tensors(checkpoint), str(checkpoint.path))  # quantization would hide non-finite values
    loaded = load_checkpoint(checkpoint, dtype=dtype, device_map=device_map, bits=bits, **parts)
    if bits == 16:
        if device != SPREAD:
            torch.nn.Module.to(loaded.model, device)
        if dtype == "auto":
            raise_slow_weights(loaded.model)
    check_finite(loaded.model.named_parameters(), str(checkpoint.path))
    return loaded


def imitating_reader(model: Any, processor: LlavaMedProcessor, names: Collection[str]) -> PromptReader | None:
    """Return the prompt encoder that reproduces known defects of the originals; None without any.

    Args:
        model: the model.
        processor: its processor.
        names: names of `llava.compat` that concern answers.

    Raises:
        ConfigError: the checkpoint does not name the length to which the original would cut prompts.
    """
    if "cut_prompt" not in names:
        return None
    source = model.config.source or {}
    length = (source.get("config") or {}).get(TRAINING_LENGTH)
    if not length:
        raise ConfigError(
            f"--compat cut_prompt: the checkpoint does not name its training length ({TRAINING_LENGTH} of a "
            "published configuration); leave that name out"
        )
    return PromptReader(processor, max_tokens=context_length(model), longest=int(length))
