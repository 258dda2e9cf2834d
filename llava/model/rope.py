"""Rotary embeddings whose frequencies depend on a batch's longest sequence (longrope, dynamic NTK).

transformers chooses the frequencies of a forward pass by its largest position. Up to the original context they are
those of a short sequence; a longer sequence would change them for all its neighbors, so it is computed alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

LONG = "longrope"
DYNAMIC = "dynamic"

CACHED = "max_seq_len_cached"
"""Attribute of a dynamic rotary module with the longest sequence so far, whose frequencies it keeps."""


@dataclass(frozen=True, slots=True)
class SharedContext:
    """Length up to which sequences do not change the rotary frequencies of others in their batch.

    Attributes:
        length: number of tokens.
        switches: whether all positions of a sequence beyond it use a second set of frequencies, so that keys cached
            before must be computed again.
    """

    length: int
    switches: bool


def shared_context(config: Any) -> SharedContext | None:
    """Return the length up to which sequences may share a batch; None if any may.

    Args:
        config: configuration of a model, or of its language model.
    """
    text = config.get_text_config()
    found = [
        SharedContext(int(group["original_max_position_embeddings"]), switches=True)
        if group["rope_type"] == LONG
        else SharedContext(int(text.max_position_embeddings), switches=False)
        for group in rope_groups(text)
        if group["rope_type"] == LONG or DYNAMIC in group["rope_type"]
    ]
    return min(found, key=lambda context: context.length, default=None)


def rope_groups(text: Any) -> list[dict[str, Any]]:
    """Return the rotary parameters of a text configuration: one group, or one for each kind of layer."""
    parameters = getattr(text, "rope_parameters", None) or {}
    groups = [parameters] if "rope_type" in parameters else list(parameters.values())
    return [group for group in groups if isinstance(group, dict) and isinstance(group.get("rope_type"), str)]


def forget_lengths(model: nn.Module) -> None:
    """Let each forward pass of dynamic rotary modules start with the frequencies of a short sequence."""
    # They keep the frequencies of the longest sequence so far, even for shorter ones beyond the original context.
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        named = kinds.values() if isinstance(kinds, Mapping) else [kinds]
        if hasattr(module, CACHED) and any(isinstance(kind, str) and DYNAMIC in kind for kind in named):
            module.register_forward_hook(_forget_length)


def _forget_length(module: Any, *_: Any) -> None:
    for name in [name for name in vars(module) if name.endswith(CACHED)]:
        if int(getattr(module, name)) == module.original_max_seq_len:
            continue
        prefix = name.removesuffix(CACHED)
        setattr(module, name, module.original_max_seq_len)
        if hasattr(module, f"{prefix}original_inv_freq"):
            original = getattr(module, f"{prefix}original_inv_freq")
            setattr(module, f"{prefix}inv_freq", original.to(getattr(module, f"{prefix}inv_freq").device).clone())
