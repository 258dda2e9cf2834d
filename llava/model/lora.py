"""What is trained: adapters, frozen parts, marker rows; and a table that says so."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from llava.model.building import Loaded

PARTS = {"multi_modal_projector": "projector", "vision_tower": "vision tower", "lora_": "adapter"}


def language_linear_layers(model: nn.Module) -> list[str]:
    """Names of the linear layers inside the language model; head, projector and tower are left out (seeds' rule)."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "language_model." in name and "lm_head" not in name
    ]


def add_lora(loaded: Loaded, *, r: int = 64, alpha: int = 16, dropout: float = 0.05, bias: str = "none") -> PeftModel:
    """Put one LoRA adapter on the language model; everything else is frozen by peft, `freeze_for` opens parts again."""
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        bias=cast(Any, bias),
        target_modules=language_linear_layers(loaded.model),
        task_type="CAUSAL_LM",
    )
    return cast(PeftModel, get_peft_model(cast(Any, loaded.model), config))


def freeze_for(
    model: nn.Module,
    *,
    projector_only: bool = False,
    freeze_backbone: bool = False,
    freeze_projector: bool = False,
    train_tower: bool = False,
    has_adapter: bool = False,
) -> None:
    """Decide which parameters train (specification llava-med 5.3).

    Args:
        model: the model, or a peft model around it.
        projector_only: stage 1; with markers their two rows are added by `train_marker_rows`.
        freeze_backbone: the language model stays as it is.
        freeze_projector: the projector stays as it is.
        train_tower: the vision tower trains too.
        has_adapter: language weights train through the adapter only.
    """
    for name, parameter in model.named_parameters():
        if "multi_modal_projector." in name:
            parameter.requires_grad_(not freeze_projector)
        elif "vision_tower." in name:
            parameter.requires_grad_(train_tower and not projector_only)
        elif "lora_" in name or has_adapter:
            parameter.requires_grad_("lora_" in name and not projector_only)
        elif parameter.is_floating_point():
            parameter.requires_grad_(not (projector_only or freeze_backbone))


def train_marker_rows(model: nn.Module, token_ids: Sequence[int]) -> list[nn.Parameter]:
    """Let only some embedding rows train: the markers of stage 1, in both roles where the weights are tied.

    The gradient of every other row is set to zero, so it moves only if weight decay is applied to the table: give the
    returned parameters an optimizer group without decay.

    Returns:
        The embedding parameters that now require gradients.
    """
    embedding = cast(nn.Module, cast(Any, model).get_input_embeddings())
    weight = cast(nn.Parameter, embedding.weight)
    weight.requires_grad_(True)
    keep = torch.zeros(weight.shape[0], 1, dtype=weight.dtype, device=weight.device)
    keep[list(token_ids)] = 1

    def only_markers(gradient: Tensor) -> Tensor:
        return gradient * keep.to(gradient.device, gradient.dtype)

    cast(Any, weight).register_hook(only_markers)
    return [weight]


def trainable_report(model: nn.Module) -> str:
    """A table of tensors and parameters by part, and how many of them train."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for name, parameter in model.named_parameters():
        part = next((title for key, title in PARTS.items() if key in name), "language model")
        size = getattr(parameter, "ds_numel", parameter.numel())
        counts[part][0] += 1
        counts[part][1] += size
        counts[part][2] += size if parameter.requires_grad else 0
    rows: list[tuple[Any, ...]] = [(part, *numbers) for part, numbers in sorted(counts.items())]
    rows.append(("total", *(sum(numbers[column] for numbers in counts.values()) for column in range(3))))
    lines = [f"{'part':<16}{'tensors':>9}{'parameters':>15}{'trained':>15}{'share':>9}"]
    for part, tensors, size, trained in rows:
        lines.append(f"{part:<16}{tensors:>9}{size:>15,}{trained:>15,}{trained / max(size, 1):>9.2%}")
    return "\n".join(lines) + "\n"
