"""Reasons why a legacy checkpoint cannot be loaded as trained, from settings and headers alone.

The loader rejects what the doctor reports: both call these functions. Neither torch nor transformers is needed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from llava.errors import CheckpointError
from llava.imaging.anyres import MERGE_TYPES
from llava.model.checkpoint.formats import CONFIG_FILE, Checkpoint, read_json
from llava.model.checkpoint.legacy_keys import PUBLISHED_TOWERS, TEXT_TYPES, merge_type
from llava.model.checkpoint.weight_names import LEGACY_TOWER, NEWLINE

SELECT_STRATEGIES = {"patch": "default", "cls_patch": "full"}
"""transformers' name for each value of `mm_vision_select_feature`."""

MLP = re.compile(r"mlp(\d+)x_gelu")


def legacy_refusals(checkpoint: Checkpoint) -> Iterator[str]:
    """Yield the reasons why a legacy checkpoint cannot be read."""
    config = checkpoint.config
    if checkpoint.text_type not in TEXT_TYPES:
        yield f"a legacy checkpoint around {checkpoint.text_type}; only {' and '.join(TEXT_TYPES)} can be read"
    merge, has_newline = merge_type(config), any(NEWLINE in name for name in (*checkpoint.tensors, *checkpoint.extra))
    if merge not in MERGE_TYPES:
        yield f"mm_patch_merge_type {merge!r} is not supported; expected {', '.join(MERGE_TYPES)}"
    elif merge != "spatial_unpad" and has_newline:
        yield f"it holds {NEWLINE}, but mm_patch_merge_type is {merge!r}; expected spatial_unpad"
    if config.get("s2"):
        yield "the multi-scale tower (s2) is not supported"
    if config.get("mm_resampler_type"):
        yield f"mm_resampler_type {config['mm_resampler_type']!r} is not supported"
    feature = config.get("mm_vision_select_feature") or "patch"
    if feature not in SELECT_STRATEGIES:
        yield f"unknown mm_vision_select_feature {feature!r}; known: {', '.join(SELECT_STRATEGIES)}"
    yield from _layer_refusals(checkpoint)
    yield from _projector_refusals(checkpoint)


def _layer_refusals(checkpoint: Checkpoint) -> Iterator[str]:
    layer, num_layers = checkpoint.config.get("mm_vision_select_layer", -1), num_tower_layers(checkpoint)
    if num_layers is not None:
        yield from layer_refusals(layer, num_layers)


def layer_refusals(layer: int, num_layers: int) -> Iterator[str]:
    """Yield why a tower of this many layers lacks a hidden state; that before the first layer counts."""
    if not -num_layers - 1 <= layer <= num_layers:
        yield (
            f"mm_vision_select_layer is {layer}; the tower has {num_layers} layers, so expected {-num_layers - 1} to "
            f"{num_layers}"
        )


def _projector_refusals(checkpoint: Checkpoint) -> Iterator[str]:
    """Yield why an MLP has fewer layers than its settings say: a part of its weights is missing."""
    try:
        by_weights = MLP.fullmatch(checkpoint.projector_type or "")
    except CheckpointError as error:
        yield str(error)
        return
    written = MLP.fullmatch(str(checkpoint.config.get("mm_projector_type")))
    if written and by_weights and int(by_weights[1]) < int(written[1]):
        yield f"mm_projector_type is {written[0]!r}, but the weights are those of {by_weights[0]!r}; some are missing"


def num_tower_layers(checkpoint: Checkpoint) -> int | None:
    """Return the layers of a legacy checkpoint's vision tower, if its weights, folder or name show them."""
    pattern = re.compile(re.escape(LEGACY_TOWER) + r"(?:vision_model\.encoder\.layers|vit\.blocks)\.(\d+)\.")
    inside = [int(found[1]) for name in checkpoint.tensors if (found := pattern.match(name))]
    if inside:
        return 1 + max(inside)
    name = checkpoint.config.get("mm_vision_tower")
    if not name or checkpoint.config.get("mm_vision_tower_checkpoint"):
        return None
    for place in (Path(name).expanduser(), checkpoint.folder / name):
        if place.is_dir():
            config = read_json(place / CONFIG_FILE)
            found_there = (config.get("vision_config") or config).get("num_hidden_layers")
            return found_there if isinstance(found_there, int) else None
    known = PUBLISHED_TOWERS.get(name)
    return None if known is None else int(known["num_hidden_layers"])
