"""Where a result comes from: the code, the data, the weights and the command that made it."""

from __future__ import annotations

import hashlib
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import llava

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


def git_commit() -> str | None:
    """Return the commit of this package's checkout, `+changes` when tracked files differ; None outside a checkout."""
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
    """Return the SHA-256 of a file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def weights_sha256(path: str | Path) -> str | None:
    """Return one hash over the names and bytes of a checkpoint's weight files; None when there are none."""
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


def stamp(
    *, data: Mapping[str, str | Path] | None = None, command: Sequence[str] | None = None, **facts: Any
) -> dict[str, Any]:
    """Return what every result carries.

    Args:
        data: name and path of the files used; their names and hashes are recorded, not where they lie.
        command: the words of the command; the process's own by default.
        facts: whatever else identifies the run (template, seed, metric version).
    """
    words = sys.argv if command is None else command
    return {
        "llava_version": llava.__version__,
        "git_commit": git_commit(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(words),
        "data": {name: {"file": Path(path).name, "sha256": file_sha256(path)} for name, path in (data or {}).items()},
        **facts,
    }
