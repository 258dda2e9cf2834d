"""The model: transformers' Llava with our projectors, also on cached tower features.

    pixels [N, 3, H, W] --tower--> [N, P, Dv] --projector--> [N, P, D] --scatter over placeholders--> language model
                                                                        (tiles and images of any shape: `anyres`)

Scatter, caching, attention back ends, checkpointing and sharding plans are inherited; `forward` is not overridden.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import nullcontext
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlavaForConditionalGeneration,
    LlavaModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from llava.imaging.anyres import KEEP, Size
from llava.model.anyres import grid_of, merge_tiles, needs_newline, new_newline, project_kept
from llava.model.config import LlavaMedConfig
from llava.model.multimodal_encoder.towers import num_extra_tokens, square_side
from llava.model.multimodal_projector import build_projector
from llava.model.quantization import quantized_layers
from llava.model.rope import forget_lengths
from llava.model.tower_steps import states_in_steps


def is_frozen(module: nn.Module) -> bool:
    """Return whether none of the module's weights trains."""
    return not any(parameter.requires_grad for parameter in module.parameters())


class LlavaMedModel(LlavaModel):
    """Tower, projector and language model without its head."""

    config_class = LlavaMedConfig

    def __init__(self, config: LlavaMedConfig) -> None:
        super().__init__(config)
        self.multi_modal_projector: nn.Module = build_projector(config)  # type: ignore[assignment]
        text: Any = config.text_config
        self.image_newline = nn.Parameter(new_newline(text.hidden_size)) if needs_newline(config) else None
        forget_lengths(cast(nn.Module, self.language_model))
        self.post_init()  # type: ignore[no-untyped-call]

    def tower_features(self, pixel_values: Tensor) -> Tensor:
        """Return features [N, P, Dv] of the selected layers for pixels [N, 3, H, W]; no graph if frozen."""
        tower = cast(nn.Module, self.vision_tower)
        pixels, options = self._tower_inputs(pixel_values)
        with torch.no_grad() if is_frozen(tower) else nullcontext():
            states = tower(pixels, output_hidden_states=True, return_dict=True, **options).hidden_states
        return self._selected(states)

    def tower_features_in_steps(self, pixel_values: Tensor) -> Generator[None, None, Tensor]:
        """Return what `tower_features` does, equal bit for bit; yield after every layer of the tower."""
        pixels, options = self._tower_inputs(pixel_values)
        return self._selected((yield from states_in_steps(cast(nn.Module, self.vision_tower), pixels, **options)))

    def _tower_inputs(self, pixel_values: Tensor) -> tuple[Tensor, dict[str, bool]]:
        """Return pixels as the tower's weights are, and its options for their size."""
        parameter = next(cast(nn.Module, self.vision_tower).parameters())
        pixels = pixel_values.to(parameter.device, parameter.dtype)
        config: Any = self.config.vision_config
        # DINOv2 always interpolates its position table to the input; the others only on request.
        is_other_size = {*pixels.shape[-2:]} != {square_side(config.image_size)} and not config.model_type.startswith(
            "dinov2"
        )
        return pixels, {"interpolate_pos_encoding": True} if is_other_size else {}

    def _selected(self, states: tuple[Tensor, ...]) -> Tensor:
        """Return the features [N, P, Dv] of the selected layers."""
        layers = self.config.vision_feature_layer
        chosen = [states[layer] for layer in (layers if isinstance(layers, list) else [layers])]
        if self.config.vision_feature_select_strategy == "default":
            chosen = [state[:, num_extra_tokens(self.config.vision_config) :] for state in chosen]
        return torch.cat(chosen, dim=-1)

    def get_image_features(
        self, pixel_values: Tensor, image_sizes: Tensor | None = None, **_: Any
    ) -> BaseModelOutputWithPooling:
        """Project images.

        Args:
            pixel_values: pixels [N, 3, H, W], or cached tower features [N, P, Dv]; with `image_sizes`, tiles or padded
                images, see `data.image_batch.ImageBatch`.
            image_sizes: [N, 2] width and height of the images, where their inputs have no common shape.

        Returns:
            An output whose `pooler_output` is a list of N tensors [P, D]; with `image_sizes`, each of its own length.
        """
        if image_sizes is not None:
            return self._features_of_any_shape(pixel_values, [(w, h) for w, h in image_sizes.tolist()])
        features = pixel_values if pixel_values.dim() == 3 else self.tower_features(pixel_values)
        features, projected = self._projected(features)
        # transformers keeps one tensor per image here, though its own annotation says one tensor.
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=cast(Any, list(projected)))

    def _projected(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return tower features [N, P, Dv] in the projector's dtype, and their projection [N, P, D]."""
        weight = next(self.multi_modal_projector.parameters(), None)
        if weight is not None:
            features = features.to(weight.device, weight.dtype)
        return features, self.multi_modal_projector(features)

    def _features_of_any_shape(self, pixels: Tensor, sizes: list[Size]) -> BaseModelOutputWithPooling:
        if self.config.image_aspect_ratio == KEEP:
            both, found = project_kept(pixels, sizes, lambda part: self._projected(self.tower_features(part))[1])
            return BaseModelOutputWithPooling(last_hidden_state=cast(Any, both), pooler_output=cast(Any, found))
        grid = grid_of(self.config, pixels.shape[-1])
        features, projected = self._projected(self.tower_features(pixels))
        merged = merge_tiles(projected, sizes, grid, self.image_newline)
        return BaseModelOutputWithPooling(last_hidden_state=cast(Any, features), pooler_output=cast(Any, merged))


class LlavaMedForConditionalGeneration(LlavaForConditionalGeneration):
    """`LlavaMedModel` with a language-model head."""

    config_class = LlavaMedConfig

    def __init__(self, config: LlavaMedConfig) -> None:
        super(LlavaForConditionalGeneration, self).__init__(config)
        self.model = LlavaMedModel(config)
        text: Any = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=config.head_bias)
        # Some language models name the input table differently (GPT-2: wte).
        table = self.model.get_input_embeddings()
        name = next(name for name, module in self.named_modules() if module is table)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        self.post_init()  # type: ignore[no-untyped-call]

    def train(self, mode: bool = True) -> Self:
        """Switch between training and evaluation, with two exceptions.

        A frozen tower stays in evaluation mode, so its features are the same in training, in a cache and in evaluation.
        Quantized layers under an adapter stay in training mode: on the CPU, evaluating a 4-bit layer once turns it
        permanently into a form without gradients. They hold no dropout, so their results are the same in both modes.
        """
        super().train(mode)
        tower = cast(nn.Module, self.model.vision_tower)
        if is_frozen(tower):
            tower.eval()
        if any("lora_" in name for name, _ in self.named_parameters()):
            for layer in quantized_layers(self):
                layer.training = True
        return self

    def tower_features(self, pixel_values: Tensor) -> Tensor:
        """See `LlavaMedModel.tower_features`."""
        return cast(LlavaMedModel, self.model).tower_features(pixel_values)

    def tower_features_in_steps(self, pixel_values: Tensor) -> Generator[None, None, Tensor]:
        """See `LlavaMedModel.tower_features_in_steps`."""
        return cast(LlavaMedModel, self.model).tower_features_in_steps(pixel_values)


AutoModel.register(LlavaMedConfig, LlavaMedModel, exist_ok=True)
for auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText):
    auto_class.register(LlavaMedConfig, LlavaMedForConditionalGeneration, exist_ok=True)
