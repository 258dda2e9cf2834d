"""Files of a checkpoint that no weight file holds: its tokenizer, and a tower that it names and that lies inside it.

legacy folder --keep_source--> ours/source/ --copy_source--> legacy folder again      (hf exports carry source/ on)
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava.model.checkpoint.formats import Layout, read_json
from llava.model.checkpoint.legacy_keys import TOWER_KEYS
from llava.utils.jsonl import write_json

SOURCE_FOLDER = "source"
"""Inside a folder of ours, or an export for transformers: files of the checkpoint that it was converted from."""

TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
NEW_CLASS = "TokenizersBackend"
"""What transformers 5 calls a tokenizer that is a tokenizer.json and no more; older ones know no such class."""

SOURCE_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    TOKENIZER_CONFIG_FILE,
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
)


def source_of(layout: Layout) -> Path:
    """The folder with a checkpoint's original files: itself, or what a conversion kept; it may be absent."""
    return layout.folder if layout.kind.startswith("legacy") else layout.folder / SOURCE_FOLDER


def source_config(layout: Layout) -> dict[str, Any]:
    """config.json in the legacy layout: the checkpoint's own, or that of its source; empty where there is none."""
    if layout.kind.startswith("legacy"):
        return layout.config
    kept = layout.config.get("llava_source") or {} if layout.kind == "hf_llava" else layout.config
    return dict((kept.get("source") or {}).get("config") or {})


def copy_source(source: Path, target: Path, config: Mapping[str, Any]) -> None:
    """Copy the tokenizer's files, and the tower that a legacy configuration names, where they are inside.

    Args:
        source: see `source_of`; nothing happens where it is absent.
        target: folder, created when absent.
        config: config.json in the legacy layout.
    """
    if not source.is_dir():
        return
    copy_small_files(source, target)
    for name in {str(config[key]) for key in TOWER_KEYS if config.get(key)}:
        copy_inside(source, target, name)


def copy_small_files(source: Path, target: Path) -> None:
    """Copy the files of a tokenizer (and generation settings) that are there."""
    target.mkdir(parents=True, exist_ok=True)
    for name in SOURCE_FILES:
        if (source / name).is_file():
            with tempfile.TemporaryDirectory(dir=target, prefix=".saving-") as folder:
                copy = Path(folder) / name
                shutil.copyfile(source / name, copy)
                os.replace(copy, target / name)


def copy_inside(source: Path, folder: Path, name: str) -> bool:
    """Copy a file or folder that a checkpoint names, where it lies inside the checkpoint's folder; say whether."""
    place = Path(name)
    if place.is_absolute() or ".." in place.parts or name in ("", ".") or not (source / place).exists():
        return False
    (folder / place).parent.mkdir(parents=True, exist_ok=True)
    if (source / place).is_dir():
        shutil.copytree(source / place, folder / place, dirs_exist_ok=True)
    else:
        shutil.copyfile(source / place, folder / place)
    return True


def name_known_class(folder: Path) -> None:
    """Name a fast tokenizer as every version of transformers does, so that nobody rebuilds it by rules."""
    file = folder / TOKENIZER_CONFIG_FILE
    write_json(file, {**read_json(file), "tokenizer_class": "PreTrainedTokenizerFast"})


def keep_source(layout: Layout, path: Path) -> None:
    """Put the original files of a checkpoint beside what it was converted to, to be written back one day."""
    with tempfile.TemporaryDirectory(dir=path, prefix=".saving-") as name:
        folder = Path(name) / SOURCE_FOLDER
        copy_source(source_of(layout), folder, source_config(layout))
        if folder.is_dir() and any(folder.iterdir()):
            shutil.rmtree(path / SOURCE_FOLDER, ignore_errors=True)
            folder.replace(path / SOURCE_FOLDER)
