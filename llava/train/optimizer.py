"""Optimizer parameter groups by model part (projector, vision tower, language model) and weight decay."""

from __future__ import annotations

from typing import Any

from torch import nn

from llava.model.checkpoint.weight_names import NEWLINE
from llava.train.specs import OptimizerSpec


def part_of(name: str) -> str:
    """Return `projector`, `tower` or `language` for a parameter name."""
    if "multi_modal_projector." in name or name.endswith(NEWLINE):
        return "projector"
    return "tower" if "vision_tower." in name else "language"


def parameter_groups(model: nn.Module, decaying: set[str], spec: OptimizerSpec) -> list[dict[str, Any]]:
    """Return parameter groups for a torch optimizer.

    Args:
        model: the model; its parameters that require gradients are included.
        decaying: names of parameters with weight decay, unless they have `is_marker_table`.
        spec: learning rates of the parts, and weight decay.
    """
    rates = {"projector": spec.projector, "tower": spec.tower, "language": spec.language}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        # In a marker table only the marker rows are trained; decay would change every other row too.
        decays = name in decaying and not getattr(parameter, "is_marker_table", False)
        key = (rates[part_of(name)], spec.weight_decay if decays else 0.0)
        groups.setdefault(key, []).append(parameter)
    return [{"params": members, "lr": rate, "weight_decay": decay} for (rate, decay), members in groups.items()]
