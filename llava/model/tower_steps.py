"""A tower's pass in steps, one layer each, so that a server can continue running answers between them.

pixels [N, 3, H, W] --embeddings--> hidden states --layer--> hidden states --layer--> ...
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class _TowerParts:
    """Where a class of towers keeps its parts.

    Attributes:
        layers: path of the list of layers.
        norm: path of what follows the embeddings; "" for nothing.
    """

    layers: str
    norm: str = ""


_KNOWN_TOWERS = {
    "transformers.models.clip.modeling_clip.CLIPVisionModel": _TowerParts("encoder.layers", "pre_layrnorm"),
    "transformers.models.siglip.modeling_siglip.SiglipVisionModel": _TowerParts("encoder.layers"),
    "transformers.models.dinov2.modeling_dinov2.Dinov2Model": _TowerParts("encoder.layer"),
    "transformers.models.vit.modeling_vit.ViTModel": _TowerParts("layers"),
}
"""Towers whose layers take and return hidden states [N, P, D] only; others pass as a whole."""


def states_in_steps(tower: nn.Module, pixels: Tensor, **options: Any) -> Generator[None, None, tuple[Tensor, ...]]:
    """Return the hidden states of a tower, as `output_hidden_states=True` does; yield after every layer.

    Gradients are computed or not as the caller of the generator has set.

    Args:
        tower: a tower of transformers, without hooks of its own.
        pixels: [N, 3, H, W].
        options: options of its embeddings, such as `interpolate_pos_encoding`.
    """
    parts = _KNOWN_TOWERS.get(f"{type(tower).__module__}.{type(tower).__qualname__}")
    if parts is None:
        whole: tuple[Tensor, ...] = tower(pixels, output_hidden_states=True, return_dict=True, **options).hidden_states
        return whole
    state = attrgetter("embeddings")(tower)(pixels, **options)
    if parts.norm:
        state = attrgetter(parts.norm)(tower)(state)
    states = [state]
    for layer in attrgetter(parts.layers)(tower):
        states.append(layer(states[-1], attention_mask=None))
        yield
    return tuple(states)
