"""Names of the trunk's weights: open_clip's (timm's, under `visual.trunk.`) and those of transformers' classes.

A rule pairs one timm name with one transformers name, or the fused `qkv` with three; `*` is the block number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

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
"""By transformers model type: the list of blocks, and the parts of one."""


def rules(model_type: str, num_layers: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every timm name (without prefix) with its one name, or three names for a fused `qkv`, in transformers."""
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
    """A trunk's weights under transformers' names; names that no rule knows are kept, so that loading reports them.

    Args:
        trunk: weights under timm's names, without prefix.
        model_type: `dinov2` or `vit`.
        num_layers: blocks.
    """
    left = dict(trunk)
    found: dict[str, Tensor] = {}
    for timm, names in rules(model_type, num_layers):
        if timm in left:
            found.update(zip(names, left.pop(timm).chunk(len(names)), strict=True))
    return {**found, **left}


def to_open_clip(state: Mapping[str, Tensor], model_type: str, num_layers: int) -> dict[str, Tensor]:
    """The inverse: a transformers tower's weights under `visual.trunk.*`; parts without a counterpart are left out."""
    return {
        TRUNK_PREFIX + timm: torch.cat([state[name] for name in names]) if len(names) > 1 else state[names[0]]
        for timm, names in rules(model_type, num_layers)
    }
