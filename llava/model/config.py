"""Configuration of the one model family: transformers' Llava plus what our checkpoints must remember."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, LlavaConfig


@strict
class LlavaMedConfig(LlavaConfig):
    """Adds projector, markers, image mode, template and placement to `LlavaConfig`.

    The type name is our own: `llava` is taken by transformers, and LLaVA-Med 1.0 checkpoints claim it for a flat,
    incompatible layout (specification llava-med 1.4).
    """

    model_type = "llava_med"

    projector_type: str = "mlp2x_gelu"
    projector_kwargs: dict[str, Any] | None = None
    use_im_start_end: bool = False
    image_aspect_ratio: str = "square"
    template: str = "vicuna_v1"
    placement: str = "front"


AutoConfig.register(LlavaMedConfig.model_type, LlavaMedConfig, exist_ok=True)
