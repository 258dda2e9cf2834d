"""Merge adapters into the weights they were trained on, and write a whole model.

    base + adapter + non_lora_trainables.bin   --tensor by tensor-->   a whole model in the original format
    tower + its own adapter (Vit-lora)         -------------------->   vision_tower/ inside it, or alone

W + (alpha / r) * B @ A is computed in float32 and rounded once. Adapters of this package become models of this package.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from llava.errors import CheckpointError
from llava.model.checkpoint.assemble import LoadOptions, marker_rows, take_rows
from llava.model.checkpoint.files.shard_writer import DEFAULT_SHARD_BYTES, ShardWriter
from llava.model.checkpoint.files.shards import TensorReader
from llava.model.checkpoint.folder import check_links, copy_companions, copy_small_files
from llava.model.checkpoint.formats import CONFIG_FILE, EXTRA_FILE, KINDS, PROJECTOR_FILE, Checkpoint
from llava.model.checkpoint.legacy.export import TOWER_FOLDER
from llava.model.checkpoint.legacy.load import (
    add_tokens,
    load_tokenizer,
    tokenizer_folder,
)
from llava.model.checkpoint.legacy.lora_files import LegacyLora, merged_weights, read_lora, with_update
from llava.model.checkpoint.legacy.parts import open_parts
from llava.model.checkpoint.legacy_keys import ARCHITECTURES
from llava.model.checkpoint.load import load_checkpoint, open_checkpoint
from llava.model.checkpoint.save import save_model
from llava.model.checkpoint.tools.delta import FLOATING
from llava.model.checkpoint.vision_tower import find_tower
from llava.model.checkpoint.weight_names import (
    EMBEDDINGS,
    HEAD,
    LEGACY_PREFIXES,
    LEGACY_PROJECTOR_PREFIX,
    NEWLINE,
    TOWER,
    is_buffer,
    projector_suffix,
    renamed_prefix,
)
from llava.model.multimodal_encoder.open_clip_encoder.loading import is_open_clip
from llava.model.multimodal_encoder.towers import load_tower, tower_image_processor
from llava.utils.folders import new_folder
from llava.utils.jsonl import write_json
from llava.utils.log import with_progress

NEWLINE_NAME = f"model.{NEWLINE}"
TABLES = (EMBEDDINGS, HEAD + "weight")


@dataclass(slots=True)
class MergedModel:
    """Parts of a merged model in the original format; no weight of the base is read yet.

    Attributes:
        checkpoint: the given checkpoint, with its base's settings where it has none.
        base: checkpoint of the language model.
        updates: the adapter of every adapted layer, by our name of the layer.
        projector: the projector's weights by their own names.
        tables: embeddings and head, if they were trained or have new rows, by our names.
        newline: the embedding after each row of patches, if it was trained.
    """

    checkpoint: Checkpoint
    base: Checkpoint
    updates: dict[str, LegacyLora] = field(default_factory=dict)
    projector: dict[str, Tensor] = field(default_factory=dict)
    tables: dict[str, Tensor] = field(default_factory=dict)
    newline: Tensor | None = None

    @property
    def tower_layers(self) -> list[str]:
        """Adapted layers of a tower that is not inside the base."""
        inside = {renamed_prefix(name, LEGACY_PREFIXES) for name in self.base.tensors}
        return [layer for layer in self.updates if layer.startswith(TOWER) and f"{layer}.weight" not in inside]

    def tensors(self, reader: TensorReader) -> Iterator[tuple[str, Tensor]]:
        """Yield every weight of the merged model under its name in the original format."""
        for name in reader.names:
            if is_buffer(name) or (self.projector and projector_suffix(name) is not None):
                continue
            if name == NEWLINE_NAME and self.newline is not None:
                continue
            ours = renamed_prefix(name, LEGACY_PREFIXES) or name
            tensor = self.tables[ours] if ours in self.tables else reader.read(name)
            layer = ours.removesuffix(".weight")
            yield name, with_update(self.updates[layer], layer, tensor) if layer in self.updates else tensor
        for suffix, tensor in self.projector.items():
            yield LEGACY_PROJECTOR_PREFIX + suffix, tensor
        if self.newline is not None:
            yield NEWLINE_NAME, self.newline


def merge_lora(
    path: str | Path,
    base: str | None,
    target: str | Path,
    *,
    options: LoadOptions | None = None,
    include_tower: bool = False,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Write the whole model that an adapter (or a projector alone) and its base make.

    Args:
        path: folder of the adapter.
        base: what it was trained on; None if the adapter names a folder that exists.
        target: new folder.
        options: tower and tower adapter, instead of what the checkpoint names.
        include_tower: put the tower into the folder, and the projector in its own file, so that nothing else is
            needed; always done for a tower that has an adapter.
        max_shard_bytes: see `ShardWriter`.

    Raises:
        CheckpointError: nothing can be merged, or a part is missing or does not fit; nothing is written.
    """
    checkpoint = open_checkpoint(path)
    check_links(checkpoint.path)
    wanted = replace(options or LoadOptions(), base=base)
    if checkpoint.kind == "tower_adapter":
        _merge_tower_alone(checkpoint, base, Path(target))
    elif checkpoint.kind in ("adapter", "projector", "hf_adapter"):
        parts: dict[str, Any] = {name: value for name, value in wanted.parts.items() if name != "base"}
        loaded = load_checkpoint(checkpoint, base=base, **parts)
        with new_folder(Path(target)) as folder:
            save_model(loaded.model, loaded.processor, folder, origin=loaded.origin)
    elif checkpoint.kind in ("legacy_adapter", "legacy_projector") or (
        checkpoint.kind == "legacy" and wanted.tower_adapter
    ):
        _merge_legacy(open_merge(checkpoint, wanted), wanted, Path(target), include_tower, max_shard_bytes)
    else:
        raise CheckpointError(
            f"{path} is {KINDS[checkpoint.kind]}, which has no adapter to merge; expected the folder of an adapter or "
            "of a projector"
        )


def open_merge(checkpoint: Checkpoint, options: LoadOptions) -> MergedModel:
    """Open everything and check that it fits.

    Raises:
        CheckpointError: a part is missing, or does not fit.
    """
    parts = open_parts(checkpoint, options)
    checkpoint = parts.checkpoint
    is_whole = checkpoint.kind == "legacy" or parts.base is None
    merge = MergedModel(checkpoint, checkpoint if is_whole else cast(Checkpoint, parts.base))
    merge.updates = {layer: adapter for adapter in parts.adapters for layer in adapter.pairs}
    if checkpoint.kind != "legacy":
        _take_trained(merge)
    _check_layers(merge)
    return merge


def _take_trained(merge: MergedModel) -> None:
    """Add the projector, and embedding rows that were trained with it."""
    checkpoint = merge.checkpoint
    if checkpoint.kind == "legacy_adapter" and not checkpoint.extra:
        raise CheckpointError(f"{checkpoint.path} has no {EXTRA_FILE}, which holds its projector")
    entries = checkpoint.extra if checkpoint.kind == "legacy_adapter" else checkpoint.tensors
    with TensorReader(entries) as reader:
        for name, tensor in reader:
            suffix = projector_suffix(name)
            if suffix is not None:
                merge.projector[suffix] = tensor
            elif name.endswith("embed_tokens.weight"):
                merge.tables = _tables(merge.base)
                tokenizer = load_tokenizer(tokenizer_folder(checkpoint, merge.base))
                add_tokens(tokenizer, checkpoint)
                take_rows(merge.tables, tensor, checkpoint, marker_rows(tokenizer))
            elif name.endswith(NEWLINE):
                merge.newline = tensor
            else:
                raise CheckpointError(
                    f"{checkpoint.path}: tensor {name} belongs to neither the projector nor the embeddings"
                )


def _tables(base: Checkpoint) -> dict[str, Tensor]:
    with TensorReader(base.tensors) as reader:
        named = ((renamed_prefix(name, LEGACY_PREFIXES), name) for name in reader.names)
        return {ours: reader.read(name) for ours, name in named if ours in TABLES}


def _check_layers(merge: MergedModel) -> None:
    """Check before writing that every adapted layer is in the base, in its size."""
    shapes = {renamed_prefix(name, LEGACY_PREFIXES): entry.shape for name, entry in merge.base.tensors.items()}
    if EMBEDDINGS not in shapes:
        raise CheckpointError(f"{merge.base.path} has no language model; expected model.embed_tokens.weight")
    external = set(merge.tower_layers)
    dtypes = {renamed_prefix(name, LEGACY_PREFIXES): entry.dtype for name, entry in merge.base.tensors.items()}
    for layer, adapter in merge.updates.items():
        pair, entries = adapter.pairs[layer], adapter.reader.entries
        wanted = (entries[pair.up].shape[0], entries[pair.down].shape[1])
        if (dtype := dtypes.get(f"{layer}.weight", FLOATING[0])) not in FLOATING:
            raise CheckpointError(
                f"{merge.base.path}: {layer}.weight is {dtype}, so it is quantized; an adapter is merged into plain "
                "weights, so pass the unquantized base with --model-base"
            )
        if layer not in external and shapes.get(f"{layer}.weight") != wanted:
            raise CheckpointError(
                f"{adapter.folder}: the adapter does not fit: {layer} is {wanted} there, in {merge.base.path} "
                f"{shapes.get(f'{layer}.weight', 'absent')}; pass the base it was trained on with --model-base"
            )


def _merge_legacy(
    merge: MergedModel, options: LoadOptions, target: Path, include_tower: bool, max_shard_bytes: int
) -> None:
    checkpoint, base = merge.checkpoint, merge.base
    with new_folder(target) as folder, TensorReader(base.tensors) as reader:
        settings: dict[str, Any] = {}
        dtype = torch.float16
        with ShardWriter(folder, max_shard_bytes=max_shard_bytes) as writer:
            total = len(reader.names) + len(merge.projector)
            for name, tensor in with_progress(merge.tensors(reader), title="merge", total=total, unit="tensor"):
                writer.add(name, tensor)
                if renamed_prefix(name, LEGACY_PREFIXES) == EMBEDDINGS:
                    dtype, settings["vocab_size"] = tensor.dtype, tensor.shape[0]
        copy_companions(checkpoint.folder, folder, dtype=dtype)
        if not checkpoint.has_tokenizer:
            copy_small_files(base.folder, folder)
        if merge.tower_layers or (include_tower and not base.has_tower):
            settings |= _put_tower(merge, options, folder, dtype)
            torch.save(
                {LEGACY_PROJECTOR_PREFIX + name: weight for name, weight in merge.projector.items()},
                folder / PROJECTOR_FILE,
            )
        settings["architectures"] = [ARCHITECTURES[checkpoint.text_type]]
        settings["torch_dtype"] = str(dtype).removeprefix("torch.")
        write_json(folder / CONFIG_FILE, {**checkpoint.config, **settings})


def _put_tower(merge: MergedModel, options: LoadOptions, folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Put the tower into the folder and return its keys for config.json."""
    source = find_tower(
        merge.checkpoint, options.vision_tower, options.vision_tower_config, options.vision_tower_checkpoint
    )
    if is_open_clip(source.name, source.config_file, source.checkpoint):
        if merge.tower_layers:
            raise CheckpointError(
                f"{merge.checkpoint.path}: its tower {source.name} is an open_clip tower, into which adapters cannot "
                "be merged; make a whole model of this package with `llava checkpoint convert --to model`"
            )
        if source.config_file is None or source.checkpoint is None:
            raise CheckpointError(
                f"the tower {source.name} is an open_clip hub name, without local files to put into a folder; omit "
                "--include-vision-tower, or name its files in mm_vision_tower_config and mm_vision_tower_checkpoint"
            )
        files = {
            "mm_vision_tower_config": Path(source.config_file),
            "mm_vision_tower_checkpoint": Path(source.checkpoint),
        }
        source.load(dtype)  # so that files which a configuration names are copied only if they are a tower
        for file in files.values():
            shutil.copyfile(file, folder / file.name)
        return {key: file.name for key, file in files.items()}
    tower = source.load(dtype)
    adapters = {id(merge.updates[layer]): merge.updates[layer] for layer in merge.tower_layers}
    _write_tower(
        tower,
        list(adapters.values()),
        source.image_processor(tower.config, merge.checkpoint.folder),
        folder / TOWER_FOLDER,
    )
    return {"mm_vision_tower": TOWER_FOLDER}


def _write_tower(tower: Any, adapters: list[LegacyLora], image_processor: Any, folder: Path) -> None:
    state = {TOWER + name: tensor for name, tensor in tower.state_dict().items()}
    for name, tensor in merged_weights(state, adapters):
        tower.get_parameter(name.removeprefix(TOWER)).data.copy_(tensor)
    tower.save_pretrained(folder)
    image_processor.save_pretrained(folder)


def _merge_tower_alone(checkpoint: Checkpoint, base: str | None, target: Path) -> None:
    """Merge a tower's adapter into the tower, and write it as a tower of its own.

    Raises:
        CheckpointError: the tower is not given, or another one.
    """
    if base is None:
        raise CheckpointError(
            f"{checkpoint.path} is {KINDS[checkpoint.kind]}; pass the folder of the tower with --model-base"
        )
    tower = load_tower(base, torch.float32)
    with new_folder(target) as folder:
        adapter = read_lora(checkpoint, tower=True)
        _write_tower(tower, [adapter], tower_image_processor(base, tower.config, None), folder)
