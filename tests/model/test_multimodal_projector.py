"""Projectors: shapes, depth, and messages for unknown types."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig

from llava.errors import ConfigError
from llava.model.config import LlavaMedConfig
from llava.model.multimodal_projector import build_projector


def config(projector_type: str, *, vision: int = 8, text: int = 12, layer: int | list[int] = -2) -> LlavaMedConfig:
    return LlavaMedConfig(
        vision_config=CLIPVisionConfig(hidden_size=vision, num_attention_heads=1),
        text_config=LlamaConfig(hidden_size=text, num_attention_heads=1),
        projector_type=projector_type,
        vision_feature_layer=layer,
    )


@pytest.mark.parametrize(
    ("name", "num_linear"), [("linear", 1), ("mlp1x_gelu", 1), ("mlp2x_gelu", 2), ("mlp12x_gelu", 12)]
)
def test_maps_every_token_to_the_language_width(name: str, num_linear: int) -> None:
    projector = build_projector(config(name))
    assert projector(torch.zeros(2, 5, 8)).shape == (2, 5, 12)
    assert sum(isinstance(module, nn.Linear) for module in projector.modules()) == num_linear
    assert sum(isinstance(module, nn.GELU) for module in projector.modules()) == num_linear - 1


def test_the_published_names_of_the_two_layer_projector() -> None:
    assert set(build_projector(config("mlp2x_gelu")).state_dict()) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert set(build_projector(config("linear")).state_dict()) == {"weight", "bias"}


def test_several_layers_of_the_tower_widen_the_input() -> None:
    assert build_projector(config("linear", layer=[-2, -3]))(torch.zeros(1, 5, 16)).shape == (1, 5, 12)


def test_identity_needs_equal_widths() -> None:
    features = torch.rand(1, 3, 8)
    assert torch.equal(build_projector(config("identity", text=8))(features), features)
    with pytest.raises(ConfigError, match="tower 8 and language model 12"):
        build_projector(config("identity"))


@pytest.mark.parametrize(
    "name",
    [
        "mlp100x_gelu",
        "mlp999999x_gelu",
        "mlp٣x_gelu",
        "mlp0x_gelu",
        "mlpx_gelu",
        "mlpKx_gelu",
        "mlp2x_relu",
        "resampler",
        "",
    ],
)
def test_unknown_types_are_named(name: str) -> None:
    with pytest.raises(ConfigError, match="projector type"):
        build_projector(config(name))
