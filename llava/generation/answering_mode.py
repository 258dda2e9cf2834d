"""Mode of a model while it answers.

with AnsweringMode(model).entered(): ...     no gradients, no dropout; afterwards the mode is as before
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from llava.model.quantization import quantized_layers


class AnsweringMode:
    """Mode in which a model answers: no gradients and no dropout.

    4-bit layers stay in training mode, which is the same computation: on the CPU, one run in evaluation mode without
    gradients changes their weights to a form that never gives gradients again.
    """

    def __init__(self, model: nn.Module) -> None:
        """List the modules once; a model whose modules change (an adapter) needs a new object."""
        quantized = {id(layer) for layer in quantized_layers(model)}
        self._modes = [(module, id(module) in quantized) for module in model.modules()]

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Enter the mode; restore the mode of every module afterwards."""
        switched = [module for module, training in self._modes if module.training != training]
        for module in switched:
            module.training = not module.training
        try:
            with torch.no_grad():
                yield
        finally:
            for module in switched:
                module.training = not module.training
