"""Model folders that appear whole or not at all, and the small files that go with the weights."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from llava.errors import CheckpointError, LlavaError

if TYPE_CHECKING:
    import torch

COMPANIONS = (".json", ".model", ".txt", ".jinja")
"""Configuration, tokenizer and template files."""

LEFT_BEHIND = ("trainer_state.json", "adapter_config.json", "training_args.json", "llava_delta.json", "metrics.jsonl")
DTYPE_KEYS = ("torch_dtype", "dtype")

TOWER_KEYS = ("mm_vision_tower", "mm_vision_tower_config", "mm_vision_tower_checkpoint")
"""Keys of config.json that may name a folder or a file beside it."""

SOURCE_FOLDER = "source"
"""Small files that a converted checkpoint keeps (`legacy_export`)."""

TERMINATED = 143
"""Exit status of a program that SIGTERM ended, as shells write it."""


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its name when the block ends well, and vanishes otherwise.

    Raises:
        CheckpointError: `path` exists and is no empty folder, or cannot be written (a full disk).
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(f"{path} exists already; name a new folder, nothing is overwritten")
    missing = [parent for parent in path.parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        private = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name[:200]}-"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be made: {error.strerror}") from error
    try:
        with _terminable():
            temporary = private / path.name  # of the final name, which model cards carry
            temporary.mkdir()
            yield temporary
            os.replace(temporary, path)
            private.rmdir()
    except BaseException as error:
        shutil.rmtree(private, ignore_errors=True)
        for parent in missing:
            parent.rmdir()
        if isinstance(error, OSError) and not isinstance(error, LlavaError):
            raise CheckpointError(f"{path} cannot be written: {error.strerror or error}") from error
        raise


@contextmanager
def _terminable() -> Iterator[None]:
    """Inside the block SIGTERM (the end of a batch job) is an exception, so that the temporary folder goes."""

    def stop(number: int, frame: Any) -> NoReturn:
        raise SystemExit(TERMINATED)

    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def copy_companions(source: Path, folder: Path, *, dtype: torch.dtype) -> None:
    """Copy what is no weight and no leftover of training; the configuration names the new dtype.

    A tower that the configuration names and that lies in the folder comes along.
    """
    for file in sorted(source.iterdir()):
        is_wanted = file.suffix in COMPANIONS and not file.name.endswith(".index.json")
        if file.is_file() and is_wanted and file.name not in LEFT_BEHIND:
            shutil.copyfile(file, folder / file.name)
    config = folder / "config.json"
    if not config.is_file():
        return
    try:
        values = dict(json.loads(config.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{source / config.name} cannot be read as a JSON object: {error}") from error
    for name in {SOURCE_FOLDER, *(values[key] for key in TOWER_KEYS if values.get(key))}:
        copy_inside(source, folder, str(name))
    values |= {key: str(dtype).removeprefix("torch.") for key in DTYPE_KEYS if key in values}
    write_json(config, values)


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


def write_json(file: Path, content: Any) -> None:
    """Write a JSON file of a folder that is not in its place yet."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
