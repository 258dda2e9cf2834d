"""Weights that the original trainers recorded, under their names: copied into our model, and compared with it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from llava.model.part_loading import read_tensors

OLD_NAMES = {
    "base_model.model.model.layers.": "base_model.model.model.language_model.layers.",
    "base_model.model.model.mm_projector.": "base_model.model.model.multi_modal_projector.",
    "model.mm_projector.": "model.multi_modal_projector.",
    "model.": "model.language_model.",
}
"""Prefixes of the originals' weight names, and ours; the first that fits counts."""

FINAL_FILES = (
    "mm_projector.bin",
    "model.safetensors",
    "pytorch_model.bin",
    "adapter_model.bin",
    "adapter_model.safetensors",
    "non_lora_trainables.bin",
)
"""What the originals saved at the end of a run, of any kind."""


def current_name(name: str) -> str:
    """Our name of an original's weight."""
    name = re.sub(r"\.lora_([AB])\.weight$", r".lora_\1.default.weight", name)
    for old, new in OLD_NAMES.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def put(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy weights under original names in; each must exist."""
    parameters = dict(network.named_parameters())
    with torch.no_grad():
        for name, tensor in weights.items():
            parameters[current_name(name)].copy_(tensor)


def differences(trained: Mapping[str, Tensor], final: Path) -> dict[str, float]:
    """Largest difference of each trained weight to the one that the original saved, under the original's name."""
    found: dict[str, float] = {}
    for name in FINAL_FILES:
        for old, tensor in read_tensors(final / name).items() if (final / name).is_file() else ():
            ours = trained.get(current_name(old))
            if ours is not None:  # rows that only our vocabulary has come last
                found[old] = float((ours[: len(tensor)] - tensor).abs().max())
    return found
