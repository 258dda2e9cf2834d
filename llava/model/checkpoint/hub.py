"""Download checkpoints by hub name into the hub client's cache; they are then folders like any other."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download

from llava.errors import CheckpointError
from llava.model.builder import portable_path
from llava.model.checkpoint.files.shards import INDEX_SUFFIX, SAFE_FILE
from llava.model.checkpoint.formats import CONFIG_FILE, read_json
from llava.model.multimodal_encoder.towers import first_line
from llava.utils.cli import near_path

WANTED_FILES = ("*.safetensors", "*.bin", "*.json", "*.jinja", "tokenizer.model", "merges.txt")
DUPLICATE_FILES = ("pytorch_model*.bin",)
"""Duplicate weights, skipped if a repository has the model's safetensors too (`SAFE_SOURCES`)."""

SAFE_SOURCES = (SAFE_FILE, SAFE_FILE + INDEX_SUFFIX)

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def is_hub_name(path: str | Path) -> bool:
    """Return whether a path does not exist but may be the name of a repository (`owner/name`)."""
    return not Path(path).exists() and _HUB_NAME.fullmatch(str(path)) is not None


def local_folder(name: str | Path) -> Path:
    """Return a folder, or the local copy of a hub repository.

    Raises:
        CheckpointError: neither exists.
    """
    path = portable_path(str(name))
    if Path(path).is_dir():
        return Path(path)
    hint = near_path(path) if Path(path).parent.is_dir() else ""
    is_reachable = is_hub_reachable()
    try:
        if not is_reachable:  # the client would retry for a minute
            return Path(snapshot_download(path, local_files_only=True))
        return Path(snapshot_download(path, allow_patterns=list(WANTED_FILES), ignore_patterns=list(_not_needed(path))))
    except Exception as error:  # the hub client raises many types, none of which the user can act on
        reason = first_line(error) if is_reachable else "it cannot be reached, and its cache here has no such model"
        raise CheckpointError(
            f"{name} is not a folder{hint}, and cannot be downloaded from the hub: {reason}"
        ) from error


def is_hub_reachable() -> bool:
    """Return whether the hub's host name can be resolved; True with a proxy, which resolves it."""
    host = urlsplit(constants.ENDPOINT).hostname
    if getproxies() or host is None:
        return True
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True


def hub_config(name: str) -> dict[str, object]:
    """Return `config.json` of a hub repository, or an empty table if it cannot be downloaded."""
    try:
        return read_json(Path(hf_hub_download(name, CONFIG_FILE)))
    except Exception:  # no such repository, or no network: loading it reports that
        return {}


def _not_needed(name: str) -> tuple[str, ...]:
    try:
        files = HfApi().list_repo_files(name)
    except Exception:  # offline: only the cache is available
        return ()
    return DUPLICATE_FILES if any(file in SAFE_SOURCES for file in files) else ()
