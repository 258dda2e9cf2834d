"""Configuration of the model: transformers' `LlavaConfig` plus our settings of a checkpoint."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, LlavaConfig


@strict
class LlavaMedConfig(LlavaConfig):
    """`LlavaConfig` with projector, markers, image mode, template and placement.

    The model type is our own: transformers uses `llava` itself, and LLaVA-Med 1.0 checkpoints use it for a flat,
    incompatible format.

    Attributes:
        projector_type: `linear`, `mlpKx_gelu`, `cluster`, `identity`, or the type of a plug-in.
        projector_kwargs: further settings of the projector, for types that have any.
        use_im_start_end: marker tokens surround each image.
        marker_token_ids: ids of the two markers, if they are used.
        image_aspect_ratio: image mode, which decides how images become the tower's input.
        patch_merge_type: how the tiles of mode `anyres` are joined, see `imaging.anyres.MERGE_TYPES`.
        image_grid_pinpoints: [width, height] in pixels that `anyres` chooses from.
        template: conversation template the model was trained with.
        placement: position of the images in a turn.
        head_bias: the language-model head has a bias (Phi and a few others).
        plugins: names of the plug-ins that the projector or the template comes from; they are never loaded from here.
        source: format that the model was converted from: its config.json and the settings that ours does not hold.
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
    plugins: list[str] | None = None
    source: dict[str, Any] | None = None


AutoConfig.register(LlavaMedConfig.model_type, LlavaMedConfig, exist_ok=True)
