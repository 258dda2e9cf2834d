"""Products of a few rows with the weights of linear layers, for decoding steps and short prompts.

rows [B, n] --Product.of, into, added--> [B, m]
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llava.model.int8 import Int8Linear

LARGE_WEIGHT = 1 << 19
"""Number of weights above which a layer exceeds the processor's caches and memory bandwidth limits its product."""

FEW_ROWS, FEW_ROWS_OF_WIDE = 4, 8
"""Maximum number of rows for which the operands of a product are swapped; the second number is for heads."""

WIDE = 16
"""Ratio of outputs to inputs from which a layer counts as a head."""


class Product:
    """Product of rows [B, n] with the weight of a linear layer."""

    def __init__(self, layer: Any) -> None:
        """Use the weight as it is; keep a view of it that needs no call per step."""
        self.stored = layer.weight
        self.weight = layer.weight.t()
        self.num_exchanged = num_exchanged(layer.weight)
        self.bias = layer.bias
        self.width = int(layer.out_features)

    def rows_of(self, rows: Tensor) -> Tensor:
        """Return rows in the dtype that the other methods take."""
        return rows

    def of(self, rows: Tensor) -> Tensor:
        """Return the product [B, m]."""
        if 0 < len(rows) <= self.num_exchanged:
            found = self._exchanged(rows)
            return found if self.bias is None else found + self.bias
        return torch.mm(rows, self.weight) if self.bias is None else torch.addmm(self.bias, rows, self.weight)

    def into(self, rows: Tensor, out: Tensor) -> None:
        """Write the product to `out` [B, m]."""
        if self.bias is None:
            torch.mm(rows, self.weight, out=out)
        else:
            torch.addmm(self.bias, rows, self.weight, out=out)

    def added(self, rows: Tensor, to: Tensor) -> Tensor:
        """Return `to` [B, m] and the product."""
        found = torch.addmm(to, rows, self.weight)
        return found if self.bias is None else found.add_(self.bias)

    def _exchanged(self, rows: Tensor) -> Tensor:
        # With the rows on the left, or with one row, MKL reads a large weight at a half to a sixth of this speed.
        pair = rows if len(rows) > 1 else rows.expand(2, -1).contiguous()
        return torch.mm(self.stored, pair.t()).t()[: len(rows)]


class Int8Product(Product):
    """Product with a weight of 8 bits; rows are cast once for all products that read them."""

    def __init__(self, layer: Int8Linear) -> None:
        """Use the weight of a layer."""
        self.layer = layer
        self.width = layer.out_features

    def rows_of(self, rows: Tensor) -> Tensor:
        """Return rows in bfloat16."""
        return rows.to(torch.bfloat16)

    def of(self, rows: Tensor) -> Tensor:
        """Return the product [B, m] in bfloat16."""
        return self.layer.product(rows)

    def into(self, rows: Tensor, out: Tensor) -> None:
        """Write the product to `out` [B, m], in its dtype."""
        out.copy_(self.layer.product(rows))

    def added(self, rows: Tensor, to: Tensor) -> Tensor:
        """Return `to` [B, m] and the product, in the dtype of `to`."""
        return to + self.layer.product(rows)


def product_of(layer: Any) -> Product:
    """Return the product with the weight of a layer."""
    return Int8Product(layer) if type(layer) is Int8Linear else Product(layer)


def num_exchanged(weight: Tensor) -> int:
    """Return the number of rows up to which the sides of a product with a weight [m, n] are exchanged."""
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or weight.numel() < LARGE_WEIGHT:
        return 0
    return FEW_ROWS_OF_WIDE if weight.shape[0] >= WIDE * weight.shape[1] else FEW_ROWS
