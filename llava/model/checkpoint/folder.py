"""Model folders that appear whole or not at all, and the small files that go with the weights."""

from __future__ import annotations

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
from llava.model.checkpoint.formats import CONFIG_FILE, read_json
from llava.model.checkpoint.legacy_keys import TOWER_KEYS
from llava.model.source_files import SOURCE_FOLDER, copy_inside
from llava.utils.jsonl import write_json

if TYPE_CHECKING:
    import torch

COMPANIONS = (".json", ".model", ".txt", ".jinja")
"""Configuration, tokenizer and template files."""

LEFT_BEHIND = ("trainer_state.json", "adapter_config.json", "training_args.json", "llava_delta.json", "metrics.jsonl")
DTYPE_KEYS = ("torch_dtype", "dtype")

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
    if not (folder / CONFIG_FILE).is_file():
        return
    values = read_json(source / CONFIG_FILE)
    for name in {SOURCE_FOLDER, *(values[key] for key in TOWER_KEYS if values.get(key))}:
        copy_inside(source, folder, str(name))
    values |= {key: str(dtype).removeprefix("torch.") for key in DTYPE_KEYS if key in values}
    write_json(folder / CONFIG_FILE, values)
