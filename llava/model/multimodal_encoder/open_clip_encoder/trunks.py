"""The vision trunks that open_clip takes from timm, as transformers configurations.

open_clip model configuration (JSON) --timm name--> Trunk --> Dinov2Config (with layer scale) | ViTConfig (without)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import Dinov2Config, ViTConfig
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from llava.errors import CheckpointError, ConfigError
from llava.image_processors import OpenClipImageProcessorPil

NORM_EPS = 1e-6
"""Of every layer norm in timm's vision transformers."""


@dataclass(frozen=True, slots=True)
class Trunk:
    """Sizes of a timm vision transformer with class token, learned positions, biases and GELU.

    Attributes:
        patch: pixels on a side of a patch.
        width: channels.
        num_layers: blocks.
        num_heads: attention heads.
        layer_scale: blocks scale what they add (DINOv2).
    """

    patch: int
    width: int
    num_layers: int
    num_heads: int
    layer_scale: bool


TRUNKS: dict[str, Trunk] = {
    "vit_small_patch14_dinov2": Trunk(14, 384, 12, 6, layer_scale=True),
    "vit_base_patch14_dinov2": Trunk(14, 768, 12, 12, layer_scale=True),
    "vit_large_patch14_dinov2": Trunk(14, 1024, 24, 16, layer_scale=True),
    "vit_small_patch16_224": Trunk(16, 384, 12, 6, layer_scale=False),
    "vit_base_patch16_224": Trunk(16, 768, 12, 12, layer_scale=False),
    "vit_large_patch16_224": Trunk(16, 1024, 24, 16, layer_scale=False),
    "vit_llavarad_oracle": Trunk(14, 32, 4, 4, layer_scale=False),
}
"""Known trunks by timm name without its `.tag`; BiomedCLIP-CXR is `vit_base_patch14_dinov2`, BiomedCLIP
`vit_base_patch16_224`, and the last one the small trunk with which the published code was recorded for comparison."""


def trunk_config(model_config: dict[str, Any]) -> Dinov2Config | ViTConfig:
    """The transformers configuration of an open_clip model configuration's vision trunk.

    Raises:
        CheckpointError: it describes no timm trunk, or no input size.
        ConfigError: the trunk is not known here.
    """
    vision = model_config.get("vision_cfg")
    if not isinstance(vision, dict) or not vision.get("timm_model_name"):
        raise CheckpointError(
            "an open_clip model configuration must name its trunk in vision_cfg.timm_model_name; "
            f"found keys {sorted(vision if isinstance(vision, dict) else model_config)}"
        )
    name = str(vision["timm_model_name"]).split(".", 1)[0]
    if name not in TRUNKS:
        raise ConfigError(f"unknown timm trunk {name!r}; known: {', '.join(sorted(TRUNKS))}")
    size = vision.get("image_size")
    if not isinstance(size, int) or size % TRUNKS[name].patch:
        raise CheckpointError(f"vision_cfg.image_size is {size!r}; expected a multiple of {TRUNKS[name].patch} pixels")
    return _config(TRUNKS[name], size)


def _config(trunk: Trunk, image_size: int) -> Dinov2Config | ViTConfig:
    shared: dict[str, Any] = {
        "hidden_size": trunk.width,
        "num_hidden_layers": trunk.num_layers,
        "num_attention_heads": trunk.num_heads,
        "layer_norm_eps": NORM_EPS,
        "image_size": image_size,
        "patch_size": trunk.patch,
        "hidden_act": "gelu",
        "qkv_bias": True,
    }
    if trunk.layer_scale:
        return Dinov2Config(**shared, mlp_ratio=4, layerscale_value=1e-5, use_mask_token=False)
    return ViTConfig(**shared, intermediate_size=4 * trunk.width)


def image_processor(model_config: dict[str, Any], preprocess: dict[str, Any]) -> OpenClipImageProcessorPil:
    """open_clip's evaluation transform of a model.

    Args:
        model_config: gives the input size.
        preprocess: `preprocess_cfg` of a hub configuration (mean, std, size); empty for the defaults.

    Raises:
        ConfigError: pictures are brought to size in another way.
    """
    way = (preprocess.get("resize_mode") or "shortest", preprocess.get("interpolation") or "bicubic")
    if way != ("shortest", "bicubic"):
        raise ConfigError(f"the tower resizes pictures by {way}; only ('shortest', 'bicubic') is known here")
    given = preprocess.get("size") or model_config["vision_cfg"]["image_size"]
    size = int(given if isinstance(given, int) else given[0])
    return OpenClipImageProcessorPil(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=list(preprocess.get("mean") or OPENAI_CLIP_MEAN),
        image_std=list(preprocess.get("std") or OPENAI_CLIP_STD),
    )
