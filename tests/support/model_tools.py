"""Batch with images and markers, and weights changed as in a training."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor, nn

from llava.model.builder import LoadedModel
from tests.support.tiny import tiny_image


def batch(loaded: LoadedModel) -> dict[str, Tensor]:
    """Return two rows with an image, text and, if used, markers."""
    image = [loaded.processor.image_token_id] * 4
    start, end = loaded.model.config.marker_token_ids or (9, 9)
    ids = torch.tensor([[1, start, *image, end, 20, 21], [1, 30, start, *image, end, 31]])
    pixels = loaded.processor.pixels([tiny_image(0), tiny_image(1)])
    return {"input_ids": ids, "pixel_values": pixels, "labels": ids.clone()}


def logits(loaded: LoadedModel) -> Tensor:
    inputs = {name: tensor for name, tensor in batch(loaded).items() if name != "labels"}
    with torch.no_grad():
        result: Tensor = loaded.model(**inputs).logits
    return result


def shake(parameters: dict[str, nn.Parameter], seed: int = 5) -> None:
    """Change weights as a training does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def drained(steps: Generator[None, None, Any]) -> tuple[int, Any]:
    """Return the number of pauses and the result of a computation in steps."""
    num_pauses = 0
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return num_pauses, end.value
        num_pauses += 1
