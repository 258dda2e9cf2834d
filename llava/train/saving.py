"""How each kind of run is written and read back: projector (stage 1), adapter (LoRA), or the whole model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import set_peft_model_state_dict
from torch import Tensor, nn

from llava.errors import CheckpointError
from llava.model.builder import Loaded
from llava.model.checkpoint.formats import ADAPTER_FILE
from llava.model.checkpoint.load_parts import check_adapter_names, load_extra, load_projector, read_tensors
from llava.model.checkpoint.save import save_adapter, save_model, save_projector
from llava.model.modeling import LlavaMedForConditionalGeneration
from llava.model.multimodal_encoder.towers import UNREADABLE, first_line
from llava.train.trainer import Hooks

Kind = Literal["projector", "adapter", "model"]

SAVERS: dict[Kind, Callable[..., None]] = {
    "projector": save_projector,
    "adapter": save_adapter,
    "model": save_model,
}


def hooks_for(kind: Kind, model: nn.Module, loaded: Loaded) -> Hooks:
    """Writers and readers for what this run trains."""

    def save(path: str, state: dict[str, Tensor] | None) -> None:
        SAVERS[kind](model, loaded.processor, path, state=state, origin=loaded.origin)

    def restore(path: str) -> None:
        if kind == "projector":
            load_projector(model, path)
        elif kind == "adapter":
            restore_adapter(model, Path(path))
        else:
            _restore_model(model, path)

    return Hooks(save=save, restore=restore)


def restore_adapter(model: nn.Module, path: Path) -> None:
    """Copy a saved adapter, and what was saved beside it, into the one that is on the model.

    Raises:
        CheckpointError: a file is broken, or does not hold exactly the weights of this adapter.
    """
    file = path / ADAPTER_FILE
    weights = read_tensors(file)
    check_adapter_names(model, weights, file)
    try:
        result: Any = set_peft_model_state_dict(model, weights)
    except UNREADABLE as error:
        raise CheckpointError(f"{file}: the adapter does not fit the model: {first_line(error)}") from error
    # Weights outside the adapter are always missing there; within it none may be, whatever peft made of the names.
    if wrong := sorted({name for name in result.missing_keys if "lora_" in name} | set(result.unexpected_keys)):
        raise CheckpointError(f"{file}: peft could not place {len(wrong)} weights of the adapter, such as {wrong[0]}")
    load_extra(model, path)


def _restore_model(model: nn.Module, path: str) -> None:
    """Copy the weights of a saved model into the one in memory; names go through transformers' own loading."""
    dtype = next(model.parameters()).dtype
    saved = cast(Any, LlavaMedForConditionalGeneration).from_pretrained(path, dtype=dtype)
    with torch.no_grad():
        model.load_state_dict(saved.state_dict())
