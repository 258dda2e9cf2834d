"""Our name of every tensor in a checkpoint of any kind, so that the same weight has the same name in all of them.

model.mm_projector.0.weight                      (legacy, projector files)  --> model.multi_modal_projector.0.weight
base_model.model.model.layers.0...lora_A.weight  (legacy adapter)  --> base_model.model.model.language_model.layers.0...
base_model.model.vision_tower.vision_model...    (a tower's own)   --> base_model.model.model.vision_tower...
"""

from __future__ import annotations

from llava.model.checkpoint.formats import OURS, Layout
from llava.model.checkpoint.weight_names import (
    EMBEDDINGS,
    HF_PREFIXES,
    LANGUAGE_MODEL,
    LEGACY_PREFIXES,
    NEWLINE,
    PEFT_PREFIX,
    PROJECTOR,
    TIMM_TOWER,
    TOWER,
    TOWER_ROOT,
    projector_suffix,
    renamed,
    without_peft,
)

TABLE = "embed_tokens.weight"


def our_name(layout: Layout, name: str) -> str | None:
    """Our model's name of a tensor of the checkpoint (of an adapter: with peft's prefix); None where it is no part."""
    if layout.kind in ("model", "vision_tower"):
        return name
    if layout.kind == "hf_llava":
        return renamed(name, HF_PREFIXES)
    if "lora_" in name:
        return _in_adapter(layout, name)
    if suffix := projector_suffix(name):
        return PROJECTOR + suffix
    if layout.kind in OURS:
        return EMBEDDINGS if name == f"model.{TABLE}" else name.removeprefix(PEFT_PREFIX)
    return _in_legacy(layout, name)


def _in_adapter(layout: Layout, name: str) -> str | None:
    """One matrix of an adapter, of the language model's or of a tower's own."""
    if layout.kind == "adapter" or name.startswith(PEFT_PREFIX + LANGUAGE_MODEL):
        return name
    if name.startswith(TOWER_ROOT):
        return PEFT_PREFIX + TOWER + name.removeprefix(TOWER_ROOT)
    legacy = renamed(without_peft(name), LEGACY_PREFIXES)
    return None if legacy is None else PEFT_PREFIX + legacy


def _in_legacy(layout: Layout, name: str) -> str | None:
    if layout.kind == "legacy_projector":
        if name.endswith(TABLE):
            return EMBEDDINGS
        return f"model.{NEWLINE}" if name.endswith(NEWLINE) else None
    legacy = renamed(without_peft(name), LEGACY_PREFIXES)
    return f"{legacy} (as transformers' class splits it)" if name.startswith(TIMM_TOWER) else legacy
