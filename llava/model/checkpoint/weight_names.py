"""Names of weights in the published formats, and ours. No import of torch or transformers.

legacy   model.layers.0...   model.mm_projector.0.weight            model.vision_tower.vision_tower.vision_model...
hf       language_model.model.layers.0...   multi_modal_projector.linear_1.weight   vision_tower.vision_model...
ours     model.language_model.layers.0...   model.multi_modal_projector.0.weight    model.vision_tower...
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from llava.errors import CheckpointError
from llava.model.projector_types import known_types, type_of

LANGUAGE_MODEL = "model.language_model."
PROJECTOR = "model.multi_modal_projector."
PROJECTOR_MODULE = "multi_modal_projector."
TOWER = "model.vision_tower."
HEAD = "lm_head."
EMBEDDINGS = "model.language_model.embed_tokens.weight"

NEWLINE = "image_newline"
"""The embedding after each row of patches; `model.image_newline` in our format and in the legacy one."""

MARKER_KEY = "marker_rows"
"""Key in our files for the rows of the marker tokens alone, [k, D]; their ids differ between vocabularies."""

LEGACY_PROJECTOR = "mm_projector."
"""The part of a name after this is the projector's own name, whatever the prefix."""

LEGACY_PROJECTOR_PREFIX = "model." + LEGACY_PROJECTOR
"""Prefix of the projector's weights in a whole model, and in files of a projector alone."""

LEGACY_TOWER = "model.vision_tower.vision_tower."
TIMM_TOWER = LEGACY_TOWER + "vit."
LEGACY_PREFIXES = {
    TIMM_TOWER: TOWER,
    LEGACY_TOWER + "vision_model.": TOWER,
    LEGACY_TOWER: TOWER,
    LEGACY_PROJECTOR_PREFIX: PROJECTOR,
    HEAD: HEAD,
    f"model.{NEWLINE}": f"model.{NEWLINE}",
    "model.": LANGUAGE_MODEL,
}
HF_PREFIXES = {
    "language_model.model.": LANGUAGE_MODEL,
    "language_model.lm_head.": HEAD,
    "model.language_model.": LANGUAGE_MODEL,
    "vision_tower.vision_model.": TOWER,
    "vision_tower.": TOWER,
    "model.vision_tower.vision_model.": TOWER,
    "model.vision_tower.": TOWER,
    "multi_modal_projector.linear_1.": PROJECTOR + "0.",
    "multi_modal_projector.linear_2.": PROJECTOR + "2.",
    "model.multi_modal_projector.linear_1.": PROJECTOR + "0.",
    "model.multi_modal_projector.linear_2.": PROJECTOR + "2.",
    HEAD: HEAD,
}
HF_ROOTS = ("language_model.", "multi_modal_projector.")
"""Beginnings of names, after `model.` where it is there, that only transformers' Llava uses; towers are named alike."""

BUFFERS = {
    "rotary": re.compile(r"(.*\.)?rotary_emb\.inv_freq"),
    "position_ids": re.compile(r"(.*\.)?position_ids"),
}
"""Tables in old files that are computed today and must not be loaded."""

PEFT_PREFIX = "base_model.model."
TOWER_ROOT = PEFT_PREFIX + "vision_tower.vision_model."
"""Prefix of a tower's own adapter; its root is the tower's wrapper (STLLaVA-Med)."""


def is_buffer(name: str) -> bool:
    """Return whether a tensor is computed and not loaded."""
    return any(pattern.fullmatch(name) for pattern in BUFFERS.values())


def renamed_prefix(name: str, prefixes: Mapping[str, str]) -> str | None:
    """Return a name with its prefix replaced by the first entry that matches, or None."""
    return next((new + name.removeprefix(old) for old, new in prefixes.items() if name.startswith(old)), None)


def without_peft(name: str) -> str:
    """Return a legacy name without peft's prefix.

    `base_model.model.model.X` is the legacy name `model.X`; a file may also have one more `model.` (LLaVA-Rad).
    """
    name = name.removeprefix(PEFT_PREFIX)
    return name.removeprefix("model.") if name.startswith("model.model.") else name


def projector_suffix(name: str) -> str | None:
    """Return a projector weight's own name (`0.weight`) in files of any version; None for other weights."""
    for marker in (LEGACY_PROJECTOR, "multi_modal_projector."):
        if marker in name:
            suffix = name.split(marker, 1)[1]
            return suffix.replace("linear_1.", "0.").replace("linear_2.", "2.")
    return None


def projector_type_of(suffixes: Collection[str], named: str | None = None) -> str:
    """Return a projector's type by the names of its weights; `named` is the type in the configuration.

    Raises:
        CheckpointError: no known projector has these weights.
    """
    found = type_of(suffixes, named)
    if found is None:
        some = ", ".join(sorted(suffixes)[:6])
        raise CheckpointError(f"no known projector has the weights {some}; known: {known_types()}")
    return found
