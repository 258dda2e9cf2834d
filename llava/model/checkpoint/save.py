"""Save the whole model, an adapter, or the projector alone; `load_parts` loads the last two.

Every folder also gets the processor and `llava_origin.json`: the parts that an adapter or a projector builds on.
Files are written to a temporary folder and moved into place one by one, `llava_origin.json` last.
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
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from llava.errors import CheckpointError
from llava.model.checkpoint.formats import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILES,
    EXTRA_FILE,
    ORIGIN_FILE,
    PROJECTOR_FILE,
    PROJECTOR_SAFE_FILE,
)
from llava.model.checkpoint.model_card import write_card
from llava.model.checkpoint.plugged import record_plugins
from llava.model.checkpoint.weight_names import LEGACY_PROJECTOR_PREFIX, MARKER_KEY, NEWLINE, PROJECTOR_MODULE
from llava.processing import LlavaMedProcessor
from llava.utils.jsonl import follow_umask

EMBEDDING_KEY = "model.embed_tokens.weight"
FILES_OF_KIND = {
    "model": (),
    "adapter": (ADAPTER_CONFIG_FILE, *ADAPTER_FILES, EXTRA_FILE),
    "projector": (PROJECTOR_SAFE_FILE, PROJECTOR_FILE),
}
"""Weight files of each kind; those of a whole model are recognized by `is_model_weights`."""

NEWLINE_KEY = f"model.{NEWLINE}"

State = Mapping[str, Tensor]


@contextmanager
def new_files(path: Path) -> Iterator[Path]:
    """Yield a temporary folder in `path`; if the block succeeds, move its files up, each atomically."""
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path, prefix=".saving-") as name:
        folder = Path(name)
        yield folder
        follow_umask(folder)
        for file in sorted(folder.iterdir(), key=lambda file: file.name == ORIGIN_FILE):
            os.replace(file, path / file.name)


@contextmanager
def _cache_on(model: nn.Module) -> Iterator[None]:
    """Set `use_cache` during a save."""
    # Training switches it off, and a model that is saved without it would generate without a cache.
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
    """Write the model's configuration, its card and its origin into a folder of `new_files`."""
    record_plugins(cast(Any, model).config)
    with _cache_on(model):
        cast(Any, model).config.save_pretrained(folder)
    write_card(folder.parent, folder, kind, cast(Any, model).config, origin or {})
    text = json.dumps({**(origin or {}), "kind": kind}, indent=2, ensure_ascii=False) + "\n"
    (folder / ORIGIN_FILE).write_text(text, encoding="utf-8")


def is_model_weights(name: str) -> bool:
    """Return whether a file name is that of a whole model's weights (or of one shard of them)."""
    return name.startswith("model") and name.endswith((".safetensors", ".safetensors.index.json"))


def drop_older(folder: Path, kind: str, new: Collection[str] = ()) -> None:
    """Remove an earlier save's weights that a reader would use instead: of other kinds or shardings.

    Args:
        folder: folder in which something of `kind` was just written.
        kind: key of `FILES_OF_KIND`.
        new: names of the whole model's files just written.
    """
    stale = {name for other, names in FILES_OF_KIND.items() if other != kind for name in names}
    for file in list(folder.iterdir()):
        if file.name in stale or (is_model_weights(file.name) and file.name not in new):
            file.unlink()


def check_not_own_base(folder: str | Path, origin: Mapping[str, Any] | None) -> None:
    """Check that an adapter or a projector is not written over the model it builds on.

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
        processor: saved with the weights.
        path: folder; older weights in it, of any kind, are replaced, other files stay.
        state: gathered weights, when the model's own are sharded over ranks.
        origin: origin of the parts, see `LoadedModel`.
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
    """Return the projector under legacy names (`model.mm_projector.*`), with embeddings for markers.

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
    """Write `mm_projector.bin` (legacy names) and `.safetensors`, the configuration and the processor."""
    target = Path(path)
    check_not_own_base(target, origin)
    with new_files(target) as folder:
        weights = projector_state(model, state)
        torch.save(weights, folder / PROJECTOR_FILE)
        save_file(weights, folder / PROJECTOR_SAFE_FILE)
        write_common(folder, model, origin, "projector")
    drop_older(target, "projector")
    processor.save_pretrained(target)


def _is_peft(name: str) -> bool:
    """Return whether peft's own file holds a weight: adapters, and modules that train in full beside them."""
    return "lora_" in name or ".modules_to_save." in name


def save_adapter(
    model: Any,
    processor: LlavaMedProcessor,
    path: str | Path,
    *,
    state: State | None = None,
    origin: Mapping[str, Any] | None = None,
) -> None:
    """Write a peft adapter, and to `non_lora_trainables.bin` everything else that its base does not have.

    That is every other trained weight, and also the projector and the marker rows where they were not trained: they
    may come from an earlier stage, while loading assembles the base from its original parts.
    """
    target = Path(path)
    check_not_own_base(target, origin)
    with new_files(target) as folder:
        model.save_pretrained(
            folder, state_dict=dict(state) if state is not None else None, save_embedding_layers=False
        )
        (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card
        weights = dict(state if state is not None else model.state_dict())
        parameters = {name: p for name, p in model.named_parameters() if not _is_peft(name)}
        kept = {name for name, p in parameters.items() if p.requires_grad or PROJECTOR_MODULE in name}
        kept |= {name for name in parameters if name.endswith(NEWLINE)}
        extra = {name: _copy(weights[name]) for name in sorted(kept)}
        if markers := model.config.marker_token_ids:
            extra[MARKER_KEY] = _copy(weights[_input_table_name(model)][markers])
        torch.save(extra, folder / EXTRA_FILE)
        write_common(folder, model, origin, "adapter")
    drop_older(target, "adapter")
    processor.save_pretrained(target)
