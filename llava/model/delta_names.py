"""Which tensor of a base belongs to which of a model or delta, by headers alone: no weight is touched.

Names are compared as this package writes them, so a base in the layout of a plain language model fits a model in any
layout: the originals', transformers' Llava, or ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from llava.errors import CheckpointError
from llava.model.checkpoint.files.shards import TensorEntry
from llava.model.checkpoint.weight_names import (
    EMBEDDINGS,
    HEAD,
    HF_PREFIXES,
    LANGUAGE_MODEL,
    LEGACY_PREFIXES,
    is_buffer,
    renamed,
)

HEAD_WEIGHT = HEAD + "weight"
GROWN = (EMBEDDINGS, HEAD_WEIGHT)
"""Tables that may be larger than the base's: rows of new words are stored as they are."""

EXTRA_PREFIXES = (
    *("model.mm_projector", "model.vision_tower", "model.image_newline", "model.vision_resampler"),
    *("model.multi_modal_projector", "multi_modal_projector", "vision_tower", "image_newline"),
)
"""Tensors that a language model lacks, in the originals' layout and in the later ones; stored as they are."""

FLOATING = ("float16", "bfloat16", "float32", "float64")


def common_names(names: Iterable[str]) -> dict[str, str]:
    """The names of a checkpoint by our name of the same tensor; tables that are computed are left out."""
    kept = [name for name in names if not is_buffer(name)]
    prefixes = HF_PREFIXES if any("language_model." in name for name in kept) else LEGACY_PREFIXES
    return {renamed(name, prefixes) or name: name for name in kept}


def partners(own: Mapping[str, TensorEntry], base: Mapping[str, TensorEntry], what: str) -> dict[str, str | None]:
    """The base's tensor for every tensor of a model or delta, in file order; None for one that is stored as it is.

    Args:
        own: tensors of the model or delta.
        base: tensors of the base.
        what: the model or delta, for messages.

    Raises:
        CheckpointError: a tensor belongs to neither, has another shape or is quantized, or is missing.
    """
    theirs, mine = common_names(base), common_names(own)
    if HEAD_WEIGHT not in theirs and EMBEDDINGS in theirs:
        theirs[HEAD_WEIGHT] = theirs[EMBEDDINGS]  # a language model without a head of its own uses its embeddings
    pairs: dict[str, str | None] = {}
    for common, name in mine.items():
        partner = theirs.get(common)
        is_extra = name.startswith(EXTRA_PREFIXES)
        if partner is None and not is_extra:
            raise CheckpointError(
                f"{what} holds {name!r}, which the base lacks and which is no part that images need "
                f"({', '.join(EXTRA_PREFIXES[:4])}); is this the base it was made from?"
            )
        if is_extra and partner is not None and base[partner].shape != own[name].shape:
            partner = None  # a base that is itself a LLaVA, with another projector
        if partner is not None:
            _check_pair(own[name], base[partner], what, may_grow=common in GROWN)
        pairs[name] = partner
    language = [common for common in theirs if common.startswith((LANGUAGE_MODEL, HEAD)) and common not in mine]
    missing = [theirs[common] for common in language if common != HEAD_WEIGHT or HEAD_WEIGHT in common_names(base)]
    if missing:
        raise CheckpointError(
            f"{what} lacks {len(missing)} tensors of the base, such as {missing[0]!r}; "
            "a file is missing, or the base is another"
        )
    return pairs


def _check_pair(own: TensorEntry, base: TensorEntry, what: str, *, may_grow: bool) -> None:
    for entry, owner in ((own, what), (base, "the base")):
        if entry.dtype not in FLOATING:
            raise CheckpointError(
                f"{entry.name}: {owner} has it as {entry.dtype}; deltas need plain floating-point weights"
            )
    if own.shape != base.shape and not (may_grow and _covers(own.shape, base.shape)):
        raise CheckpointError(
            f"{own.name}: {what} has shape {list(own.shape)}, the base {list(base.shape)}; "
            "the base is of another model size or family"
        )


def _covers(larger: tuple[int, ...], smaller: tuple[int, ...]) -> bool:
    return len(larger) == len(smaller) and all(own >= other for own, other in zip(larger, smaller, strict=True))
