"""Text layers with weights of 8 bits on a CPU, which reads a quarter of the bytes per decoding step.

weight [m, n] --one scale per row--> int8 [m, n], scales [m]; products are computed from rows in bfloat16
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llava.errors import ConfigError
from llava.model.precision import CPU_ROWS, MAX_CPU_SIZES, ProductShape, half_speedup

LARGEST = 127
"""Largest magnitude of a stored weight."""

PACKED_ROWS = 8
"""Rows up to which the kernel for few rows is used; for more it is slower than a product of expanded weights."""

BLOCK_WEIGHTS = 1 << 19
"""Weights expanded at a time, so that a block stays in the processor's cache."""


class Int8Linear(nn.Module):
    """Linear layer whose weight is stored in 8 bits; for answering only, it has no gradients."""

    def __init__(self, linear: nn.Linear) -> None:
        """Quantize the weight of a layer."""
        super().__init__()
        weight = linear.weight.detach().float()
        # The kernel expects scales in bfloat16, so weights are divided by the rounded scale.
        scales = (weight.abs().amax(dim=1) / LARGEST).to(torch.bfloat16)
        scales = torch.where(scales == 0, torch.ones_like(scales), scales)
        quantized = (weight / scales.float()[:, None]).round_().clamp_(-LARGEST, LARGEST).to(torch.int8)
        self.weight = nn.Buffer(quantized)
        self.scales = nn.Buffer(scales)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, states: Tensor) -> Tensor:
        """Return products [..., m] of states [..., n], in their dtype."""
        rows = states.reshape(-1, self.in_features).to(torch.bfloat16)
        return self.product(rows).to(states.dtype).view(*states.shape[:-1], self.out_features)

    def product(self, rows: Tensor) -> Tensor:
        """Return products [B, m] of rows [B, n], all in bfloat16."""
        if rows.shape[0] <= PACKED_ROWS:
            found = torch._weight_int8pack_mm(rows, self.weight, self.scales)
        else:
            found = self._expanded_product(rows)
        return found if self.bias is None else found.add_(self.bias)

    def _expanded_product(self, rows: Tensor) -> Tensor:
        """Return the product with weights expanded block by block; bfloat16 holds integers to 127 exactly."""
        dtype = expanded_dtype()
        rows = rows.to(dtype)
        blocks = self.weight.split(max(1, BLOCK_WEIGHTS // self.in_features))
        found = torch.cat([torch.mm(rows, block.to(dtype).t()) for block in blocks], dim=1)
        return found.mul_(self.scales.to(dtype)).to(torch.bfloat16)


def expanded_dtype() -> torch.dtype:
    """Return the dtype of products of many rows: bfloat16 if faster on this processor, else float32."""
    shape = ProductShape(CPU_ROWS, *MAX_CPU_SIZES)
    return torch.bfloat16 if half_speedup(torch.bfloat16, shape) > 1 else torch.float32


def precision_of(model: Any) -> str:
    """Return the name of the precision of a model's text layers: `int8`, or that of its weights."""
    has_int8 = any(isinstance(module, Int8Linear) for module in model.modules())
    return "int8" if has_int8 else str(model.dtype).removeprefix("torch.")


def quantize_text_layers(model: Any) -> int:
    """Replace the linear layers of a language model, with its head, by `Int8Linear`; return their number.

    Embeddings, vision tower and projector keep their precision.

    Raises:
        ConfigError: the model is not on a CPU, has an adapter, or has no linear layers of the usual kind.
    """
    if model.device.type != "cpu":
        raise ConfigError(f"--weights int8 computes on a CPU, but the model is on {model.device}; add --device cpu")
    decoder = model.get_decoder()
    if any("lora_" in name for name, _ in decoder.named_parameters()):
        raise ConfigError("--weights int8 needs a model without adapter; merge it (scripts/merge_lora_weights.py)")
    found = [
        (parent, name, child)
        for layer in getattr(decoder, "layers", ())
        for parent in layer.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear
    ]
    if not found:
        raise ConfigError(f"--weights int8 needs a language model of linear layers; {type(decoder).__name__} has none")
    for parent, name, child in found:
        setattr(parent, name, Int8Linear(child))
    head = model.get_output_embeddings()
    if type(head) is nn.Linear:
        model.set_output_embeddings(Int8Linear(head))
        return len(found) + 1
    return len(found)
