"""Load a torch file as tensors and plain values: bounds checked first, read without running code."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from llava.errors import CheckpointError
from llava.model.torch_files.archive import check_torch_file, is_archive

MORE_THAN_TENSORS = (
    "holds more than tensors and plain values, such as code, and was not loaded; "
    "if you trust the file, save its state dictionary alone"
)


def load_torch_file(file: Path, *, mmap: bool = False) -> Any:
    """Return the content of a torch file on the CPU.

    Args:
        file: file written by `torch.save`.
        mmap: map its tensors instead of reading them, unless the file is older than torch 1.6.

    Raises:
        CheckpointError: the file is broken, exceeds a bound, or holds more than tensors and plain values.
    """
    check_torch_file(file)
    is_mapped = mmap and is_archive(file)  # older files cannot be mapped into memory
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=is_mapped)
    except pickle.UnpicklingError as error:  # its message advises to run the code in the file
        raise CheckpointError(f"{file} {MORE_THAN_TENSORS}") from error
    except Exception as error:  # of many kinds for damaged content
        raise CheckpointError(f"{file} cannot be read: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
