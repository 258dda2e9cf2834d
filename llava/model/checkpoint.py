"""Writing what was trained: the whole model, an adapter, or the projector alone; and reading the parts back.

Every folder also gets the processor and `llava_origin.json`: the parts that an adapter or a projector builds on.
Files are written under a temporary folder and moved into place one by one, the marker file last.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from llava.errors import CheckpointError
from llava.processing import LlavaMedProcessor

ORIGIN_FILE = "llava_origin.json"
PROJECTOR_FILE = "mm_projector.bin"
PROJECTOR_SAFE_FILE = "mm_projector.safetensors"
EXTRA_FILE = "non_lora_trainables.bin"
EMBEDDING_KEY = "model.embed_tokens.weight"
HEAD_KEY = "lm_head.weight"
PROJECTOR_PREFIX = "model.mm_projector."
PROJECTOR_MODULE = "multi_modal_projector."


@contextmanager
def _new_files(path: Path) -> Iterator[Path]:
    """A temporary folder inside `path` whose files move up, atomically one by one, when the block ends well."""
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path, prefix=".saving-") as name:
        folder = Path(name)
        yield folder
        for file in sorted(folder.iterdir(), key=lambda file: file.name == ORIGIN_FILE):
            os.replace(file, path / file.name)


def _write_common(folder: Path, model: nn.Module, processor: LlavaMedProcessor, origin: Mapping[str, Any]) -> None:
    config = cast(Any, model).config
    use_cache, config.text_config.use_cache = config.text_config.use_cache, True
    try:
        config.save_pretrained(folder)
    finally:
        config.text_config.use_cache = use_cache
    (folder / ORIGIN_FILE).write_text(json.dumps(dict(origin), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save_model(
    model: PreTrainedModel,
    processor: LlavaMedProcessor,
    path: str | Path,
    *,
    state: Mapping[str, Tensor] | None = None,
    origin: Mapping[str, Any] | None = None,
) -> None:
    """Write the whole model (safetensors, sharded as transformers does) with its processor.

    Args:
        model: the model.
        processor: saved beside the weights.
        path: folder; other files in it stay.
        state: gathered weights, when the model's own are sharded over ranks.
        origin: where the parts came from.
    """
    target = Path(path)
    with _new_files(target) as folder:
        _write_common(folder, model, processor, {**(origin or {}), "kind": "model"})
        use_cache, model.config.text_config.use_cache = model.config.text_config.use_cache, True
        model.save_pretrained(folder, state_dict=dict(state) if state is not None else None)
        model.config.text_config.use_cache = use_cache
    processor.save_pretrained(target)


def projector_state(model: nn.Module, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The projector under the seeds' names (`model.mm_projector.*`), and the embeddings when markers are in use.

    Args:
        model: the model, or a peft model around it.
        state: gathered weights under the model's own names, when they are sharded.
    """
    weights = dict(state if state is not None else model.state_dict())
    result: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if PROJECTOR_MODULE in name:
            suffix = name.split(PROJECTOR_MODULE, 1)[1].replace("modules_to_save.default.", "")
            result[PROJECTOR_PREFIX + suffix] = tensor.detach().cpu().clone()
    if cast(Any, model).config.use_im_start_end:
        for name, tensor in weights.items():
            if name.endswith("language_model.embed_tokens.weight"):
                result[EMBEDDING_KEY] = tensor.detach().cpu().clone()
            elif name.endswith(HEAD_KEY) and not cast(Any, model).config.tie_word_embeddings:
                result[HEAD_KEY] = tensor.detach().cpu().clone()
    return result


def save_projector(
    model: nn.Module,
    processor: LlavaMedProcessor,
    path: str | Path,
    *,
    state: Mapping[str, Tensor] | None = None,
    origin: Mapping[str, Any] | None = None,
) -> None:
    """Write `mm_projector.bin` (the seeds' names), its safetensors twin, the config and the processor."""
    target = Path(path)
    with _new_files(target) as folder:
        weights = projector_state(model, state)
        torch.save(weights, folder / PROJECTOR_FILE)
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / PROJECTOR_SAFE_FILE)
        _write_common(folder, model, processor, {**(origin or {}), "kind": "projector"})
    processor.save_pretrained(target)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a `.safetensors` or `.bin` file; a pickle that holds anything but tensors is refused.

    Raises:
        CheckpointError: the file is missing, broken or not safe.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; expected a .bin or .safetensors file with weights")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, OSError, ValueError, EOFError) as error:
        raise CheckpointError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    except Exception as error:  # torch.load raises pickle.UnpicklingError and others for foreign content
        raise CheckpointError(f"{path} holds more than tensors and was not loaded: {type(error).__name__}") from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path} holds no table of tensors; expected a state dictionary")
    return content


def load_projector(model: nn.Module, path: str | Path) -> None:
    """Load a projector file, or the one in a folder, into the model.

    Names of every generation are read: all that follows `mm_projector.` (or `multi_modal_projector.`) counts. Embedding
    rows come along when the model uses markers and the file has them.

    Raises:
        CheckpointError: names or shapes do not fit; says which.
    """
    file = Path(path)
    if file.is_dir():
        file = next((file / n for n in (PROJECTOR_SAFE_FILE, PROJECTOR_FILE) if (file / n).is_file()), file)
    weights = read_tensors(file)
    projector = _projector(model)
    found: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        for marker in ("mm_projector.", PROJECTOR_MODULE):
            if marker in name:
                found[name.split(marker, 1)[1]] = tensor
    expected = {name: tuple(tensor.shape) for name, tensor in projector.state_dict().items()}
    got = {name: tuple(tensor.shape) for name, tensor in found.items()}
    if expected != got:
        raise CheckpointError(f"{file}: the projector does not fit; got {got}, expected {expected}")
    projector.load_state_dict(found)
    _load_rows(model, weights, file)


def _projector(model: nn.Module) -> nn.Module:
    found: nn.Module = next(module for name, module in model.named_modules() if name.endswith(PROJECTOR_MODULE[:-1]))
    return found


def _load_rows(model: nn.Module, weights: Mapping[str, Tensor], file: Path) -> None:
    """Take embedding rows from a projector file; only models with markers have trained any."""
    network = cast(Any, model)
    if not network.config.use_im_start_end:
        return
    layers = {EMBEDDING_KEY: network.get_input_embeddings(), HEAD_KEY: network.get_output_embeddings()}
    for key, layer in layers.items():
        rows = next((tensor for name, tensor in weights.items() if name.endswith(key.removeprefix("model."))), None)
        if rows is None:
            continue
        if rows.shape != layer.weight.shape:
            raise CheckpointError(f"{file}: {key} is {tuple(rows.shape)}, the model's is {tuple(layer.weight.shape)}")
        with torch.no_grad():
            layer.weight.copy_(rows)


def save_adapter(
    model: Any,
    processor: LlavaMedProcessor,
    path: str | Path,
    *,
    state: Mapping[str, Tensor] | None = None,
    origin: Mapping[str, Any] | None = None,
) -> None:
    """Write a peft adapter, and every other trained weight (projector, markers) in `non_lora_trainables.bin`."""
    target = Path(path)
    with _new_files(target) as folder:
        model.save_pretrained(folder, state_dict=dict(state) if state is not None else None)
        (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card
        weights = dict(state if state is not None else model.state_dict())
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        extra = {name: weights[name].detach().cpu().clone() for name in trained if "lora_" not in name}
        torch.save(extra, folder / EXTRA_FILE)
        _write_common(folder, model, processor, {**(origin or {}), "kind": "adapter"})
    processor.save_pretrained(target)


def load_extra(model: nn.Module, path: Path) -> None:
    """Load `non_lora_trainables.bin` into a peft model; every name must exist.

    Raises:
        CheckpointError: a name is unknown or a shape differs.
    """
    weights = read_tensors(path / EXTRA_FILE)
    parameters = dict(model.named_parameters())
    for name, tensor in weights.items():
        parameter = parameters.get(name)
        if parameter is None or parameter.shape != tensor.shape:
            shape = None if parameter is None else tuple(parameter.shape)
            raise CheckpointError(
                f"{path / EXTRA_FILE}: {name} {tuple(tensor.shape)} does not fit; the model has {shape}"
            )
        with torch.no_grad():
            parameter.copy_(tensor)
