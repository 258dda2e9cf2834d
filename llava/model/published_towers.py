"""Settings of the towers that published checkpoints name: one that holds its tower's weights needs nothing fetched."""

from __future__ import annotations

from typing import Any

_LARGE = {
    **{"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    **{"patch_size": 14, "projection_dim": 768, "hidden_act": "quick_gelu"},
}
PUBLISHED_TOWERS: dict[str, dict[str, Any]] = {
    "openai/clip-vit-large-patch14": {**_LARGE, "image_size": 224},
    "openai/clip-vit-large-patch14-336": {**_LARGE, "image_size": 336},
}
