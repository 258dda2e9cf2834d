"""Sizes of the terms of the gradients of linear layers, to which their rounding is relative.

gradient of a weight = sum over positions of (output gradient * input); canceling terms leave their rounding
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def gradient_terms(network: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Yield a dictionary that a backward pass fills with the sum of absolute terms of each gradient.

    The keys are the names of weights and biases of `nn.Linear`. The norm of a sum is at least that of the gradient.
    """
    found: dict[str, Tensor] = {}

    def add(name: str, terms: Tensor) -> None:
        found[name] = found[name] + terms if name in found else terms

    def watch(name: str, layer: nn.Linear, inputs: Tensor, output: Tensor) -> None:
        def collect(gradient: Tensor) -> None:
            sizes = gradient.detach().abs().double().flatten(0, -2)
            add(f"{name}.weight", sizes.T @ inputs.detach().abs().double().flatten(0, -2))
            if layer.bias is not None:
                add(f"{name}.bias", sizes.sum(dim=0))

        if output.requires_grad:
            output.register_hook(collect)

    hooks = [
        module.register_forward_hook(lambda layer, given, output, name=name: watch(name, layer, given[0], output))
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
