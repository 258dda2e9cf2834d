"""What a checkpoint of another layout may need beside itself, and how it is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from llava.model.quantization import Quantization


@dataclass(frozen=True, slots=True)
class ForeignOptions:
    """What a checkpoint of another layout may need beside itself.

    Attributes:
        base: language model that an adapter or a projector builds on; also a tokenizer for a folder without one.
        vision_tower: folder or hub name, instead of the one that the checkpoint names.
        vision_tower_config: open_clip model configuration, likewise.
        vision_tower_checkpoint: open_clip weights, likewise.
        tower_adapter: a tower's LoRA adapter (STLLaVA-Med's `Vit-lora`); one inside the folder is found.
        template: conversation template, instead of the one that the content suggests.
        dtype: of the weights; "auto" keeps that of the embeddings.
        device_map: passed to transformers; None loads on the CPU.
        quantization: of the language model.
        merge: add adapters into the weights (never where those are quantized).
    """

    base: str | None = None
    vision_tower: str | None = None
    vision_tower_config: str | None = None
    vision_tower_checkpoint: str | None = None
    tower_adapter: str | None = None
    template: str | None = None
    dtype: torch.dtype | Literal["auto"] = "auto"
    device_map: Any = None
    quantization: Quantization = field(default_factory=Quantization)
    merge: bool = True

    @property
    def parts(self) -> dict[str, str]:
        """The options that say where parts are, to load the same again."""
        names = ("base", "vision_tower", "vision_tower_config", "vision_tower_checkpoint", "tower_adapter", "template")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}
