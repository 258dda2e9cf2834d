"""How each kind of run is written and read back: projector (stage 1), adapter (LoRA), or the whole model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import set_peft_model_state_dict
from torch import Tensor, nn

from llava.model.building import Loaded
from llava.model.checkpoint import (
    load_extra,
    load_projector,
    read_tensors,
    save_adapter,
    save_model,
    save_projector,
)
from llava.model.modeling import LlavaMedForConditionalGeneration
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
            set_peft_model_state_dict(model, read_tensors(Path(path) / "adapter_model.safetensors"))
            load_extra(model, Path(path))
        else:
            _restore_model(model, path)

    return Hooks(save=save, restore=restore)


def _restore_model(model: nn.Module, path: str) -> None:
    """Copy the weights of a saved model into the one in memory; names go through transformers' own loading."""
    dtype = next(model.parameters()).dtype
    saved = cast(Any, LlavaMedForConditionalGeneration).from_pretrained(path, dtype=dtype)
    with torch.no_grad():
        model.load_state_dict(saved.state_dict())
