"""Copying of recorded weights of the original trainers into our model, and comparison with them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from llava.model.checkpoint.load_parts import read_tensors

OLD_NAMES = {
    "base_model.model.model.vision_tower.vision_tower.vision_model.": "base_model.model.model.vision_tower.",
    "base_model.model.model.layers.": "base_model.model.model.language_model.layers.",
    "base_model.model.model.mm_projector.": "base_model.model.model.multi_modal_projector.",
    "model.mm_projector.": "model.multi_modal_projector.",
    "model.": "model.language_model.",
}
"""Our prefix of weight names for each prefix of the originals; the first match is used."""

FINAL_FILES = (
    "mm_projector.bin",
    "model.safetensors",
    "pytorch_model.bin",
    "adapter_model.bin",
    "adapter_model.safetensors",
    "non_lora_trainables.bin",
)
"""Files that the originals saved at the end of a run."""


def current_name(name: str) -> str:
    """Return our name of an original weight."""
    name = re.sub(r"\.lora_([AB])\.weight$", r".lora_\1.default.weight", name)
    for old, new in OLD_NAMES.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def put(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy weights with original names into the network; each must exist there."""
    parameters = dict(network.named_parameters())
    with torch.no_grad():
        for name, tensor in weights.items():
            parameters[current_name(name)].copy_(tensor)


def differences(trained: Mapping[str, Tensor], final: Path) -> dict[str, float]:
    """Return the largest difference of each trained weight to the saved one, by original name."""
    return {old: float((ours - saved).abs().max()) for old, _, ours, saved in _pairs(trained, final)}


def shares(trained: Mapping[str, Tensor], final: Path, bounds: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the largest difference of each trained weight in units of its bound, by original name.

    Args:
        trained: our last weights, by our name.
        final: folder that the original saved.
        bounds: bounds of the entries of the trained weights, by our name; entries without a bound must be equal.
    """
    found: dict[str, float] = {}
    for old, name, ours, saved in _pairs(trained, final):
        difference = (ours.double() - saved.double()).abs()
        bound = bounds[name][: len(saved)] if name in bounds else torch.zeros_like(difference)
        found[old] = float(torch.where(difference == 0, 0.0, difference / bound).max())
    return found


def _pairs(trained: Mapping[str, Tensor], final: Path) -> Iterator[tuple[str, str, Tensor, Tensor]]:
    """Yield original name, our name, our weight and the saved one."""
    for file in FINAL_FILES:
        for old, tensor in read_tensors(final / file).items() if (final / file).is_file() else ():
            name = current_name(old)
            if name in trained:  # rows that only our vocabulary has are last
                yield old, name, trained[name][: len(tensor)], tensor
