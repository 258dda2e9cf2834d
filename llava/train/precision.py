"""Frozen weights of a bf16 run in bf16: half the memory, and no recasting at every use.

    autocast:  float32 weight --cast at every use--> bf16 --\\
    here:      bf16 weight, cast once ----------------------+--> the same product, bit for bit

Only what autocast would cast is cast: the matrices of linear and convolution layers. Embeddings, norms, biases and all
that trains (adapters, projector, opened parts) stay float32, and so does everything that a checkpoint will hold: a
weight that went through bf16 has lost bits.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from llava.model.names import PROJECTOR_MODULE
from llava.model.quantization import quantized_layers
from llava.train.args import LlavaTrainingArguments
from llava.train.saving import Kind

CAST_BY_AUTOCAST = (nn.Linear, nn.Conv1d, nn.Conv2d)


def holds_frozen_in_bf16(args: LlavaTrainingArguments) -> bool:
    """Say whether a run keeps frozen weights in bf16: on a GPU with `--bf16`, and unless ranks share weights.

    DeepSpeed casts by its own configuration, and FSDP joins weights of one type only. On the CPU, where memory is no
    matter and bf16 products may be slow, weights stay as they are.
    """
    return bool(args.bf16 and args.device.type != "cpu" and not args.deepspeed and not args.fsdp)


def hold_frozen_in_bf16(network: nn.Module, kind: Kind) -> int:
    """Cast frozen matrices that no checkpoint of the run will hold; 4-bit layers compute in bf16.

    Args:
        network: the model, or a peft model around it; what trains has been decided.
        kind: how the run is saved. A whole model is written with its frozen parts, so nothing of it is cast.

    Returns:
        How many weights were cast.
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
        kept |= {id(parameter) for parameter in own.values()}  # also a head that is the embedding table
    num_cast = 0
    for weight in matrices:
        if weight.dtype == torch.float32 and not weight.requires_grad and id(weight) not in kept:
            weight.data = weight.data.to(torch.bfloat16)
            num_cast += weight.numel()
    return num_cast
