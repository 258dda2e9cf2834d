"""Our models in the legacy layout again: the names, the configuration and the files that the originals' code loads.

What a conversion left out (a tower from beside, our place holder's row) is left out; what it computed anew (rotary
tables) is written where the original file had it. A model that never was legacy becomes a LLaVA 1.5 checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava.errors import CheckpointError
from llava.model.building import Loaded
from llava.model.card import write_card
from llava.model.config import LlavaMedConfig
from llava.model.layout import CONFIG_FILE
from llava.model.legacy_config import legacy_config
from llava.model.multimodal_encoder.open_clip_encoder.key_map import TRUNK_PREFIX, to_open_clip
from llava.model.names import HEAD, LANGUAGE_MODEL, LEGACY_TOWER, NEWLINE, PROJECTOR, TIMM_TOWER, TOWER
from llava.model.shard_files import flat_bytes
from llava.model.shards import DEFAULT_SHARD_BYTES, ShardWriter

SOURCE_FOLDER = "source"
"""Small files of the checkpoint that a model was converted from (its tokenizer), kept to be written again."""

SOURCE_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
)
TOWER_FOLDER = "vision_tower"

TOWER_DIGEST_KEY = "tower_sha256"
"""Key of `LlavaMedConfig.source`: the tower that was fetched from beside, see `tower_place`."""


def legacy_state(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Every weight under its legacy name.

    Raises:
        CheckpointError: the model has parts that the layout cannot hold.
    """
    config: LlavaMedConfig = model.config
    source = config.source or {}
    if config.head_bias:
        raise CheckpointError("the legacy layout has no bias in the head")
    num_rows = rows_to_keep(config)
    tower = tower_place(model)
    trunk: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.startswith(TOWER):
            trunk[name.removeprefix(TOWER)] = tensor
        elif name.startswith(PROJECTOR):
            yield "model.mm_projector." + name.removeprefix(PROJECTOR), tensor
        elif name == f"model.{NEWLINE}":
            yield name, tensor
        elif name.startswith(HEAD):
            if not config.tie_word_embeddings:
                yield name, tensor[:num_rows]
        else:
            legacy = "model." + name.removeprefix(LANGUAGE_MODEL)
            yield legacy, tensor[:num_rows] if legacy == "model.embed_tokens.weight" else tensor
    yield from _rotary(config, source.get("buffers", {}))
    if tower != "beside":
        yield from _tower(config, trunk, tower, source.get("buffers", {}))


def tower_place(model: Any) -> str:
    """Where the tower's weights belong: `inside`, `timm` (inside, under timm's names), or `beside`.

    One that came from beside is left out again only while it is known to be the one that was fetched: trained since, or
    with an adapter added into it, it is nowhere else.
    """
    source = model.config.source or {}
    place = str(source.get("tower", "inside"))
    if place != "beside" or source.get(TOWER_DIGEST_KEY) == tower_digest(model):
        return place
    return "timm" if (source.get("config") or {}).get("mm_vision_tower_checkpoint") else "inside"


def remember_tower(model: Any) -> None:
    """Note in the configuration which tower was fetched from beside, so that `tower_place` knows it again."""
    source = model.config.source or {}
    if source.get("tower") == "beside":
        model.config.source = {**source, TOWER_DIGEST_KEY: tower_digest(model)}


def tower_digest(model: Any) -> str:
    """SHA-256 of a tower's weights: names, types and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name.startswith(TOWER):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(flat_bytes(tensor))
    return digest.hexdigest()


def rows_to_keep(config: LlavaMedConfig) -> int:
    """Rows of the vocabulary without the one for our place holder, where that is the last."""
    rows = int(config.text_config.vocab_size)  # type: ignore[union-attr]
    source = config.source or {}
    if source.get("num_rows"):
        return int(source["num_rows"])
    return rows - 1 if config.image_token_id == rows - 1 else rows


def _tower(
    config: LlavaMedConfig, trunk: dict[str, Tensor], layout: str, buffers: dict[str, str]
) -> Iterator[tuple[str, Tensor]]:
    vision: Any = config.vision_config
    if layout == "timm":
        for name, tensor in to_open_clip(trunk, vision.model_type, vision.num_hidden_layers).items():
            yield TIMM_TOWER + name.removeprefix(TRUNK_PREFIX), tensor
        return
    if vision.model_type not in ("clip_vision_model", "siglip_vision_model"):
        raise CheckpointError(f"the legacy layout holds CLIP and SigLIP towers, not {vision.model_type}")
    for name, tensor in trunk.items():
        yield f"{LEGACY_TOWER}vision_model.{name.removeprefix('vision_model.')}", tensor
    if "position_ids" in buffers:
        num_positions = trunk["embeddings.position_embedding.weight"].shape[0]
        ids = torch.arange(num_positions)[None].to(getattr(torch, buffers["position_ids"]))
        yield f"{LEGACY_TOWER}vision_model.embeddings.position_ids", ids


def _rotary(config: LlavaMedConfig, buffers: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    """The rotary tables that transformers before 4.32 wrote into every layer."""
    if "rotary" not in buffers:
        return
    text: Any = config.text_config
    width = text.hidden_size // text.num_attention_heads
    theta = float((text.rope_parameters or {}).get("rope_theta", 10000.0))
    table = 1.0 / (theta ** (torch.arange(0, width, 2).float() / width))
    for layer in range(text.num_hidden_layers):
        yield f"model.layers.{layer}.self_attn.rotary_emb.inv_freq", table.to(getattr(torch, buffers["rotary"]))


def export_legacy(
    loaded: Loaded,
    path: str | Path,
    *,
    source_folder: str | Path | None = None,
    safe: bool | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Write a model in the legacy layout.

    Args:
        loaded: the model; adapters are merged before.
        path: folder, created when absent.
        source_folder: our folder that the model was loaded from; its kept files are written again.
        safe: safetensors or `.bin`; as in the checkpoint that the model was converted from when None, else safetensors.
        max_shard_bytes: see `ShardWriter`.

    Raises:
        CheckpointError: the model has parts that the layout cannot hold.
    """
    config: Any = loaded.model.config
    source = config.source or {}
    written = legacy_config(config, whole=True)
    if source.get("tower") == "beside" and tower_place(loaded.model) != "beside":
        written["unfreeze_mm_vision_tower"] = True  # else the originals' loaders fetch the stock one by name
    target = Path(path)
    if "mm_vision_tower" not in written:
        named = str((loaded.origin.get("build") or {}).get("vision_tower") or TOWER_FOLDER)
        written["mm_vision_tower"] = TOWER_FOLDER if Path(named).is_absolute() else named
    use_safe = source.get("safe", True) if safe is None else safe
    with ShardWriter(target, max_shard_bytes=max_shard_bytes, safe=use_safe) as writer:
        for name, tensor in legacy_state(loaded.model):
            writer.add(name, tensor)
    write_json(target / CONFIG_FILE, written)
    write_card(target, target, "model", config, loaded.origin)
    if written["mm_vision_tower"] == TOWER_FOLDER and not source:
        _write_tower_settings(loaded, target / TOWER_FOLDER)
    kept = None if source_folder is None else Path(source_folder) / SOURCE_FOLDER
    if kept is not None and kept.is_dir():
        copy_small_files(kept, target)
    else:
        _write_tokenizer(loaded, target)


def write_json(file: Path, content: Any) -> None:
    """Write a JSON file, whole or not at all."""
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=file.parent, delete=False) as stream:
        stream.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    os.chmod(stream.name, 0o644)
    os.replace(stream.name, file)


def copy_small_files(source: Path, target: Path) -> None:
    """Copy the files of a tokenizer (and generation settings) that are there."""
    target.mkdir(parents=True, exist_ok=True)
    for name in SOURCE_FILES:
        if (source / name).is_file():
            with tempfile.TemporaryDirectory(dir=target, prefix=".saving-") as folder:
                copy = Path(folder) / name
                shutil.copyfile(source / name, copy)
                os.replace(copy, target / name)


def _write_tower_settings(loaded: Loaded, folder: Path) -> None:
    """Configuration and preprocessing of a tower whose weights are inside the checkpoint."""
    folder.mkdir(exist_ok=True)
    vision: Any = loaded.model.config.vision_config
    vision.save_pretrained(folder)
    loaded.processor.image_processor.save_pretrained(folder)


def _write_tokenizer(loaded: Loaded, target: Path) -> None:
    """The tokenizer as it is; one word longer than the table where our place holder's row was dropped.

    The originals' loaders never write that word, so the surplus entry is harmless; it is named in the documentation.
    """
    loaded.processor.tokenizer.save_pretrained(target)
