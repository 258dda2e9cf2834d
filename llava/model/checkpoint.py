"""Writing what was trained: the whole model, an adapter, or the projector alone; and reading the parts back.

Every folder also gets the processor and `llava_origin.json`: the parts that an adapter or a projector builds on.
Files are written under a temporary folder and moved into place one by one, the marker file last.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from llava.errors import CheckpointError
from llava.model.building import whole
from llava.model.card import write_card
from llava.model.layout import ADAPTER_CONFIG_FILE, ADAPTER_FILES, EXTRA_FILE, ORIGIN_FILE, first_file
from llava.model.multimodal_encoder.towers import UNREADABLE, first_line
from llava.model.names import LEGACY_PROJECTOR_PREFIX, NEWLINE
from llava.processing import LlavaMedProcessor

PROJECTOR_FILE = "mm_projector.bin"
PROJECTOR_SAFE_FILE = "mm_projector.safetensors"
ADAPTER_FILE = ADAPTER_FILES[0]
"""The one that is written; `.bin` files of other writers are read."""

EMBEDDING_KEY = "model.embed_tokens.weight"
MARKER_KEY = "marker_rows"
"""The rows of the marker tokens alone, [k, D]: where they stand in the table differs between vocabularies."""

FILES_OF_KIND = {
    "model": (),
    "adapter": (ADAPTER_CONFIG_FILE, *ADAPTER_FILES, EXTRA_FILE),
    "projector": (PROJECTOR_SAFE_FILE, PROJECTOR_FILE),
}
"""Weight files of each kind; those of a whole model are told by `is_model_weights`."""

NEWLINE_KEY = f"model.{NEWLINE}"
PROJECTOR_MODULE = "multi_modal_projector."

State = Mapping[str, Tensor]


@contextmanager
def new_files(path: Path) -> Iterator[Path]:
    """A temporary folder inside `path` whose files move up, atomically one by one, when the block ends well."""
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path, prefix=".saving-") as name:
        folder = Path(name)
        yield folder
        for file in sorted(folder.iterdir(), key=lambda file: file.name == ORIGIN_FILE):
            os.replace(file, path / file.name)


@contextmanager
def _cache_on(model: nn.Module) -> Iterator[None]:
    """Training switches `use_cache` off; what is saved has it on, or every answer would be computed without a cache."""
    config = cast(Any, model).config
    places = [place for place in (config, config.text_config) if hasattr(place, "use_cache")]
    before = [place.use_cache for place in places]
    try:
        for place in places:
            place.use_cache = True
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.use_cache = value


def write_common(folder: Path, model: nn.Module, origin: Mapping[str, Any] | None, kind: str) -> None:
    """Write the model's configuration, its card, and where its parts came from, into a folder of `new_files`."""
    with _cache_on(model):
        cast(Any, model).config.save_pretrained(folder)
    write_card(folder.parent, folder, kind, cast(Any, model).config, origin or {})
    text = json.dumps({**(origin or {}), "kind": kind}, indent=2, ensure_ascii=False) + "\n"
    (folder / ORIGIN_FILE).write_text(text, encoding="utf-8")


def is_model_weights(name: str) -> bool:
    """A file name is that of a whole model's weights (or of one part of them)."""
    return name.startswith("model") and name.endswith((".safetensors", ".safetensors.index.json"))


def drop_older(folder: Path, kind: str, new: Collection[str] = ()) -> None:
    """Remove weights of an earlier save that a reader would take instead: of other kinds, or of another sharding.

    Args:
        folder: where something of `kind` was written just now.
        kind: key of `FILES_OF_KIND`.
        new: names of the whole model's files just written.
    """
    stale = {name for other, names in FILES_OF_KIND.items() if other != kind for name in names}
    for file in list(folder.iterdir()):
        if file.name in stale or (is_model_weights(file.name) and file.name not in new):
            file.unlink()


def refuse_own_base(folder: str | Path, origin: Mapping[str, Any] | None) -> None:
    """Make sure that an adapter or a projector is not written over the model it builds on.

    Raises:
        CheckpointError: `folder` is that of a part.
    """
    build = (origin or {}).get("build") or {}
    for part in ((origin or {}).get("base"), build.get("lm"), build.get("vision_tower")):
        if part and Path(part).is_dir() and Path(part).resolve() == Path(folder).resolve():
            raise CheckpointError(f"{folder} holds the model that this builds on; write to another folder")


def save_model(
    model: PreTrainedModel,
    processor: LlavaMedProcessor,
    path: str | Path,
    *,
    state: State | None = None,
    origin: Mapping[str, Any] | None = None,
) -> None:
    """Write the whole model (safetensors, sharded as transformers does) with its processor.

    Args:
        model: the model.
        processor: saved beside the weights.
        path: folder; older weights in it, of whatever kind, are replaced, other files stay.
        state: gathered weights, when the model's own are sharded over ranks.
        origin: where the parts came from.
    """
    target = Path(path)
    with new_files(target) as folder:
        with _cache_on(model):
            model.save_pretrained(folder, state_dict=dict(state) if state is not None else None)
        write_common(folder, model, origin, "model")
        new = {file.name for file in folder.iterdir()}
    drop_older(target, "model", new)
    processor.save_pretrained(target)


def projector_state(model: nn.Module, state: State | None = None) -> dict[str, Tensor]:
    """The projector under the seeds' names (`model.mm_projector.*`), and the embeddings when markers are in use.

    Args:
        model: the model, or a peft model around it.
        state: gathered weights under the model's own names, when they are sharded.
    """
    weights = dict(state if state is not None else model.state_dict())
    result = {
        LEGACY_PROJECTOR_PREFIX + name.split(PROJECTOR_MODULE, 1)[1]: _copy(tensor)
        for name, tensor in weights.items()
        if PROJECTOR_MODULE in name
    }
    for name in [name for name in weights if name.endswith(NEWLINE)]:
        result[NEWLINE_KEY] = _copy(weights[name])
    markers = cast(Any, model).config.marker_token_ids
    if markers:
        table = weights[_input_table_name(model)]
        result[EMBEDDING_KEY], result[MARKER_KEY] = _copy(table), _copy(table[markers])
    return result


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone().contiguous()


def _input_table_name(model: nn.Module) -> str:
    table = cast(Any, model).get_input_embeddings()
    module_name: str = next(name for name, module in model.named_modules() if module is table)
    return f"{module_name}.weight"


def save_projector(
    model: nn.Module,
    processor: LlavaMedProcessor,
    path: str | Path,
    *,
    state: State | None = None,
    origin: Mapping[str, Any] | None = None,
) -> None:
    """Write `mm_projector.bin` (the seeds' names), its safetensors twin, the config and the processor."""
    target = Path(path)
    refuse_own_base(target, origin)
    with new_files(target) as folder:
        weights = projector_state(model, state)
        torch.save(weights, folder / PROJECTOR_FILE)
        save_file(weights, folder / PROJECTOR_SAFE_FILE)
        write_common(folder, model, origin, "projector")
    drop_older(target, "projector")
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
        raise CheckpointError(f"{path} cannot be read: {first_line(error)}") from error
    except Exception as error:  # torch.load raises pickle.UnpicklingError and others for foreign content
        raise CheckpointError(f"{path} holds more than tensors and was not loaded: {type(error).__name__}") from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path} holds no table of tensors; expected a state dictionary")
    return content


def projector_file(path: str | Path) -> Path:
    """The projector file of a folder (safetensors first), or `path` itself where it is a file.

    Raises:
        CheckpointError: there is none.
    """
    given = Path(path)
    for file in (given / PROJECTOR_SAFE_FILE, given / PROJECTOR_FILE, given):
        if file.is_file():
            return file
    raise CheckpointError(f"{path}: no projector; expected a file, or a folder with {PROJECTOR_FILE}")


def load_projector(model: nn.Module, path: str | Path) -> None:
    """Load a projector file, or the one in a folder, into the model.

    Names of every generation are read: all that follows `mm_projector.` (or `multi_modal_projector.`) counts. The rows
    of the marker tokens come along when the model uses markers and the file has embeddings.

    Raises:
        CheckpointError: names or shapes do not fit; says which.
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


def _load_newline(model: nn.Module, weights: State, file: Path) -> None:
    """Take the token at the end of a row of patches, where the file has it.

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
    """transformers' own Llava calls the two layers of its MLP `linear_1` and `linear_2`."""
    return name.replace("linear_1.", "0.").replace("linear_2.", "2.")


def _set(parameter: Tensor, values: Tensor) -> None:
    with torch.no_grad(), whole(parameter):
        parameter.copy_(values)


def load_marker_rows(model: nn.Module, weights: Mapping[str, Tensor], file: Path) -> None:
    """Take the markers' embedding rows from a projector or adapter file; no other row is ever taken.

    A file of the seeds holds the whole input table, or the new rows alone; its last rows are the markers.

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
    with torch.no_grad(), whole(table):
        table[markers] = rows[-len(markers) :].to(table.device, table.dtype)


def save_adapter(
    model: Any,
    processor: LlavaMedProcessor,
    path: str | Path,
    *,
    state: State | None = None,
    origin: Mapping[str, Any] | None = None,
) -> None:
    """Write a peft adapter, and in `non_lora_trainables.bin` all else that its base does not have.

    That is every other trained weight, and also the projector and the marker rows where they were not trained: they
    may come from an earlier stage, while the base is put together anew at loading.
    """
    target = Path(path)
    refuse_own_base(target, origin)
    with new_files(target) as folder:
        model.save_pretrained(
            folder, state_dict=dict(state) if state is not None else None, save_embedding_layers=False
        )
        (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card
        weights = dict(state if state is not None else model.state_dict())
        parameters = {name: p for name, p in model.named_parameters() if "lora_" not in name}
        kept = {name for name, p in parameters.items() if p.requires_grad or PROJECTOR_MODULE in name}
        kept |= {name for name in parameters if name.endswith(NEWLINE)}
        extra = {name: _copy(weights[name]) for name in sorted(kept)}
        if markers := model.config.marker_token_ids:
            extra[MARKER_KEY] = _copy(weights[_input_table_name(model)][markers])
        torch.save(extra, folder / EXTRA_FILE)
        write_common(folder, model, origin, "adapter")
    drop_older(target, "adapter")
    processor.save_pretrained(target)


def load_adapter(model: PreTrainedModel, path: str | Path) -> PeftModel:
    """Put a saved adapter on the model it was trained on, and load what was saved beside it.

    Raises:
        CheckpointError: files are missing or broken, or weights do not fit the model.
    """
    file = first_file(Path(path), ADAPTER_FILES) or Path(path) / ADAPTER_FILE
    got = set(read_tensors(file))
    try:
        adapted = PeftModel.from_pretrained(cast(Any, model), str(path))
    except UNREADABLE as error:
        raise CheckpointError(f"{path}: the adapter does not fit the model: {first_line(error)}") from error
    check_adapter_names(adapted, got, file)
    load_extra(adapted, path)
    return adapted


def check_adapter_names(adapted: Any, names: Collection[str], file: Path) -> None:
    """Make sure that a file holds the weights of the adapter on a model, all of them and no others.

    Raises:
        CheckpointError: it does not; says which.
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
