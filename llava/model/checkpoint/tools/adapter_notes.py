"""Adapter notes of `llava checkpoint doctor`: rank, scale, layers, replaced weights, base.

adapter_config.json, headers --adapter_notes--> sentences
headers of the base --base_problems--> a layer that does not fit
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from llava.errors import CheckpointError
from llava.model.checkpoint.formats import Checkpoint, our_name
from llava.model.checkpoint.peft_files import PAIRS, AdaptedLayer, read_hf_adapter, setting_of
from llava.model.checkpoint.weight_names import TOWER

BASE_KINDS = ("hf_llava", "model")


def adapter_notes(checkpoint: Checkpoint) -> Iterator[str]:
    """Yield sentences about an adapter of transformers' Llava, as plain peft writes it."""
    config, content = checkpoint.adapter, read_hf_adapter(checkpoint)
    scales = Counter(_scale_text(checkpoint, layer) for layer in content.layers.values())
    kinds = [word for key, word in (("use_rslora", "rsLoRA"), ("use_dora", "DoRA")) if config.get(key)]
    for text, count in scales.items():
        yield f"{' and '.join(kinds) or 'LoRA'}, {text}, on {count} layers"
    parts = Counter(_part_of(name) for name in content.layers)
    ends = Counter(name.rpartition(".")[2] for name in content.layers)
    if parts:
        where = ", ".join(f"{count} of the {part}" for part, count in sorted(parts.items()))
        yield f"it adapts {where}: {', '.join(f'{name} {count}' for name, count in sorted(ends.items()))}"
    if content.replaced:
        names = sorted(content.replaced)
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        yield f"it replaces {len(names)} weights of the base: {', '.join(names[:4])}{more}"


def _scale_text(checkpoint: Checkpoint, layer: AdaptedLayer) -> str:
    r = setting_of(checkpoint.adapter, "r", "rank_pattern", layer.base_name)
    alpha = setting_of(checkpoint.adapter, "lora_alpha", "alpha_pattern", layer.base_name)
    if not isinstance(r, int) or r < 1 or not isinstance(alpha, int | float):
        return f"r {r!r}, lora_alpha {alpha!r}"
    scale = alpha / (math.sqrt(r) if checkpoint.adapter.get("use_rslora") else r)
    return f"r {r}, lora_alpha {alpha:g}, so its update is multiplied by {scale:g}"


def _part_of(name: str) -> str:
    if name.startswith(TOWER):
        return "vision tower"
    return "projector" if "multi_modal_projector" in name else "language model"


def base_problems(checkpoint: Checkpoint) -> Iterator[str]:
    """Yield each mismatch between an adapter and its base, if that is a local folder; reads headers only."""
    base = Path(str(checkpoint.adapter.get("base_model_name_or_path") or ""))
    if base == Path() or not base.is_dir():
        return
    try:
        below = Checkpoint.open(base)
    except CheckpointError as error:
        yield f"its base cannot be read: {error}"
        return
    if below.kind not in BASE_KINDS:
        return
    shapes = {our_name(below, name): entry.shape for name, entry in below.tensors.items()}
    # Some towers have one more part in their names.
    shapes |= {name.replace(f"{TOWER}vision_model.", TOWER, 1): shape for name, shape in shapes.items() if name}
    for name, layer in read_hf_adapter(checkpoint).layers.items():
        wanted = _shape(checkpoint, layer)
        found = shapes.get(f"{name}.weight")
        if wanted is not None and found not in (wanted, wanted[::-1]):
            yield f"it does not fit its base {base.name}: {name} is {wanted} here, {found or 'absent'} there"
            return


def _shape(checkpoint: Checkpoint, layer: AdaptedLayer) -> tuple[int, int] | None:
    """Return the shape of the weight that two matrices add to, or None if one is missing."""
    pair = next((pair for pair in PAIRS if {*pair} <= layer.parts.keys()), None)
    if pair is None:
        return None
    down, up = (checkpoint.tensors[layer.parts[part]].shape for part in pair)
    return (up[0], down[-1]) if len(up) == len(down) == 2 else None
