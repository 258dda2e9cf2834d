"""Where an open_clip tower's files are: two files that are named, a folder, or a hub repository.

config JSON + checkpoint            --vision_tower_config FILE --vision_tower_checkpoint FILE
open_clip_config.json + weights     --vision_tower FOLDER | local-dir:FOLDER | hf-hub:OWNER/MODEL
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from huggingface_hub import hf_hub_download

from llava.errors import CheckpointError, ConfigError

HUB_PREFIX, FOLDER_PREFIX = "hf-hub:", "local-dir:"
HUB_CONFIG = "open_clip_config.json"
HUB_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
MODEL_CONFIGS = Path(__file__).parent / "model_configs"

CONFIG_ALIASES = {"biomedclipcxr_518.json": "biomedclip_cxr_518.json"}
"""The published configuration has two spellings: the one its scripts pass, and the one of its file on the hub."""

WEIGHTS_VARIABLE = "LLAVA_WEIGHTS"
"""Environment variable: a folder of downloaded weights in which checkpoints are looked for by file name."""

PUBLISHED = {"biomedclipcxr_518_checkpoint.pt": "microsoft/llava-rad"}
"""Checkpoint files that command lines name without a path, and the hub repository that publishes them."""


@dataclass(frozen=True, slots=True)
class OpenClipFiles:
    """An open_clip tower on disk.

    Attributes:
        model_config: open_clip's model configuration (`embed_dim`, `vision_cfg`, `text_cfg`).
        preprocess: `preprocess_cfg` of a hub configuration, else empty.
        weights: the checkpoint.
    """

    model_config: dict[str, Any]
    preprocess: dict[str, Any]
    weights: Path


def is_open_clip(tower: str, config: str | None, checkpoint: str | None) -> bool:
    """Whether a tower is an open_clip one: by its two files, its prefix, or what its folder holds."""
    if config and checkpoint:
        return True
    return tower.startswith((HUB_PREFIX, FOLDER_PREFIX)) or (Path(tower) / HUB_CONFIG).is_file()


def find_files(tower: str, config: str | None = None, checkpoint: str | None = None) -> OpenClipFiles:
    """The files of an open_clip tower; what is named explicitly is taken before what the folder or hub holds.

    Args:
        tower: a name (with both files given), a folder, or `hf-hub:OWNER/MODEL`.
        config: model configuration: a path, or the file name of one that comes with this package.
        checkpoint: weights: a path, or the name of a file in `$LLAVA_WEIGHTS` or published on the hub.

    Raises:
        CheckpointError: a file is missing or broken; says where it was looked for.
        ConfigError: only one of the two files is given for a tower that has no others.
    """
    is_folder = tower.startswith((HUB_PREFIX, FOLDER_PREFIX)) or (Path(tower) / HUB_CONFIG).is_file()
    if not is_folder and not (config and checkpoint):
        raise ConfigError(
            "an open_clip tower needs two files: its model configuration (--vision_tower_config) and its weights "
            f"(--vision_tower_checkpoint); got {config} and {checkpoint}"
        )
    found_config = find_config(config) if config else _from_repository(tower, (HUB_CONFIG,))
    weights = find_checkpoint(checkpoint) if checkpoint else _from_repository(tower, HUB_WEIGHTS)
    content = _read_json(found_config)
    if "model_cfg" in content:
        return OpenClipFiles(content["model_cfg"], content.get("preprocess_cfg") or {}, weights)
    return OpenClipFiles(content, {}, weights)


def find_config(name: str) -> Path:
    """A model configuration by path, or the one of that file name that comes with this package.

    Raises:
        CheckpointError: there is none; lists what was tried.
    """
    given = Path(name).expanduser()
    built_in = MODEL_CONFIGS / CONFIG_ALIASES.get(given.name, given.name)
    for path in (given, built_in):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.name for path in MODEL_CONFIGS.glob("*.json")))
    raise CheckpointError(f"no open_clip model configuration {name}; looked at {given} and among: {known}")


def find_checkpoint(name: str, *, folders: Sequence[str | Path] = ()) -> Path:
    """A tower's weights: the path as given, then by name in `folders`, in `$LLAVA_WEIGHTS`, and on the hub.

    Args:
        name: path or file name.
        folders: where else to look, for example beside the model that names this tower.

    Raises:
        CheckpointError: there is none; lists everything that was tried.
    """
    given = Path(name).expanduser()
    places = [given, *(Path(folder) / given for folder in folders)]
    if local := os.environ.get(WEIGHTS_VARIABLE):
        places.append(Path(local).expanduser() / given.name)
    for place in places:
        if place.is_file():
            return place
    tried = [str(place) for place in places]
    if not local:
        tried.append(f"${WEIGHTS_VARIABLE} (not set)")
    if repository := PUBLISHED.get(given.name):
        try:
            return _download(repository, given.name)
        except OSError as error:
            tried.append(f"hub repository {repository} ({type(error).__name__})")
    raise CheckpointError(f"no weights {name} for the vision tower; tried: {'; '.join(tried)}")


def _from_repository(tower: str, names: Sequence[str]) -> Path:
    """The first of several files that a folder or hub repository holds."""
    if tower.startswith(HUB_PREFIX):
        repository, problem = tower.removeprefix(HUB_PREFIX), ""
        for name in names:
            try:
                return _download(repository, name)
            except OSError as error:
                problem = f" ({type(error).__name__})"
        raise CheckpointError(f"hub repository {repository} gives none of {', '.join(names)}{problem}")
    folder = Path(tower.removeprefix(FOLDER_PREFIX)).expanduser()
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f"{folder}: no open_clip tower; expected {' or '.join(names)}")


def _download(repository: str, name: str) -> Path:
    return Path(hf_hub_download(repository, name))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object; expected an open_clip model configuration")
    return cast(dict[str, Any], content)
