"""Compute deltas: a target minus its base gives a delta, a base plus a delta gives the target.

    base + delta --apply--> target        target - base --make--> delta

Tensors are read one by one from memory-mapped shards and written to new shards, so only a few are in memory.
Everything that headers show is checked before the first tensor is read; a folder appears only when complete.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from llava.errors import CheckpointError
from llava.model.checkpoint.files.shard_writer import DEFAULT_SHARD_BYTES, ShardWriter
from llava.model.checkpoint.files.shards import TensorEntry, TensorReader, open_tensors
from llava.model.checkpoint.folder import check_links, copy_companions
from llava.model.checkpoint.formats import read_json
from llava.model.checkpoint.weight_names import (
    EMBEDDINGS,
    HEAD,
    HF_PREFIXES,
    LANGUAGE_MODEL,
    LEGACY_PREFIXES,
    is_buffer,
    renamed_prefix,
)
from llava.utils.folders import new_folder
from llava.utils.log import with_progress
from llava.utils.provenance import TensorHash

HEAD_WEIGHT = HEAD + "weight"
GROWN = (EMBEDDINGS, HEAD_WEIGHT)
"""Tables that may be larger than the base's: rows of new tokens are stored unchanged."""

EXTRA_PREFIXES = (
    *("model.mm_projector", "model.vision_tower", "model.image_newline", "model.vision_resampler"),
    *("model.multi_modal_projector", "multi_modal_projector", "vision_tower", "image_newline"),
)
"""Tensors that a language model lacks, in the original format and in later ones; stored unchanged."""

FLOATING = ("float16", "bfloat16", "float32", "float64")


def common_names(names: Iterable[str]) -> dict[str, str]:
    """Return the names of a checkpoint's tensors by our names, without computed tables."""
    kept = [name for name in names if not is_buffer(name)]
    prefixes = HF_PREFIXES if any("language_model." in name for name in kept) else LEGACY_PREFIXES
    return {renamed_prefix(name, prefixes) or name: name for name in kept}


def partners(own: Mapping[str, TensorEntry], base: Mapping[str, TensorEntry], what: str) -> dict[str, str | None]:
    """Return the base's tensor for every tensor of a model or delta; None for one stored unchanged.

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
                f"{what} holds {name!r}, which neither the base nor an image model's parts have "
                f"({', '.join(EXTRA_PREFIXES[:4])}); expected the base it was made from"
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
            "a file is missing, or it was made from another base"
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
"""Record of what a delta was made from: fingerprint of the base, arithmetic, checksum of the result."""

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

Arithmetic = Callable[..., Tensor]
"""`torch.add` or `torch.sub`."""


@dataclass(frozen=True, slots=True)
class WriteOptions:
    """Format of the new folder.

    Attributes:
        dtype: dtype of the arithmetic and of the result; the original tools used float16.
        max_shard_bytes: size of the largest shard.
        safe: safetensors; False writes `.bin`.
    """

    dtype: torch.dtype = torch.float16
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    safe: bool = True


def fingerprint(base: TensorReader) -> str:
    """Return a hash of a base: of its vectors (norms) and the first rows of one matrix, in float16."""
    found = TensorHash()
    matrix = next((name for name in sorted(base.names) if name.endswith("q_proj.weight")), None)
    for name in sorted(base.names):
        if is_buffer(name) or not (len(base.entries[name].shape) == 1 or name == matrix):
            continue
        found.add(name, base.read(name)[:16].to(torch.float16))
    return found.value()


def combine(changed: Tensor, base: Tensor | None, arithmetic: Arithmetic, dtype: torch.dtype) -> Tensor:
    """Return `arithmetic(changed, base)` on the block that both have, and the rest of `changed` unchanged."""
    own = in_dtype(changed, dtype)
    if base is None:
        return own
    other = in_dtype(base, dtype)
    if own.shape == other.shape:
        return arithmetic(own, other)
    block = tuple(slice(0, size) for size in other.shape)
    result = own.clone()
    if own.dtype == other.dtype:
        arithmetic(own[block], other, out=result[block])  # avoids a second table in memory
    else:
        result[block] = arithmetic(own[block], other)
    return result


def in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor in another dtype; integer tensors are unchanged.

    Raises:
        CheckpointError: values exceed the dtype's range.
    """
    if tensor.dtype == dtype or not tensor.is_floating_point():
        return tensor
    result = tensor.to(dtype)
    if not torch.isfinite(result).all() and torch.isfinite(tensor).all():
        word = str(dtype).removeprefix("torch.")
        raise CheckpointError(
            f"weights up to {float(tensor.abs().max()):.3g} exceed the range of {word}; use --dtype bfloat16"
        )
    return result


def write_delta(base: Path, target: Path, delta: Path, writing: WriteOptions | None = None) -> dict[str, Any]:
    """Write `target - base` with the target's configuration and tokenizer.

    Returns:
        The record written to `llava_delta.json`.

    Raises:
        CheckpointError: a folder cannot be read, they do not fit, or `delta` holds files.
    """
    writing = writing or WriteOptions()
    check_links(target)
    checksum = TensorHash()
    with open_tensors(base) as old, open_tensors(target) as new, new_folder(delta) as folder:
        pairs = partners(new.entries, old.entries, str(target))
        with shard_writer(folder, writing) as writer:
            for name, partner in with_progress(pairs.items(), title="delta", unit="tensor", total=len(pairs)):
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


def write_target(
    base: Path, delta: Path, target: Path, writing: WriteOptions | None = None, *, verify: bool = False
) -> Literal["verified", "not verified", "unknown base"]:
    """Write `base + delta` with the delta's configuration and tokenizer.

    Args:
        base: language model that the delta was made from.
        delta: folder of the delta.
        target: new folder.
        writing: format of the new folder.
        verify: compare the result's checksum with the one recorded when the delta was made.

    Returns:
        Whether the result was verified; "unknown base" if the delta does not record what it was made from.

    Raises:
        CheckpointError: a folder cannot be read, they do not fit, or `target` holds files; nothing is written then.
    """
    writing = writing or WriteOptions()
    check_links(delta)
    record = read_record(delta)
    checksum = TensorHash() if verify else None
    with open_tensors(base) as old, open_tensors(delta) as new, new_folder(target) as folder:
        pairs = partners(new.entries, old.entries, str(delta))
        _check_base(base, old, record)
        with shard_writer(folder, writing) as writer:
            for name, partner in with_progress(pairs.items(), title="target", unit="tensor", total=len(pairs)):
                known = None if partner is None else old.read(partner)
                result = combine(new.read(name), known, torch.add, writing.dtype)
                writer.add(name, result)
                if checksum is not None:
                    checksum.add(name, result)
                del result  # frees it before the next one is computed
            if checksum is not None:
                _check_result(checksum, record, writing)
        copy_companions(delta, folder, dtype=writing.dtype)
    if not record:
        return "unknown base"
    return "verified" if verify else "not verified"


def read_record(delta: Path) -> dict[str, Any]:
    """Return `llava_delta.json`, or an empty table for deltas made by other tools.

    Raises:
        CheckpointError: the file is broken.
    """
    return read_json(delta / DELTA_FILE)


def _check_base(path: Path, base: TensorReader, record: Mapping[str, Any]) -> None:
    wanted = record.get("base_fingerprint")
    if wanted is not None and wanted != fingerprint(base):
        raise CheckpointError(
            f"{path} is not the model that this delta was made from (their fingerprints differ); "
            "LLaVA-Med's published deltas need LLaMA-1 7B in the transformers format"
        )


def _check_result(checksum: TensorHash, record: Mapping[str, Any], writing: WriteOptions) -> None:
    if "result_sha256" not in record:
        raise CheckpointError("the delta records no checksum of its result, so it cannot be verified; omit --verify")
    kept = record.get("dtype")
    if DTYPES.get(str(kept)) != writing.dtype:
        raise CheckpointError(f"the checksum is that of {kept} arithmetic; verify with --dtype {kept}")
    if record["result_sha256"] != checksum.value():
        raise CheckpointError(
            "the result differs from the one the delta was made for; a file is damaged, or the base is another"
        )


def shard_writer(folder: Path, writing: WriteOptions) -> ShardWriter:
    """Return the shard writer of a new folder."""
    return ShardWriter(folder, max_shard_bytes=writing.max_shard_bytes, safe=writing.safe)
