"""Model folders that appear whole or not at all, and the small files that go with the weights."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from llava.errors import CheckpointError

if TYPE_CHECKING:
    import torch

COMPANIONS = (".json", ".model", ".txt", ".jinja")
"""Configuration, tokenizer and template files."""

LEFT_BEHIND = ("trainer_state.json", "training_args.json", "llava_delta.json", "metrics.jsonl")
DTYPE_KEYS = ("torch_dtype", "dtype")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its name when the block ends well, and vanishes otherwise.

    Raises:
        CheckpointError: `path` exists and is no empty folder.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(f"{path} exists already; name a new folder, nothing is overwritten")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())  # a temporary folder is private, a model folder is not
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def copy_companions(source: Path, folder: Path, *, dtype: torch.dtype) -> None:
    """Copy what is no weight and no leftover of training; the configuration names the new dtype."""
    for file in sorted(source.iterdir()):
        is_wanted = file.suffix in COMPANIONS and not file.name.endswith(".index.json")
        if file.is_file() and is_wanted and file.name not in LEFT_BEHIND:
            shutil.copyfile(file, folder / file.name)
    config = folder / "config.json"
    if not config.is_file():
        return
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{source / config.name} cannot be read as JSON: {error}") from error
    values |= {key: str(dtype).removeprefix("torch.") for key in DTYPE_KEYS if key in values}
    config.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
