"""The one model family: transformers' Llava with its own projector and a door for cached tower features.

    pixels [N, 3, H, W] --tower--> [N, P, Dv] --projector--> [N, P, D] --scatter over place holders--> language model

Scatter, caching, attention back ends, checkpointing and sharding plans are inherited; `forward` is not overridden.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, LlavaForConditionalGeneration, LlavaModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from llava.model.config import LlavaMedConfig
from llava.model.multimodal_projector import build_projector

CLASS_TOKEN_TOWERS = frozenset({"clip_vision_model", "dinov2", "dinov2_with_registers", "vit"})
"""Towers whose first token is a class token; others (SigLIP) have patch tokens only."""


def num_extra_tokens(vision_config: Any) -> int:
    """Class and register tokens before the patch tokens of a tower's hidden states."""
    has_class = int(vision_config.model_type in CLASS_TOKEN_TOWERS)
    return has_class + int(getattr(vision_config, "num_register_tokens", 0))


def tokens_per_image(config: LlavaMedConfig) -> int:
    """P: language-model tokens of one image (its input may be smaller than the tower's own size)."""
    return int(config.image_seq_length)


class LlavaMedModel(LlavaModel):
    """Tower, projector and language model without its head."""

    config_class = LlavaMedConfig

    def __init__(self, config: LlavaMedConfig) -> None:
        super().__init__(config)
        self.multi_modal_projector: nn.Module = build_projector(config)  # type: ignore[assignment]
        self.post_init()  # type: ignore[no-untyped-call]

    def tower_features(self, pixel_values: Tensor) -> Tensor:
        """Features [N, P, Dv] of the selected layers for pixels [N, 3, H, W]; no graph while the tower is frozen."""
        tower = cast(nn.Module, self.vision_tower)
        parameter = next(tower.parameters())
        frozen = not any(p.requires_grad for p in tower.parameters())
        pixels = pixel_values.to(parameter.device, parameter.dtype)
        config: Any = self.config.vision_config
        # DINOv2 always stretches its position table to the input; the others must be asked.
        is_other_size = pixels.shape[-1] != config.image_size and not config.model_type.startswith("dinov2")
        stretch = {"interpolate_pos_encoding": True} if is_other_size else {}
        with torch.no_grad() if frozen else nullcontext():
            states = tower(pixels, output_hidden_states=True, return_dict=True, **stretch).hidden_states
        layers = self.config.vision_feature_layer
        chosen = [states[layer] for layer in (layers if isinstance(layers, list) else [layers])]
        if self.config.vision_feature_select_strategy == "default":
            chosen = [state[:, num_extra_tokens(self.config.vision_config) :] for state in chosen]
        return torch.cat(chosen, dim=-1)

    def get_image_features(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        """Project images.

        Args:
            pixel_values: pixels [N, 3, H, W], or tower features [N, P, Dv] that were computed before.

        Returns:
            An output whose `pooler_output` is a list of N tensors [P, D].
        """
        features = pixel_values if pixel_values.dim() == 3 else self.tower_features(pixel_values)
        weight = next(self.multi_modal_projector.parameters(), None)
        if weight is not None:
            features = features.to(weight.device, weight.dtype)
        projected = self.multi_modal_projector(features)
        # transformers keeps one tensor an image here, though its own annotation says one tensor.
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=cast(Any, list(projected)))


class LlavaMedForConditionalGeneration(LlavaForConditionalGeneration):
    """`LlavaMedModel` with a language-model head."""

    config_class = LlavaMedConfig

    def __init__(self, config: LlavaMedConfig) -> None:
        super(LlavaForConditionalGeneration, self).__init__(config)
        self.model = LlavaMedModel(config)
        text: Any = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    def tower_features(self, pixel_values: Tensor) -> Tensor:
        """See `LlavaMedModel.tower_features`."""
        return cast(LlavaMedModel, self.model).tower_features(pixel_values)


for auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText):
    auto_class.register(LlavaMedConfig, LlavaMedForConditionalGeneration, exist_ok=True)
