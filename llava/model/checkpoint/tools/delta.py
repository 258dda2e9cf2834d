"""Weights as differences: a base and a delta give a target, a target and a base give a delta (llava-med.md 6).

    base + delta --apply--> target        target - base --make--> delta

Tensor by tensor from memory-mapped shards into new shards, so memory is that of a few tensors. Everything that can be
known from headers is checked before the first tensor is read; a folder appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from llava.errors import CheckpointError
from llava.model.checkpoint.files.shard_writer import DEFAULT_SHARD_BYTES, ShardWriter
from llava.model.checkpoint.files.shards import TensorEntry, TensorReader, open_tensors
from llava.model.checkpoint.folder import copy_companions, new_folder
from llava.model.checkpoint.formats import read_json
from llava.model.checkpoint.weight_names import (
    EMBEDDINGS,
    HEAD,
    HF_PREFIXES,
    LANGUAGE_MODEL,
    LEGACY_PREFIXES,
    is_buffer,
    renamed,
)
from llava.utils.log import progress

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


DELTA_FILE = "llava_delta.json"
"""What a delta was made from: fingerprint of the base, arithmetic, checksum of the result."""

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

Arithmetic = Callable[..., Tensor]
"""`torch.add` or `torch.sub`."""


@dataclass(frozen=True, slots=True)
class Writing:
    """How the new folder is written.

    Attributes:
        dtype: of the arithmetic and of the result; the originals used float16.
        max_shard_bytes: largest shard.
        safe: safetensors; False writes `.bin`.
    """

    dtype: torch.dtype = torch.float16
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    safe: bool = True


def fingerprint(base: TensorReader) -> str:
    """Identity of a base: a hash of its vectors (norms) and of the first rows of one matrix, in float16."""
    digest = hashlib.sha256()
    matrix = next((name for name in sorted(base.names) if name.endswith("q_proj.weight")), None)
    for name in sorted(base.names):
        if is_buffer(name) or not (len(base.entries[name].shape) == 1 or name == matrix):
            continue
        values = base.read(name)
        digest.update(name.encode())
        digest.update(values[:16].to(torch.float16).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def combine(changed: Tensor, base: Tensor | None, arithmetic: Arithmetic, dtype: torch.dtype) -> Tensor:
    """`arithmetic(changed, base)` on the block that both have; the rest of `changed` as it is."""
    own = in_dtype(changed, dtype)
    if base is None:
        return own
    other = in_dtype(base, dtype)
    if own.shape == other.shape:
        return arithmetic(own, other)
    block = tuple(slice(0, size) for size in other.shape)
    result = own.clone()
    if own.dtype == other.dtype:
        arithmetic(own[block], other, out=result[block])  # without a second table in memory
    else:
        result[block] = arithmetic(own[block], other)
    return result


def in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in another type; whole numbers stay what they are.

    Raises:
        CheckpointError: values are beyond the type.
    """
    if tensor.dtype == dtype or not tensor.is_floating_point():
        return tensor
    result = tensor.to(dtype)
    if not torch.isfinite(result).all() and torch.isfinite(tensor).all():
        word = str(dtype).removeprefix("torch.")
        raise CheckpointError(f"weights up to {float(tensor.abs().max()):.3g} are beyond {word}; use --dtype bfloat16")
    return result


class Checksum:
    """SHA-256 over tensors in the order they come: name and bytes."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor in."""
        self._digest.update(name.encode())
        self._digest.update(cast(Any, tensor.contiguous().view(-1).view(torch.uint8).numpy()))

    def value(self) -> str:
        """Hexadecimal digest."""
        return self._digest.hexdigest()


def make(base: Path, target: Path, delta: Path, writing: Writing | None = None) -> dict[str, Any]:
    """Write `target - base` with the target's configuration and tokenizer.

    Returns:
        What is kept in `llava_delta.json`.

    Raises:
        CheckpointError: a folder cannot be read, they do not fit, or `delta` holds files.
    """
    writing = writing or Writing()
    checksum = Checksum()
    with open_tensors(base) as old, open_tensors(target) as new, new_folder(delta) as folder:
        pairs = partners(new.entries, old.entries, str(target))
        with shard_writer(folder, writing) as writer:
            for name, partner in progress(pairs.items(), title="delta", unit="tensor", total=len(pairs)):
                known = None if partner is None else old.read(partner)
                difference = combine(new.read(name), known, torch.sub, writing.dtype)
                writer.add(name, difference)
                checksum.add(name, combine(difference, known, torch.add, writing.dtype))
        record = {
            "base_fingerprint": fingerprint(old),
            "dtype": str(writing.dtype).removeprefix("torch."),
            "result_sha256": checksum.value(),
        }
        copy_companions(target, folder, dtype=writing.dtype)
        (folder / DELTA_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


def apply(
    base: Path, delta: Path, target: Path, writing: Writing | None = None, *, verify: bool = False
) -> Literal["verified", "not verified", "unknown base"]:
    """Write `base + delta` with the delta's configuration and tokenizer.

    Args:
        base: language model that the delta was made from.
        delta: differences.
        target: new folder.
        writing: how it is written.
        verify: compare the result's checksum with the one kept when the delta was made.

    Returns:
        Whether the result is known to be right; "unknown base": the delta does not say what it was made from.

    Raises:
        CheckpointError: a folder cannot be read, they do not fit, or `target` holds files; nothing is written then.
    """
    writing = writing or Writing()
    record = read_record(delta)
    checksum = Checksum() if verify else None
    with open_tensors(base) as old, open_tensors(delta) as new, new_folder(target) as folder:
        pairs = partners(new.entries, old.entries, str(delta))
        _check_base(base, old, record)
        with shard_writer(folder, writing) as writer:
            for name, partner in progress(pairs.items(), title="target", unit="tensor", total=len(pairs)):
                known = None if partner is None else old.read(partner)
                result = combine(new.read(name), known, torch.add, writing.dtype)
                writer.add(name, result)
                if checksum is not None:
                    checksum.add(name, result)
                del result  # before the next one is there
            if checksum is not None:
                _check_result(checksum, record, writing)
        copy_companions(delta, folder, dtype=writing.dtype)
    if not record:
        return "unknown base"
    return "verified" if verify else "not verified"


def read_record(delta: Path) -> dict[str, Any]:
    """`llava_delta.json`, or an empty table for deltas of others.

    Raises:
        CheckpointError: the file is broken.
    """
    return read_json(delta / DELTA_FILE)


def _check_base(path: Path, base: TensorReader, record: Mapping[str, Any]) -> None:
    wanted = record.get("base_fingerprint")
    if wanted is not None and wanted != fingerprint(base):
        raise CheckpointError(
            f"{path} is not the model that this delta was made from (their fingerprints differ); "
            "LLaVA-Med's published deltas need LLaMA-1 7B in the transformers layout"
        )


def _check_result(checksum: Checksum, record: Mapping[str, Any], writing: Writing) -> None:
    if "result_sha256" not in record:
        raise CheckpointError("the delta keeps no checksum of its result, so it cannot be verified; leave --verify out")
    kept = record.get("dtype")
    if DTYPES.get(str(kept)) != writing.dtype:
        raise CheckpointError(f"the checksum is that of {kept} arithmetic; verify with --dtype {kept}")
    if record["result_sha256"] != checksum.value():
        raise CheckpointError("the result is not the one the delta was made for; a file is damaged or the base another")


def shard_writer(folder: Path, writing: Writing) -> ShardWriter:
    """The writer of a new folder."""
    return ShardWriter(folder, max_shard_bytes=writing.max_shard_bytes, safe=writing.safe)
