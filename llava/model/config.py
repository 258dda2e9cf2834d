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

    Attributes:
        projector_type: `linear`, `mlpKx_gelu`, `cluster` or `identity`.
        projector_kwargs: further settings of the projector, for types that have any.
        use_im_start_end: marker tokens stand around each image.
        marker_token_ids: ids of the two markers, where they are in use.
        image_aspect_ratio: image mode, how pictures become the tower's input.
        patch_merge_type: how the tiles of mode `anyres` are joined, see `image_grids.MERGE_TYPES`.
        image_grid_pinpoints: [width, height] in pixels that `anyres` chooses from.
        template: conversation template the model was trained with.
        placement: where images stand in a turn.
        head_bias: the language-model head has a bias (Phi and a few others).
        source: the layout that the model was converted from: its config.json and what ours cannot tell, see `legacy`.
    """

    model_type = "llava_med"

    projector_type: str = "mlp2x_gelu"
    projector_kwargs: dict[str, Any] | None = None
    use_im_start_end: bool = False
    marker_token_ids: list[int] | None = None
    image_aspect_ratio: str = "square"
    patch_merge_type: str = "flat"
    image_grid_pinpoints: list[list[int]] | None = None
    template: str = "vicuna_v1"
    placement: str = "front"
    head_bias: bool = False
    source: dict[str, Any] | None = None


AutoConfig.register(LlavaMedConfig.model_type, LlavaMedConfig, exist_ok=True)
