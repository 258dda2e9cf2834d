"""Convert adapters and projectors between the legacy formats and ours; weights are unchanged.

adapter_model.bin + non_lora_trainables.bin (+ Vit-lora/)  <-->  one peft adapter for our model + its extra weights
mm_projector.bin                                           <-->  mm_projector.bin, .safetensors
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor

from llava.errors import CheckpointError
from llava.model.builder import LoadedModel, portable_path
from llava.model.checkpoint.assemble import LoadOptions
from llava.model.checkpoint.files.shards import TensorReader
from llava.model.checkpoint.folder import SOURCE_FOLDER, copy_source
from llava.model.checkpoint.formats import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    ADAPTER_FILES,
    CONFIG_FILE,
    EXTRA_FILE,
    ORIGIN_FILE,
    PROJECTOR_FILE,
    PROJECTOR_SAFE_FILE,
    Checkpoint,
    first_file,
    read_json,
)
from llava.model.checkpoint.hub import local_folder
from llava.model.checkpoint.legacy.config import legacy_config, rows_to_keep
from llava.model.checkpoint.legacy.export import keep_template
from llava.model.checkpoint.legacy.load import load_legacy
from llava.model.checkpoint.legacy.lora_files import LegacyLora, peft_parts
from llava.model.checkpoint.legacy.parts import LegacyParts, open_parts
from llava.model.checkpoint.save import new_files, write_common
from llava.model.checkpoint.weight_names import (
    LANGUAGE_MODEL,
    LEGACY_PROJECTOR_PREFIX,
    LEGACY_TOWER,
    MARKER_KEY,
    NEWLINE,
    PEFT_PREFIX,
    PROJECTOR,
    TOWER,
    TOWER_ROOT,
    projector_suffix,
)
from llava.model.config import LlavaMedConfig
from llava.processing import LlavaMedProcessor
from llava.utils.jsonl import write_json

TOWER_ADAPTER_FOLDER = "Vit-lora"


def convert_adapter(checkpoint: Checkpoint, options: LoadOptions, path: Path) -> LoadedModel:
    """Write a legacy adapter as one of ours.

    Raises:
        CheckpointError: its base or tower is missing, or it does not fit them.
    """
    parts = open_parts(checkpoint, options)
    loaded = load_legacy(checkpoint, replace(options, merge=False), parts)
    config, state = peft_parts(parts.adapters)
    config.inference_mode = True
    extra = {PEFT_PREFIX + _current_extra(name): tensor.clone() for name, tensor in TensorReader(checkpoint.extra)}
    loaded.model.config.source["adapters"] = _remember(parts.adapters)
    with new_files(path) as temporary:
        cast(Any, config).save_pretrained(temporary)
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, temporary / ADAPTER_FILE)
        torch.save(extra, temporary / EXTRA_FILE)
        write_common(temporary, loaded.model, _origin(parts, options, loaded), "adapter")
    loaded.processor.save_pretrained(path)
    return loaded


def _current_extra(name: str) -> str:
    """Return our name of a weight in a legacy adapter's `non_lora_trainables.bin`."""
    return f"model.{NEWLINE}" if name.endswith(NEWLINE) else f"{PROJECTOR}{projector_suffix(name)}"


def _remember(adapters: list[LegacyLora]) -> dict[str, Any]:
    """Return what our format has no key for: the adapters' own settings, and the format of their files."""
    main = adapters[0]
    suffix = {adapter.folder.name: _file(adapter.folder).suffix for adapter in adapters}
    return {
        "main": main.config,
        "safe": _file(main.folder).suffix == ".safetensors",
        "copies": bool(main.dropped),
        "tower": adapters[1].config if len(adapters) > 1 else None,
        "tower_safe": len(adapters) > 1 and suffix[adapters[1].folder.name] == ".safetensors",
    }


def _file(folder: Path) -> Path:
    file = first_file(folder, ADAPTER_FILES)
    if file is None:
        raise CheckpointError(f"{folder} has no adapter weights; expected {' or '.join(ADAPTER_FILES)}")
    return file


def _origin(opened: LegacyParts, options: LoadOptions, loaded: LoadedModel) -> dict[str, Any]:
    """Return how our loader assembles the base: from its parts, or from a legacy model."""
    checkpoint, base = opened.checkpoint, opened.base
    assert base is not None  # adapters and projectors always have one
    if base.kind != "language_model":
        parts = {name: value for name, value in options.parts.items() if name not in ("base", "tower_adapter")}
        return {"base": portable_path(str(base.folder)), "load": parts}
    config, processor = cast(LlavaMedConfig, loaded.model.config), loaded.processor
    tower = {
        name: options.parts.get(name) or checkpoint.config.get(f"mm_{name}")
        for name in ("vision_tower", "vision_tower_config", "vision_tower_checkpoint")
    }
    return {
        "build": {
            "lm": portable_path(str(base.folder)),
            **{name: _found(checkpoint, value) for name, value in tower.items() if value},
            "projector_type": config.projector_type,
            "projector_kwargs": config.projector_kwargs,
            "select_layer": config.vision_feature_layer,
            "select_feature": "cls_patch" if config.vision_feature_select_strategy == "full" else "patch",
            "use_im_start_end": config.use_im_start_end,
            "use_im_patch_token": checkpoint.uses_patch_token,
            "template": processor.template.name,
            "image_mode": processor.image_mode,
            "patch_merge_type": config.patch_merge_type,
            "image_grid_pinpoints": config.image_grid_pinpoints,
            "placement": processor.placement,
        }
    }


def _found(checkpoint: Checkpoint, name: str) -> str:
    """Return a part's absolute path, or a hub name unchanged."""
    for place in (Path(name).expanduser(), checkpoint.folder / name):
        if place.exists():
            return str(place.resolve())
    return name


def convert_projector(checkpoint: Checkpoint, options: LoadOptions, path: Path) -> LoadedModel:
    """Write a legacy projector as one of ours, with the same tensors and the same base.

    Raises:
        CheckpointError: its base or tower is missing, or it does not fit them.
    """
    opened = open_parts(checkpoint, options)
    loaded, base = load_legacy(checkpoint, options, opened), opened.base
    weights = {name: tensor.clone() for name, tensor in TensorReader(checkpoint.tensors)}
    parts = {name: _found(checkpoint, value) for name, value in options.parts.items()}
    if base is not None:
        parts["base"] = str(local_folder(str(base.folder)).resolve())
    for name in ("vision_tower", "vision_tower_config", "vision_tower_checkpoint"):
        if name not in parts and checkpoint.config.get(f"mm_{name}"):
            parts[name] = _found(checkpoint, str(checkpoint.config[f"mm_{name}"]))
    with new_files(path) as temporary:
        torch.save(weights, temporary / PROJECTOR_FILE)
        save_file(weights, temporary / PROJECTOR_SAFE_FILE)
        write_common(temporary, loaded.model, {"load": parts}, "projector")
    loaded.processor.save_pretrained(path)
    return loaded


def export_legacy_adapter(checkpoint: Checkpoint, path: Path) -> None:
    """Write one of our adapters in the legacy format.

    Raises:
        CheckpointError: it adapts parts that the format cannot hold.
    """
    config = LlavaMedConfig.from_pretrained(checkpoint.folder)
    kept: dict[str, Any] = (config.source or {}).get("adapters") or {}
    ours = checkpoint.adapter
    language, tower = _split(dict(TensorReader(checkpoint.tensors)))
    if not language:
        raise CheckpointError(
            f"{checkpoint.path} adapts the vision tower only, which the legacy format cannot hold; merge it first "
            "(llava checkpoint merge-lora)"
        )
    if kept.get("copies"):
        root = TOWER_ROOT.removeprefix(PEFT_PREFIX)
        copies = {name.replace(root, LEGACY_TOWER + "vision_model."): tensor for name, tensor in tower.items()}
        language.update(copies)
    extra = {
        _legacy_extra(name): tensor.clone() for name, tensor in TensorReader(checkpoint.extra) if name != MARKER_KEY
    }
    with new_files(path) as temporary:
        _write_adapter(
            temporary, language, kept.get("main") or _main_config(ours, language), safe=kept.get("safe", True)
        )
        torch.save(extra, temporary / EXTRA_FILE)
    if tower:
        with new_files(path / TOWER_ADAPTER_FOLDER) as temporary:
            settings = kept.get("tower") or _tower_config(ours, tower)
            _write_adapter(temporary, tower, settings, safe=bool(kept.get("tower_safe")))
    _write_rest(config, checkpoint.folder, path)


def _split(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return an adapter's tensors under legacy names: the language model's, and the tower's."""
    language, tower = {}, {}
    for name, tensor in state.items():
        layer = name.removeprefix(PEFT_PREFIX)
        if layer.startswith(LANGUAGE_MODEL):
            language[f"{PEFT_PREFIX}model.{layer.removeprefix(LANGUAGE_MODEL)}"] = tensor.clone()
        elif layer.startswith(TOWER):
            tower[TOWER_ROOT + layer.removeprefix(TOWER).removeprefix("vision_model.")] = tensor.clone()
        else:
            raise CheckpointError(f"the legacy format cannot hold the adapter weight {name}")
    return language, tower


def _legacy_extra(name: str) -> str:
    suffix = projector_suffix(name)
    if suffix is not None:
        return f"{PEFT_PREFIX}{LEGACY_PROJECTOR_PREFIX}{suffix}"
    layer = name.removeprefix(PEFT_PREFIX)
    return f"{PEFT_PREFIX}model.{layer.removeprefix(LANGUAGE_MODEL)}" if layer.startswith(LANGUAGE_MODEL) else name


def _write_adapter(folder: Path, state: dict[str, Tensor], config: dict[str, Any], *, safe: bool) -> None:
    (folder / ADAPTER_CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if safe:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / ADAPTER_FILES[0])
    else:
        torch.save(state, folder / ADAPTER_FILES[1])


def _main_config(ours: dict[str, Any], state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return our adapter's settings with only the last part of each layer name, as the originals do."""
    names = {name.split(".lora_", 1)[0].rsplit(".", 1)[-1] for name in state}
    left_out: dict[str, Any] = {"rank_pattern": {}, "alpha_pattern": {}, "auto_mapping": None}
    return {**ours, **left_out, "target_modules": sorted(names)}


def _tower_config(ours: dict[str, Any], state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the settings of the tower's part of our adapter, whose rank and scale have patterns."""
    own = {
        key: next((value for name, value in (ours.get(patterns) or {}).items() if "vision_tower" in name), ours[key])
        for key, patterns in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern"))
    }
    return {**_main_config(ours, state), **own, "task_type": None}


def export_legacy_projector(checkpoint: Checkpoint, path: Path) -> None:
    """Write one of our projectors in the legacy format."""
    config = LlavaMedConfig.from_pretrained(checkpoint.folder)
    num_rows = max(rows_to_keep(config), *(row + 1 for row in config.marker_token_ids or [0]))
    weights = {
        name: (tensor[:num_rows] if name.endswith("embed_tokens.weight") else tensor).clone()
        for name, tensor in TensorReader(checkpoint.tensors)
        if name != MARKER_KEY
    }
    with new_files(path) as temporary:
        torch.save(weights, temporary / PROJECTOR_FILE)
    _write_rest(config, checkpoint.folder, path)


def _write_rest(config: LlavaMedConfig, folder: Path, path: Path) -> None:
    """Write config.json, and the files that were kept when the folder was converted."""
    written = legacy_config(config, whole=False)
    build = read_json(folder / ORIGIN_FILE).get("build") or {}
    for name in ("vision_tower", "vision_tower_config", "vision_tower_checkpoint"):
        if build.get(name) and f"mm_{name}" not in written:
            written[f"mm_{name}"] = build[name]
    if build.get("lm") and not config.source:
        written["_name_or_path"] = build["lm"]
    write_json(path / CONFIG_FILE, written)
    copy_source(folder / SOURCE_FOLDER, path, written)
    keep_template(Checkpoint.open(path), LlavaMedProcessor.from_pretrained(folder))
