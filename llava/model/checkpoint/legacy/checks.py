"""What keeps a checkpoint of the legacy layouts from loading as it was trained, by its settings and headers alone.

The loader refuses what the doctor names: both ask here. Neither torch nor transformers is needed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from llava.errors import CheckpointError
from llava.imaging.anyres import MERGE_TYPES
from llava.model.checkpoint.formats import CONFIG_FILE, Layout, read_json
from llava.model.checkpoint.legacy_keys import PUBLISHED_TOWERS, TEXT_TYPES, merge_type
from llava.model.checkpoint.weight_names import LEGACY_TOWER, NEWLINE

SELECT_STRATEGIES = {"patch": "default", "cls_patch": "full"}
"""`mm_vision_select_feature` in transformers' words."""

MLP = re.compile(r"mlp(\d+)x_gelu")


def refusals(layout: Layout) -> Iterator[str]:
    """Why a legacy checkpoint is not read; nothing where it is."""
    config = layout.config
    if layout.text_type not in TEXT_TYPES:
        yield f"a legacy checkpoint around {layout.text_type}; only {' and '.join(TEXT_TYPES)} can be read"
    merge, has_newline = merge_type(config), any(NEWLINE in name for name in (*layout.tensors, *layout.extra))
    if merge not in MERGE_TYPES:
        yield f"mm_patch_merge_type {merge!r} is not read; only {', '.join(MERGE_TYPES)} are"
    elif merge != "spatial_unpad" and has_newline:
        yield f"it holds {NEWLINE}, but mm_patch_merge_type is {merge!r}; expected spatial_unpad"
    if config.get("s2"):
        yield "the multi-scale tower (s2) is not read"
    if config.get("mm_resampler_type"):
        yield f"mm_resampler_type {config['mm_resampler_type']!r} is not read"
    feature = config.get("mm_vision_select_feature") or "patch"
    if feature not in SELECT_STRATEGIES:
        yield f"unknown mm_vision_select_feature {feature!r}; known: {', '.join(SELECT_STRATEGIES)}"
    yield from _layer_refusals(layout)
    yield from _projector_refusals(layout)


def _layer_refusals(layout: Layout) -> Iterator[str]:
    layer, num_layers = layout.config.get("mm_vision_select_layer", -1), num_tower_layers(layout)
    if num_layers is not None:
        yield from layer_refusals(layer, num_layers)


def layer_refusals(layer: int, num_layers: int) -> Iterator[str]:
    """Why a tower of so many layers has no such hidden state; the state before its first layer counts as one."""
    if not -num_layers - 1 <= layer <= num_layers:
        yield (
            f"mm_vision_select_layer is {layer}; the tower has {num_layers} layers, so expected {-num_layers - 1} to "
            f"{num_layers}"
        )


def _projector_refusals(layout: Layout) -> Iterator[str]:
    """An MLP that is less deep than its settings say: a part of its weights is not here."""
    try:
        by_weights = MLP.fullmatch(layout.projector_type or "")
    except CheckpointError as error:
        yield str(error)
        return
    written = MLP.fullmatch(str(layout.config.get("mm_projector_type")))
    if written and by_weights and int(by_weights[1]) < int(written[1]):
        yield f"mm_projector_type is {written[0]!r}, the weights are those of {by_weights[0]!r} only; some are missing"


def num_tower_layers(layout: Layout) -> int | None:
    """Layers of a legacy checkpoint's vision tower, where its weights, its folder or its name tell."""
    pattern = re.compile(re.escape(LEGACY_TOWER) + r"(?:vision_model\.encoder\.layers|vit\.blocks)\.(\d+)\.")
    inside = [int(found[1]) for name in layout.tensors if (found := pattern.match(name))]
    if inside:
        return 1 + max(inside)
    name = layout.config.get("mm_vision_tower")
    if not name or layout.config.get("mm_vision_tower_checkpoint"):
        return None
    for place in (Path(name).expanduser(), layout.folder / name):
        if place.is_dir():
            config = read_json(place / CONFIG_FILE)
            found_there = (config.get("vision_config") or config).get("num_hidden_layers")
            return found_there if isinstance(found_there, int) else None
    known = PUBLISHED_TOWERS.get(name)
    return None if known is None else int(known["num_hidden_layers"])
