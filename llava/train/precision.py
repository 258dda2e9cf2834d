"""Precision of a training run: resolution of `--bf16 auto`, and frozen weights stored in bf16.

    autocast:  float32 weight --cast at every use--> bf16 --\\
    here:      bf16 weight, cast once ----------------------+--> bitwise equal product

Only weights that autocast would cast are cast: the matrices of linear and convolution layers. Embeddings, norms, biases
and trained weights stay float32. So do all weights that a checkpoint will contain, since a cast to bf16 loses bits.
"""

from __future__ import annotations

import logging
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers.hf_argparser import string_to_bool

from llava.model.checkpoint.formats import CONFIG_FILE, read_json
from llava.model.checkpoint.weight_names import PROJECTOR_MODULE
from llava.model.precision import training_speedup, trains_faster_in_bf16
from llava.model.quantization import quantized_layers
from llava.train.checkpointing import Kind, bf16_to_resume
from llava.train.specs import ResumeSpec
from llava.utils import log

logger = logging.getLogger(__name__)

CAST_BY_AUTOCAST = (nn.Linear, nn.Conv1d, nn.Conv2d)


def accept_auto(parser: ArgumentParser, *, default: bool | Literal["auto"]) -> None:
    """Let `--bf16` accept `auto`, and set its default."""
    action = next(action for action in parser._actions if "--bf16" in action.option_strings)
    action.type, action.default, action.metavar = _bool_or_auto, default, "True|False|auto"


def _bool_or_auto(value: str) -> bool | Literal["auto"]:
    if value == "auto":
        return "auto"
    try:
        return bool(string_to_bool(value))
    except ArgumentTypeError as error:
        raise ArgumentTypeError(f"expected True, False or auto, got {value!r}") from error


def chosen_bf16(bf16: bool | Literal["auto"], *, model: str, fp16: bool, use_cpu: bool, resume: ResumeSpec) -> bool:
    """Return the value of `--bf16`; `auto` follows the resumed run, or else a measurement.

    Args:
        bf16: `--bf16` as parsed.
        model: model folder or hub name.
        fp16: whether the run computes in float16, so that nothing is measured.
        use_cpu: whether accelerators are ignored.
        resume: where the checkpoint to resume from is.
    """
    if bf16 != "auto":
        return bool(bf16)
    earlier = bf16_to_resume(resume)
    if fp16 or earlier is not None:
        return bool(earlier)
    choice = trains_faster_in_bf16(_config(model), device_of(use_cpu=use_cpu))
    logger.info("--bf16 auto: this run computes in %s, as measured on this machine", ("float32", "bfloat16")[choice])
    return choice


def device_of(*, use_cpu: bool) -> str:
    """Return the type of the device of a run, such as `cpu`."""
    accelerator = None if use_cpu else torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else accelerator.type


def computes_fp16(*, fp16: bool, use_cpu: bool) -> bool:
    """Return whether a run computes in float16; warn where it was requested, but the run is on a CPU."""
    on_cpu = fp16 and device_of(use_cpu=use_cpu) == "cpu"
    if on_cpu:
        log.warn_once(
            logger,
            "--fp16 True is ignored: float16 needs an accelerator, so this run computes in float32 on the CPU, and its "
            "provenance says so; --bf16 auto uses bfloat16 where the CPU is faster with it",
        )
    return fp16 and not on_cpu


def agreed(choice: bool, *, world_size: int) -> bool:
    """Return the choice of rank 0 on all ranks."""
    # Ranks may measure on different sides of the limit.
    if world_size == 1:
        return choice
    choices = [choice]
    broadcast_object_list(choices)
    return choices[0]


def warn_of_slow_bf16(model: str, *, bf16: bool, device_type: str, resumed: bool) -> None:
    """Warn once, with the measured factor, if bfloat16 slows down a run on a CPU.

    Args:
        model: model folder or hub name.
        bf16: whether the run computes in bfloat16.
        device_type: device of the run.
        resumed: whether that is the choice of the run to resume.
    """
    if not bf16 or device_type != "cpu":
        return
    speedup = training_speedup(_config(model), device_type)
    if speedup >= 1.0:
        return
    slower = f"bfloat16 products take {1 / speedup:.1f} times as long as float32 products on this CPU"
    if resumed:
        log.warn_once(
            logger, f"the run to resume computes in bfloat16: {slower}; to change it, use --overwrite-output-dir"
        )
    else:
        log.warn_once(logger, f"--bf16 True: {slower}; use --bf16 auto, which computes in float32 on this machine")


def _config(model: str) -> Mapping[str, Any]:
    """Return the configuration of a model folder; empty for a hub name."""
    return read_json(Path(model) / CONFIG_FILE)


def stores_frozen_in_bf16(*, bf16: bool, device_type: str, sharded: bool) -> bool:
    """Return whether frozen weights are stored in bf16: on a GPU with `--bf16`, without DeepSpeed or FSDP."""
    # DeepSpeed casts by its own configuration, and FSDP flattens weights of one data type only. On the CPU memory is
    # not the limit and bf16 products may be slow.
    return bf16 and device_type != "cpu" and not sharded


def hold_frozen_in_bf16(network: nn.Module, kind: Kind) -> int:
    """Cast frozen matrices that are not saved to bf16, and let 4-bit layers compute in bf16.

    Args:
        network: the model, or a peft model around it; `requires_grad` is already set.
        kind: trained part; a run that saves the whole model also saves its frozen parts, so nothing is cast.

    Returns:
        The number of weights that were cast.
    """
    if kind == "model":
        return 0
    for layer in quantized_layers(network):
        if hasattr(layer, "compute_dtype"):
            cast(Any, layer).compute_dtype = torch.bfloat16
    matrices: list[nn.Parameter] = []
    kept: set[int] = set()
    for name, module in network.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if isinstance(module, CAST_BY_AUTOCAST) and PROJECTOR_MODULE not in f"{name}.":
            matrices.append(own.pop("weight"))
        kept |= {id(parameter) for parameter in own.values()}  # includes a head that shares the embedding table
    num_cast = 0
    for weight in matrices:
        if weight.dtype == torch.float32 and not weight.requires_grad and id(weight) not in kept:
            weight.data = weight.data.to(torch.bfloat16)
            num_cast += weight.numel()
    return num_cast
