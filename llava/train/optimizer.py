"""Optimizer groups: projector, tower and language model, each with and without weight decay."""

from __future__ import annotations

from typing import Any

from torch import nn

from llava.model.checkpoint.weight_names import NEWLINE
from llava.train.args import LlavaTrainingArguments


def part_of(name: str) -> str:
    """`projector`, `tower` or `language`, by the name of a parameter."""
    if "multi_modal_projector." in name or name.endswith(NEWLINE):
        return "projector"
    return "tower" if "vision_tower." in name else "language"


def parameter_groups(model: nn.Module, decaying: set[str], args: LlavaTrainingArguments) -> list[dict[str, Any]]:
    """Groups for torch optimizers.

    Args:
        model: its parameters that require gradients are trained.
        decaying: names to which weight decay applies; marker rows are excluded by `is_marker_table`, since decay would
            move every other row of the table as well.
        args: learning rates and decay; a part without its own rate takes the general one.
    """
    rates = {
        "projector": args.mm_projector_lr or args.learning_rate,
        "tower": args.mm_vision_tower_lr or args.learning_rate,
        "language": args.learning_rate,
    }
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = name in decaying and not getattr(parameter, "is_marker_table", False)
        key = (rates[part_of(name)], args.weight_decay if decays else 0.0)
        groups.setdefault(key, []).append(parameter)
    return [{"params": members, "lr": rate, "weight_decay": decay} for (rate, decay), members in groups.items()]
