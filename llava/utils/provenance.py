"""Provenance of a result: code, data, weights and command; all hashes of files and weights."""

from __future__ import annotations

import hashlib
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import llava
from llava.utils.plugins import loaded_plugins

if TYPE_CHECKING:
    from torch import Tensor

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


def git_commit() -> str | None:
    """Return the git commit of this package, `+changes` if tracked files differ; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{head}+changes" if changed else head


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.strip()


def file_sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file, read in chunks."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return a tensor's bytes without a copy (except for one that is not contiguous or not on the CPU)."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return cast(memoryview, cast(Any, flat.view(torch.uint8).numpy()).data) if flat.numel() else memoryview(b"")


class TensorHash:
    """Running SHA-256 over tensors: a text about each and its bytes, in the order they are added."""

    def __init__(self, start: str = "") -> None:
        self._digest = hashlib.sha256(start.encode())

    def add(self, text: str, tensor: Tensor) -> None:
        """Add one tensor; the text names it, and its type and shape where these matter."""
        self._digest.update(text.encode())
        self._digest.update(tensor_bytes(tensor))

    def value(self) -> str:
        """Return the hexadecimal digest."""
        return self._digest.hexdigest()


def weights_sha256(path: str | Path) -> str | None:
    """Return one SHA-256 over names and bytes of the weight files of a checkpoint; None without any."""
    path = Path(path)
    if path.is_file():
        return file_sha256(path)
    files = sorted(file for file in path.glob("*") if file.suffix in WEIGHT_SUFFIXES) if path.is_dir() else []
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {file_sha256(file)}\n".encode())
    return digest.hexdigest()


def provenance_fields(
    *, data: Mapping[str, str | Path] | None = None, command: Sequence[str] | None = None, **facts: Any
) -> dict[str, Any]:
    """Return the provenance fields of a result.

    Args:
        data: names and paths of input files; file names and hashes are recorded, folders are not.
        command: words of the command; by default those of the process.
        facts: other fields that identify the run (template, seed, metric version).
    """
    words = sys.argv if command is None else command
    return {
        "llava_version": llava.__version__,
        "git_commit": git_commit(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(words),
        **({"plugins": loaded} if (loaded := loaded_plugins()) else {}),
        "data": {name: {"file": Path(path).name, "sha256": file_sha256(path)} for name, path in (data or {}).items()},
        **facts,
    }
