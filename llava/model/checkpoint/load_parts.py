"""Load what was saved instead of a whole model: a projector, marker rows, an adapter.

file --read_tensors--> names and tensors --load_projector, load_adapter, load_extra--> into the model, or an error
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from llava.errors import CheckpointError
from llava.model.builder import gathered_weight
from llava.model.checkpoint.formats import (
    ADAPTER_FILE,
    ADAPTER_FILES,
    EXTRA_FILE,
    PROJECTOR_FILE,
    PROJECTOR_SAFE_FILE,
    first_file,
)
from llava.model.checkpoint.weight_names import MARKER_KEY, NEWLINE, PROJECTOR_MODULE
from llava.model.multimodal_encoder.towers import UNREADABLE, first_line
from llava.model.torch_files.loading import load_torch_file


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a `.safetensors` or `.bin` file.

    Raises:
        CheckpointError: the file is missing, broken, or holds more than tensors (a pickle with code).
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; expected a .bin or .safetensors file with weights")
    try:
        content = load_file(path) if path.suffix == ".safetensors" else load_torch_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {first_line(error)}") from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path} holds no table of tensors; expected a state dictionary")
    return content


def projector_file(path: str | Path) -> Path:
    """Return the projector file of a folder (safetensors first), or `path` itself if it is a file.

    Raises:
        CheckpointError: it does not exist.
    """
    given = Path(path)
    for file in (given / PROJECTOR_SAFE_FILE, given / PROJECTOR_FILE, given):
        if file.is_file():
            return file
    raise CheckpointError(f"{path}: no projector; expected a file, or a folder with {PROJECTOR_FILE}")


def load_projector(model: nn.Module, path: str | Path) -> None:
    """Load a projector file, or the one in a folder, into the model.

    Names of every version are read: the part after `mm_projector.` (or `multi_modal_projector.`) counts. The rows of
    the marker tokens are loaded if the model uses markers and the file has embeddings.

    Raises:
        CheckpointError: names or shapes do not fit; the message lists them.
    """
    file = projector_file(path)
    weights = read_tensors(file)
    found: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        for marker in ("mm_projector.", PROJECTOR_MODULE):
            if marker in name:
                found[_current_name(name.split(marker, 1)[1])] = tensor
    projector = next(m for name, m in model.named_modules() if name.endswith(PROJECTOR_MODULE[:-1]))
    parameters = dict(projector.named_parameters())
    expected = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in parameters.items()}
    got = {name: tuple(tensor.shape) for name, tensor in found.items()}
    if expected != got:
        raise CheckpointError(f"{file}: the projector does not fit; got {got}, expected {expected}")
    for name, tensor in found.items():
        _set(parameters[name], tensor)
    _load_newline(model, weights, file)
    load_marker_rows(model, weights, file)


def _load_newline(model: nn.Module, weights: Mapping[str, Tensor], file: Path) -> None:
    """Load the embedding at the end of a row of patches, if the file has it.

    Raises:
        CheckpointError: the model has none, or one of another length.
    """
    stored = next((tensor for name, tensor in weights.items() if name.endswith(NEWLINE)), None)
    if stored is None:
        return
    own = next((p for name, p in model.named_parameters() if name.endswith(NEWLINE)), None)
    shape = None if own is None else tuple(getattr(own, "ds_shape", own.shape))
    if own is None or shape != tuple(stored.shape):
        raise CheckpointError(
            f"{file}: {NEWLINE} {tuple(stored.shape)} does not fit; the model has {shape}. It belongs to "
            "mm_patch_merge_type spatial_unpad"
        )
    _set(own, stored)


def _current_name(name: str) -> str:
    """Replace transformers' names of the MLP's two layers, `linear_1` and `linear_2`, by ours."""
    return name.replace("linear_1.", "0.").replace("linear_2.", "2.")


def _set(parameter: Tensor, values: Tensor) -> None:
    with torch.no_grad(), gathered_weight(parameter):
        parameter.copy_(values)


def load_marker_rows(model: nn.Module, weights: Mapping[str, Tensor], file: Path) -> None:
    """Load the markers' embedding rows from a projector or adapter file, and no other row.

    A file of the original trainers holds the whole input table, or the new rows alone; its last rows are the markers.

    Raises:
        CheckpointError: the rows have another width.
    """
    markers = cast(Any, model).config.marker_token_ids
    tables = [tensor for name, tensor in weights.items() if name.endswith(("embed_tokens.weight", "embed_in.weight"))]
    rows = weights.get(MARKER_KEY, tables[0] if tables else None)
    if not markers or rows is None:
        return
    table: Any = cast(Any, model).get_input_embeddings().weight
    width = getattr(table, "ds_shape", table.shape)[-1]
    if rows.dim() != 2 or rows.shape[1] != width or rows.shape[0] < len(markers):
        raise CheckpointError(f"{file}: embedding rows are {tuple(rows.shape)}, expected {len(markers)} of {width}")
    with torch.no_grad(), gathered_weight(table):
        table[markers] = rows[-len(markers) :].to(table.device, table.dtype)


def load_adapter(model: PreTrainedModel, path: str | Path) -> PeftModel:
    """Load a saved adapter, and the other weights saved with it, onto the model it was trained on.

    Raises:
        CheckpointError: files are missing or broken, or weights do not fit the model.
    """
    file = first_file(Path(path), ADAPTER_FILES) or Path(path) / ADAPTER_FILE
    got = set(read_tensors(file))
    try:
        adapted = PeftModel.from_pretrained(cast(Any, model), str(path))
    except (ImportError, *UNREADABLE) as error:  # a setting may need another package
        raise CheckpointError(f"{path}: the adapter does not fit the model: {first_line(error)}") from error
    check_adapter_names(adapted, got, file)
    load_extra(adapted, path)
    return adapted


def check_adapter_names(adapted: Any, names: Collection[str], file: Path) -> None:
    """Check that a file holds the weights of the adapter on a model, all of them and no others.

    Raises:
        CheckpointError: it does not; the message names some that differ.
    """
    expected = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    if expected != set(names):
        some = ", ".join(sorted(expected ^ set(names))[:3])
        raise CheckpointError(f"{file}: the adapter does not fit the model; only in one of the two: {some}")


def load_extra(model: nn.Module, path: str | Path) -> None:
    """Load `non_lora_trainables.bin` into a peft model; every name must exist.

    Raises:
        CheckpointError: a name is unknown or a shape differs.
    """
    file = Path(path) / EXTRA_FILE
    weights = read_tensors(file)
    parameters = dict(model.named_parameters())
    for name, tensor in weights.items():
        if name == MARKER_KEY:
            continue
        parameter: Any = parameters.get(name)
        shape = None if parameter is None else tuple(getattr(parameter, "ds_shape", parameter.shape))
        if shape != tuple(tensor.shape):
            raise CheckpointError(f"{file}: {name} {tuple(tensor.shape)} does not fit; the model has {shape}")
        _set(parameter, tensor)
    load_marker_rows(model, weights, file)
