"""Export our models to the legacy format: names, configuration and files for the original code.

What a conversion left out (an external tower, our placeholder's row) is left out; what it recomputed (rotary tables)
is written if the original file had it. A model that never was legacy becomes a LLaVA 1.5 checkpoint.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from llava.errors import CheckpointError
from llava.model.builder import LoadedModel
from llava.model.checkpoint.assemble import mean_rows
from llava.model.checkpoint.files.shard_writer import DEFAULT_SHARD_BYTES, ShardWriter
from llava.model.checkpoint.folder import TOKENIZER_CONFIG_FILE, TOKENIZERS_CLASS, copy_source, name_known_class
from llava.model.checkpoint.formats import CONFIG_FILE, PAD_TOKEN, Checkpoint, read_json
from llava.model.checkpoint.legacy.config import legacy_config, rows_to_keep
from llava.model.checkpoint.legacy_keys import TEMPLATE_KEY
from llava.model.checkpoint.model_card import write_card
from llava.model.checkpoint.weight_names import (
    EMBEDDINGS,
    HEAD,
    LANGUAGE_MODEL,
    LEGACY_PROJECTOR_PREFIX,
    LEGACY_TOWER,
    NEWLINE,
    PROJECTOR,
    TIMM_TOWER,
    TOWER,
)
from llava.model.config import LlavaMedConfig
from llava.model.multimodal_encoder.open_clip_encoder.trunks import TRUNK_PREFIX, to_open_clip
from llava.processing import LlavaMedProcessor
from llava.tokenization import token_id
from llava.utils.folders import final_path
from llava.utils.jsonl import write_json
from llava.utils.provenance import TensorHash

logger = logging.getLogger(__name__)

ADDED_FILE = "added_tokens.json"

TOWER_FOLDER = "vision_tower"

TOWER_DIGEST_KEY = "tower_sha256"
"""Key of `LlavaMedConfig.source`: digest of the tower that was loaded from outside, see `tower_place`."""


def legacy_state(model: Any, num_rows: int | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight under its legacy name.

    Args:
        model: the model.
        num_rows: rows of the vocabulary; None for those of `table_rows`.

    Raises:
        CheckpointError: the format cannot hold a part of the model.
    """
    config: LlavaMedConfig = model.config
    source = config.source or {}
    if config.head_bias:
        raise CheckpointError("the legacy format has no bias in the language model's head, and this model has one")
    num_rows = table_rows(model) if num_rows is None else num_rows
    tower = tower_place(model)
    trunk: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.startswith(TOWER):
            trunk[name.removeprefix(TOWER)] = tensor
        elif name.startswith(PROJECTOR):
            yield LEGACY_PROJECTOR_PREFIX + name.removeprefix(PROJECTOR), tensor
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
    """Return where the tower's weights belong: `inside`, `timm` (inside, under timm's names), or `beside`.

    A tower that was loaded from outside is left out again only if its digest is unchanged: after training, or with an
    adapter merged, its weights exist nowhere else.
    """
    source = model.config.source or {}
    place = str(source.get("tower", "inside"))
    if place != "beside" or source.get(TOWER_DIGEST_KEY) == tower_digest(model):
        return place
    return "timm" if (source.get("config") or {}).get("mm_vision_tower_checkpoint") else "inside"


def remember_tower(model: Any) -> None:
    """Record in the configuration which tower was loaded from outside, for `tower_place`."""
    source = model.config.source or {}
    if source.get("tower") == "beside":
        model.config.source = {**source, TOWER_DIGEST_KEY: tower_digest(model)}


def tower_digest(model: Any) -> str:
    """Return the SHA-256 of a tower's weights: names, dtypes, shapes and bytes."""
    found = TensorHash()
    for name, tensor in sorted(model.state_dict().items()):
        if name.startswith(TOWER):
            found.add(f"{name} {tensor.dtype} {tuple(tensor.shape)}", tensor)
    return found.value()


def table_rows(model: Any) -> int:
    """Return the vocabulary rows to write: `rows_to_keep`, or all but our placeholder's if others changed.

    Loading appends rows for tokens without one, each the mean of the old rows. Unchanged, they are left out again;
    trained, they exist nowhere else.
    """
    config: LlavaMedConfig = model.config
    num_rows, all_rows = rows_to_keep(config), int(cast(Any, config.text_config).vocab_size)
    later_rows = [row for row in range(num_rows, all_rows) if row != config.image_token_id]
    state = model.state_dict() if later_rows else {}
    for name in {EMBEDDINGS, HEAD + "weight"} & state.keys():
        mean = mean_rows(state[name][:num_rows].cpu(), 1)[-1]
        if any(not torch.equal(state[name][row].cpu(), mean) for row in later_rows):
            return all_rows - 1 if config.image_token_id == all_rows - 1 else all_rows
    return num_rows


def _tower(
    config: LlavaMedConfig, trunk: dict[str, Tensor], place: str, buffers: dict[str, str]
) -> Iterator[tuple[str, Tensor]]:
    vision: Any = config.vision_config
    if place == "timm":
        for name, tensor in to_open_clip(trunk, vision.model_type, vision.num_hidden_layers).items():
            yield TIMM_TOWER + name.removeprefix(TRUNK_PREFIX), tensor
        return
    if vision.model_type not in ("clip_vision_model", "siglip_vision_model"):
        raise CheckpointError(f"the legacy format holds CLIP and SigLIP towers, not {vision.model_type}")
    for name, tensor in trunk.items():
        yield f"{LEGACY_TOWER}vision_model.{name.removeprefix('vision_model.')}", tensor
    if "position_ids" in buffers:
        num_positions = trunk["embeddings.position_embedding.weight"].shape[0]
        ids = torch.arange(num_positions)[None].to(getattr(torch, buffers["position_ids"]))
        yield f"{LEGACY_TOWER}vision_model.embeddings.position_ids", ids


def _rotary(config: LlavaMedConfig, buffers: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    """Yield the rotary tables that transformers before 4.32 wrote for every layer."""
    if "rotary" not in buffers:
        return
    text: Any = config.text_config
    width = text.hidden_size // text.num_attention_heads
    theta = float((text.rope_parameters or {}).get("rope_theta", 10000.0))
    table = 1.0 / (theta ** (torch.arange(0, width, 2).float() / width))
    for layer in range(text.num_hidden_layers):
        yield f"model.layers.{layer}.self_attn.rotary_emb.inv_freq", table.to(getattr(torch, buffers["rotary"]))


def export_legacy(
    loaded: LoadedModel,
    path: str | Path,
    *,
    source_folder: str | Path | None = None,
    safe: bool | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Write a model in the legacy format.

    Args:
        loaded: the model; adapters must be merged.
        path: folder, created if needed.
        source_folder: original files of the checkpoint, see `folder.source_of`; they are written again.
        safe: safetensors or `.bin`; None for the format of the converted checkpoint, or else safetensors.
        max_shard_bytes: see `ShardWriter`.

    Raises:
        CheckpointError: the format cannot hold a part of the model.
    """
    config: Any = loaded.model.config
    source = config.source or {}
    num_rows = table_rows(loaded.model)
    written = {**legacy_config(config, whole=True), "vocab_size": num_rows}
    if source.get("tower") == "beside" and tower_place(loaded.model) != "beside":
        written["unfreeze_mm_vision_tower"] = True  # without it the original loaders download the stock tower by name
    target = Path(path)
    if "mm_vision_tower" not in written:
        named = str((loaded.origin.get("build") or {}).get("vision_tower") or TOWER_FOLDER)
        written["mm_vision_tower"] = TOWER_FOLDER if Path(named).is_absolute() else named
    use_safe = source.get("safe", True) if safe is None else safe
    with ShardWriter(target, max_shard_bytes=max_shard_bytes, safe=use_safe) as writer:
        for name, tensor in legacy_state(loaded.model, num_rows):
            writer.add(name, tensor)
    write_json(target / CONFIG_FILE, written)
    write_card(final_path(target), target, "legacy", config, loaded.origin)
    if written["mm_vision_tower"] == TOWER_FOLDER and not source:
        _write_tower_settings(loaded, target / TOWER_FOLDER)
    if source_folder is not None:
        copy_source(Path(source_folder), target, written)
    checkpoint = Checkpoint.open(target)
    if num_rows != source.get("num_rows") or not checkpoint.has_tokenizer:
        _write_tokenizer(loaded.processor.tokenizer, target, source.get("num_rows"))
    keep_template(checkpoint, loaded.processor)


def keep_template(checkpoint: Checkpoint, processor: LlavaMedProcessor) -> None:
    """Write the template's name into config.json if a legacy checkpoint's content would imply another one.

    Settings that the format cannot hold at all are named in a warning.
    """
    folder = checkpoint.folder
    words = [word for word in [PAD_TOKEN] if token_id(processor.tokenizer, word) is not None]
    if checkpoint.template(words) != processor.template.name:
        write_json(folder / CONFIG_FILE, {**checkpoint.config, TEMPLATE_KEY: processor.template.name})
    lost = [] if processor.system is None else ["a system text of its own"]
    if processor.placement != ("as_written" if checkpoint.style == "patch_token" else "front"):
        lost.append(f"images placed {processor.placement}")
    if lost:
        logger.warning("%s: the legacy format cannot hold %s", final_path(folder), " and ".join(lost))


def _write_tower_settings(loaded: LoadedModel, folder: Path) -> None:
    """Write configuration and preprocessing of a tower whose weights are inside the checkpoint."""
    folder.mkdir(exist_ok=True)
    vision: Any = loaded.model.config.vision_config
    vision.save_pretrained(folder)
    loaded.processor.image_processor.save_pretrained(folder)


def _write_tokenizer(tokenizer: Any, target: Path, num_known: int | None) -> None:
    """Write the tokenizer; if our placeholder's row was dropped, it has one token more than the table.

    The original loaders never produce that token, so the extra entry is harmless; docs/checkpoints.md mentions it.

    Args:
        tokenizer: tokenizer of the model.
        target: folder; the new tokens are added to older tokenizer files in it.
        num_known: rows of the source's vocabulary, whose tokens its files name already.
    """
    tokenizer.save_pretrained(target)
    if read_json(target / TOKENIZER_CONFIG_FILE).get("tokenizer_class") == TOKENIZERS_CLASS:
        name_known_class(target)
    if (target / "tokenizer.model").is_file() and num_known is not None:  # read by the original slow tokenizer
        new = {word: row for word, row in tokenizer.get_added_vocab().items() if row >= num_known}
        write_json(target / ADDED_FILE, {**read_json(target / ADDED_FILE), **new})
