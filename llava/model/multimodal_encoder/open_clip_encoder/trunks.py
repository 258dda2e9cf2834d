"""Transformers configurations and weight names of the vision trunks that open_clip takes from timm.

open_clip model configuration (JSON) --timm name--> Trunk --> Dinov2Config (with layer scale) | ViTConfig (without)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Dinov2Config, ViTConfig
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from llava.errors import CheckpointError, ConfigError
from llava.imaging.image_processor import OpenClipImageProcessorPil

NORM_EPS = 1e-6
"""Epsilon of every layer norm in timm's vision transformers."""


@dataclass(frozen=True, slots=True)
class Trunk:
    """Sizes of a timm vision transformer with class token, learned positions, biases and GELU.

    Attributes:
        patch: pixels per side of a patch.
        width: channels.
        num_layers: blocks.
        num_heads: attention heads.
        layer_scale: blocks scale their residual branches (DINOv2).
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
`vit_base_patch16_224`, and the last one is the small trunk with which the published code was recorded."""


def trunk_config(model_config: dict[str, Any]) -> Dinov2Config | ViTConfig:
    """Return the transformers configuration of an open_clip model configuration's vision trunk.

    Raises:
        CheckpointError: it describes no timm trunk, or no input size.
        ConfigError: the trunk is unknown.
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


def open_clip_image_processor(model_config: dict[str, Any], preprocess: dict[str, Any]) -> OpenClipImageProcessorPil:
    """Return the image processor that computes open_clip's evaluation transform of a model.

    Args:
        model_config: gives the input size.
        preprocess: `preprocess_cfg` of a hub configuration (mean, std, size); empty for the defaults.

    Raises:
        ConfigError: the transform resizes images in another way.
    """
    way = (preprocess.get("resize_mode") or "shortest", preprocess.get("interpolation") or "bicubic")
    if way != ("shortest", "bicubic"):
        raise ConfigError(f"the tower resizes images by {way}; expected ('shortest', 'bicubic')")
    given = preprocess.get("size") or model_config["vision_cfg"]["image_size"]
    size = int(given if isinstance(given, int) else given[0])
    return OpenClipImageProcessorPil(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=list(preprocess.get("mean") or OPENAI_CLIP_MEAN),
        image_std=list(preprocess.get("std") or OPENAI_CLIP_STD),
    )


TRUNK_PREFIX = "visual.trunk."

_EMBEDDINGS = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}

_DINOV2_BLOCK = {
    "norm1": "norm1",
    "attn.qkv": "attention.{}_proj",
    "attn.proj": "attention.o_proj",
    "ls1": "layer_scale1",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "ls2": "layer_scale2",
}

_VIT_BLOCK = {
    "norm1": "layernorm_before",
    "attn.qkv": "attention.{}_proj",
    "attn.proj": "attention.o_proj",
    "norm2": "layernorm_after",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}

BLOCKS: dict[str, tuple[str, dict[str, str]]] = {
    "dinov2": ("encoder.layer", _DINOV2_BLOCK),
    "vit": ("layers", _VIT_BLOCK),
}
"""By transformers model type: the name of the list of blocks, and the parts of a block."""


def name_pairs(model_type: str, num_layers: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield every timm name (without prefix) with its transformers name, or three for a fused `qkv`."""
    for timm, name in _EMBEDDINGS.items():
        yield timm, (name,)
    blocks, parts = BLOCKS[model_type]
    for layer in range(num_layers):
        for timm, name in parts.items():
            if timm.startswith("ls"):
                yield f"blocks.{layer}.{timm}.gamma", (f"{blocks}.{layer}.{name}.lambda1",)
                continue
            for kind in ("weight", "bias"):
                names = [name.format(letter) for letter in "qkv"] if "{}" in name else [name]
                yield f"blocks.{layer}.{timm}.{kind}", tuple(f"{blocks}.{layer}.{each}.{kind}" for each in names)


def to_transformers(trunk: Mapping[str, Tensor], model_type: str, num_layers: int) -> dict[str, Tensor]:
    """Return a trunk's weights under transformers' names; unknown names are kept for the loading report.

    Args:
        trunk: weights under timm's names, without prefix.
        model_type: `dinov2` or `vit`.
        num_layers: number of blocks.
    """
    left = dict(trunk)
    found: dict[str, Tensor] = {}
    for timm, names in name_pairs(model_type, num_layers):
        if timm in left:
            found.update(zip(names, left.pop(timm).chunk(len(names)), strict=True))
    return {**found, **left}


def to_open_clip(state: Mapping[str, Tensor], model_type: str, num_layers: int) -> dict[str, Tensor]:
    """Return a transformers tower's weights under `visual.trunk.*`, without what open_clip lacks."""
    return {
        TRUNK_PREFIX + timm: torch.cat([state[name] for name in names]) if len(names) > 1 else state[names[0]]
        for timm, names in name_pairs(model_type, num_layers)
    }
