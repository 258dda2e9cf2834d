"""Projectors: tower features [N, P, Dv] to language-model inputs [N, P, D]; the number of tokens never changes."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from llava.errors import ConfigError
from llava.model.cluster_projector import cluster_projector
from llava.model.config import LlavaMedConfig
from llava.utils.lookup import lookup


def _widths(config: LlavaMedConfig) -> tuple[int, int]:
    """Width of one tower feature and of one language-model input."""
    layers = config.vision_feature_layer
    num_layers = len(layers) if isinstance(layers, list) else 1
    vision: Any = config.vision_config
    text: Any = config.text_config
    return num_layers * vision.hidden_size, text.hidden_size


def linear(config: LlavaMedConfig) -> nn.Module:
    """One linear layer (LLaVA-Med 1.0)."""
    return nn.Linear(*_widths(config))


def mlp_gelu(config: LlavaMedConfig) -> nn.Module:
    """`mlpKx_gelu`: K linear layers with GELU between them (LLaVA 1.5)."""
    depth = int(re.sub(r"\D", "", config.projector_type))
    vision, text = _widths(config)
    widths = [vision] + [text] * depth
    layers: list[nn.Module] = []
    for inner, outer in pairwise(widths):
        layers += [nn.GELU(), nn.Linear(inner, outer)]
    return nn.Sequential(*layers[1:])


class Identity(nn.Module):
    """Tower features as they are; tower and language model must be equally wide."""

    def forward(self, features: Tensor) -> Tensor:
        """Return `features` [N, P, D] unchanged."""
        return features


def identity(config: LlavaMedConfig) -> nn.Module:
    """No projector at all."""
    vision, text = _widths(config)
    if vision != text:
        raise ConfigError(f"projector 'identity' needs equal widths, got tower {vision} and language model {text}")
    return Identity()


def cluster(config: LlavaMedConfig) -> nn.Module:
    """Prototype extractor and MLP (STLLaVA-Med)."""
    return cluster_projector(*_widths(config), config.projector_kwargs)


PROJECTORS: dict[str, Callable[[LlavaMedConfig], nn.Module]] = {
    "linear": linear,
    "mlpKx_gelu": mlp_gelu,
    "identity": identity,
    "cluster": cluster,
}


def check_projector_type(projector_type: str) -> Callable[[LlavaMedConfig], nn.Module]:
    """The builder of a projector type.

    Raises:
        ConfigError: the type is unknown.
    """
    name = re.sub(r"^mlp[1-9]\d*x_gelu$", "mlpKx_gelu", projector_type)
    if name == "mlpKx_gelu" == projector_type:
        raise ConfigError("projector type 'mlpKx_gelu' needs its number of layers, for example mlp2x_gelu")
    return lookup(PROJECTORS, name, "projector type")


def build_projector(config: LlavaMedConfig) -> nn.Module:
    """The projector that `config.projector_type` names.

    Raises:
        ConfigError: the type is unknown or does not fit the widths.
    """
    return check_projector_type(config.projector_type)(config)
