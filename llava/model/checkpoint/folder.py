"""The small files that accompany the weights of a model folder."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.errors import CheckpointError
from llava.model.checkpoint.formats import CONFIG_FILE, Checkpoint, read_json
from llava.model.checkpoint.legacy_keys import TOWER_KEYS
from llava.utils.jsonl import write_json

if TYPE_CHECKING:
    import torch


SOURCE_FOLDER = "source"
"""Subfolder of our folders and of exports for transformers: files of the checkpoint that was converted."""

TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
TOKENIZERS_CLASS = "TokenizersBackend"
"""transformers 5's class for a tokenizer that consists of a tokenizer.json only; older versions lack this class."""

SOURCE_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    TOKENIZER_CONFIG_FILE,
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
)


LINKED_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
"""Files that may be links to anywhere: they are read as tensors, never copied as they are."""

HUB_FOLDER, HUB_BLOBS = "models--", "blobs"
"""The hub client's cache: `models--OWNER--NAME/snapshots/REVISION/FILE` links to `models--OWNER--NAME/blobs/HASH`."""


def check_links(folder: Path, *, within: Path | None = None) -> None:
    """Check that no link below a folder leads out of it, except of weights and in the hub client's cache.

    Files of a checkpoint are copied into the folders that are made from it, which may be published.

    Args:
        folder: a checkpoint; nothing is checked for a single file. Or a folder in it that is copied as it is, so that
            weights are no exception.
        within: the checkpoint, in the second case.

    Raises:
        CheckpointError: a link leads elsewhere.
    """
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(place) / name
            if within or path.suffix not in LINKED_WEIGHTS or path.is_dir():
                _check_link(path, within or folder)


def _check_link(path: Path, checkpoint: Path) -> None:
    """Check a path of a checkpoint whose parent was checked; see `check_links`."""
    if not path.is_symlink():
        return
    target = Path(os.path.realpath(path))
    is_cached = target.parent.name == HUB_BLOBS and target.parent.parent.name.startswith(HUB_FOLDER)
    if not (target.is_relative_to(checkpoint.resolve()) or is_cached):
        raise CheckpointError(
            f"{path} is a link to {target}, outside the checkpoint; what is made from a checkpoint may be published, "
            "so replace the link with a copy, or remove it"
        )


def source_of(checkpoint: Checkpoint) -> Path:
    """Return the folder of a checkpoint's original files: itself or a kept copy, which may not exist."""
    return checkpoint.folder if checkpoint.kind.startswith("legacy") else checkpoint.folder / SOURCE_FOLDER


def source_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return config.json in the legacy format: the checkpoint's own or its source's; empty if it has none."""
    if checkpoint.kind.startswith("legacy"):
        return checkpoint.config
    kept = checkpoint.config.get("llava_source") or {} if checkpoint.kind == "hf_llava" else checkpoint.config
    return dict((kept.get("source") or {}).get("config") or {})


def copy_source(source: Path, target: Path, config: Mapping[str, Any]) -> None:
    """Copy a checkpoint's tokenizer files, and the tower that its configuration names if it is inside.

    Args:
        source: see `source_of`; nothing happens if it does not exist.
        target: folder, created if needed.
        config: config.json in the legacy format.
    """
    if not source.is_dir():
        return
    copy_small_files(source, target)
    for name in {str(config[key]) for key in TOWER_KEYS if config.get(key)}:
        copy_inside(source, target, name)


def copy_small_files(source: Path, target: Path) -> None:
    """Copy the files of a tokenizer and the generation settings, as far as they exist; see `check_links`."""
    target.mkdir(parents=True, exist_ok=True)
    for name in SOURCE_FILES:
        if (source / name).is_file():
            _check_link(source / name, source)
            with tempfile.TemporaryDirectory(dir=target, prefix=".saving-") as folder:
                copy = Path(folder) / name
                shutil.copyfile(source / name, copy)
                os.replace(copy, target / name)


def copy_inside(source: Path, folder: Path, name: str) -> bool:
    """Copy a file or folder that a checkpoint names, if it is inside its folder; return whether it is."""
    place = Path(name)
    if place.is_absolute() or ".." in place.parts or name in ("", ".") or not (source / place).exists():
        return False
    for part in (*reversed(place.parents), place):
        _check_link(source / part, source)
    (folder / place).parent.mkdir(parents=True, exist_ok=True)
    if (source / place).is_dir():
        check_links(source / place, within=source)
        shutil.copytree(source / place, folder / place, dirs_exist_ok=True, ignore=_not_copied)
    elif (source / place).is_file():
        shutil.copyfile(source / place, folder / place)
    return True


def _not_copied(place: str, names: list[str]) -> set[str]:
    """Return the names of pipes, devices and broken links, and of links to folders, which may be circular."""
    paths = {name: Path(place, name) for name in names}
    return {name for name, path in paths.items() if not (path.is_file() or (path.is_dir() and not path.is_symlink()))}


def name_known_class(folder: Path) -> None:
    """Set a fast tokenizer's class to the one that every version of transformers reads without conversion."""
    file = folder / TOKENIZER_CONFIG_FILE
    write_json(file, {**read_json(file), "tokenizer_class": "PreTrainedTokenizerFast"})


def keep_source(checkpoint: Checkpoint, path: Path) -> None:
    """Keep the original files of a checkpoint in its conversion, for converting it back."""
    with tempfile.TemporaryDirectory(dir=path, prefix=".saving-") as name:
        folder = Path(name) / SOURCE_FOLDER
        copy_source(source_of(checkpoint), folder, source_config(checkpoint))
        if folder.is_dir() and any(folder.iterdir()):
            shutil.rmtree(path / SOURCE_FOLDER, ignore_errors=True)
            folder.replace(path / SOURCE_FOLDER)


COMPANIONS = (".json", ".model", ".txt", ".jinja")
"""Configuration, tokenizer and template files."""

NOT_COPIED = ("trainer_state.json", "adapter_config.json", "training_args.json", "llava_delta.json", "metrics.jsonl")
"""File names that are not copied: they describe a training run, an adapter or a delta."""

DTYPE_KEYS = ("torch_dtype", "dtype")


def copy_companions(source: Path, folder: Path, *, dtype: torch.dtype) -> None:
    """Copy configuration, tokenizer and template files; the copied configuration names the new dtype.

    Files that describe the training are left out. A tower that the configuration names is copied if it is inside.
    """
    for file in sorted(source.iterdir()):
        is_wanted = file.suffix in COMPANIONS and not file.name.endswith(".index.json")
        if file.is_file() and is_wanted and file.name not in NOT_COPIED:
            _check_link(file, source)
            shutil.copyfile(file, folder / file.name)
    if not (folder / CONFIG_FILE).is_file():
        return
    values = read_json(source / CONFIG_FILE)
    for name in {SOURCE_FOLDER, *(values[key] for key in TOWER_KEYS if values.get(key))}:
        copy_inside(source, folder, str(name))
    values |= {key: str(dtype).removeprefix("torch.") for key in DTYPE_KEYS if key in values}
    write_json(folder / CONFIG_FILE, values)
