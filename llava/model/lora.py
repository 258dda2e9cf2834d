"""Trainable parts: adapters, frozen parts, marker rows, and a report of them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from llava.errors import ConfigError
from llava.model.builder import LoadedModel
from llava.model.checkpoint.weight_names import NEWLINE

PARTS = {"multi_modal_projector": "projector", NEWLINE: "projector", "vision_tower": "vision tower", "lora_": "adapter"}


def language_linear_layers(model: nn.Module) -> str:
    """Return a regular expression for the linear layers inside the language model.

    Head, projector and tower are left out, as in the original trainers. A pattern instead of a list of names keeps the
    adapter's configuration short and valid for every depth.

    Raises:
        ConfigError: the language model has no linear layer (GPT-2 has transposed ones).
    """
    kinds = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "language_model." in name
    } - {"lm_head"}
    if not kinds:
        raise ConfigError("the language model has no linear layers for LoRA; train all of it (--lora-enable False)")
    return rf"(?:.*\.)?language_model\..*\.(?:{'|'.join(map(re.escape, sorted(kinds)))})"


def add_lora(
    loaded: LoadedModel,
    *,
    r: int = 64,
    alpha: int = 16,
    dropout: float = 0.05,
    bias: str = "none",
    target: str | None = None,
) -> PeftModel:
    """Add one LoRA adapter to the language model; peft freezes the rest, and `freeze_for` unfreezes parts.

    Args:
        loaded: the model.
        r: rank.
        alpha: the adapter is scaled by alpha / r.
        dropout: dropout of the adapter's input.
        bias: which biases train: `none`, `all` or `lora_only`.
        target: regular expression for other layers than `language_linear_layers`.

    Raises:
        ConfigError: no layer matches, or peft rejects a setting.
    """
    try:
        config = LoraConfig(
            r=r,
            lora_alpha=alpha,
            lora_dropout=dropout,
            bias=cast(Any, bias),
            target_modules=target or language_linear_layers(loaded.model),
            task_type="CAUSAL_LM",
        )
        return cast(PeftModel, get_peft_model(cast(Any, loaded.model), config))
    except (ValueError, NotImplementedError) as error:
        raise ConfigError(f"LoRA with r={r}, bias={bias!r} cannot be added: {error}") from error


def freeze_for(
    model: nn.Module,
    *,
    projector_only: bool = False,
    freeze_backbone: bool = False,
    freeze_projector: bool = False,
    train_tower: bool = False,
    has_adapter: bool = False,
) -> None:
    """Set which parameters train.

    Args:
        model: the model, or a peft model around it.
        projector_only: stage 1; with markers, `train_marker_rows` adds their two rows.
        freeze_backbone: the language model's weights do not train (an adapter on it still does).
        freeze_projector: the projector does not train.
        train_tower: the vision tower trains too.
        has_adapter: language weights train through the adapter only, and biases where `add_lora` unfroze them.

    Raises:
        ConfigError: no parameter would train.
    """
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            continue
        if "multi_modal_projector." in name or name.endswith(NEWLINE):
            parameter.requires_grad_(not freeze_projector)
        elif "vision_tower." in name:
            parameter.requires_grad_(train_tower and not projector_only)
        elif has_adapter:
            parameter.requires_grad_(parameter.requires_grad and not projector_only)
        else:
            parameter.requires_grad_(not (projector_only or freeze_backbone))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("every part is frozen, so nothing would train; drop one of the --freeze-* flags")


def train_marker_rows(model: nn.Module, token_ids: Sequence[int]) -> list[nn.Parameter]:
    """Make only some embedding rows train: the markers of stage 1, in both roles if weights are tied.

    The gradient of every other row is set to zero, so momentum never moves one. Weight decay would: the table is marked
    by `is_marker_table`, and needs an optimizer group without decay (`train.optimizer` creates it).

    Args:
        model: the model, or a peft model around it; everything else keeps its state.
        token_ids: ids of the rows.

    Returns:
        The embedding parameters that now require gradients.

    Raises:
        ConfigError: `token_ids` is empty, or outside the vocabulary.
    """
    table: Any = cast(Any, model).get_input_embeddings().weight
    num_rows = int(getattr(table, "ds_shape", table.shape)[0])  # a table that ZeRO-3 spread over ranks looks empty
    if not token_ids or not all(0 <= token < num_rows for token in token_ids):
        raise ConfigError(f"marker rows {list(token_ids)} are not in the vocabulary of {num_rows} tokens")
    keep = torch.zeros(num_rows, 1, dtype=torch.bool)
    keep[list(token_ids)] = True

    def only_markers(gradient: Tensor) -> Tensor:
        return gradient * keep.to(gradient.device)

    table.requires_grad_(True)
    table.register_hook(only_markers)
    table.is_marker_table = True
    table.num_marker_rows = len(set(token_ids))
    return [table]


def trainable_report(model: nn.Module) -> str:
    """Return a table of the tensors, parameters and trained parameters of each part."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for name, parameter in model.named_parameters():
        part = next((title for key, title in PARTS.items() if key in name), "language model")
        counts[part][0] += 1
        counts[part][1] += _size(parameter)
        counts[part][2] += _num_trained(parameter)
    rows: list[tuple[Any, ...]] = [(part, *numbers) for part, numbers in sorted(counts.items())]
    rows.append(("total", *(sum(numbers[column] for numbers in counts.values()) for column in range(3))))
    lines = [f"{'part':<16}{'tensors':>9}{'parameters':>16}{'trained':>16}{'share':>9}"]
    for part, tensors, size, trained in rows:
        lines.append(f"{part:<16}{tensors:>9}{size:>16,}{trained:>16,}{trained / max(size, 1):>9.2%}")
    return "\n".join(lines) + "\n"


def _size(parameter: Any) -> int:
    """Return the number of weights in a tensor, also if it is sharded (ZeRO-3) or packed (4 bits)."""
    if (state := getattr(parameter, "quant_state", None)) is not None and getattr(state, "shape", None) is not None:
        return int(state.shape.numel())
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _num_trained(parameter: Any) -> int:
    if not parameter.requires_grad:
        return 0
    width = getattr(parameter, "ds_shape", parameter.shape)[-1]
    return int(parameter.num_marker_rows * width) if hasattr(parameter, "num_marker_rows") else _size(parameter)
