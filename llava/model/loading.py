"""The one loader: a folder is recognised by what it holds, never by its name.

model        config.json (llava_med) + model*.safetensors
adapter      adapter_config.json + adapter_model.safetensors, on the parts that llava_origin.json names
projector    mm_projector.safetensors or .bin, on the same
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import PeftModel

from llava.errors import CheckpointError
from llava.model.building import Loaded, build, finish
from llava.model.checkpoint import (
    ORIGIN_FILE,
    PROJECTOR_FILE,
    PROJECTOR_SAFE_FILE,
    load_extra,
    load_projector,
)
from llava.model.modeling import LlavaMedForConditionalGeneration
from llava.model.quantization import quantization_config
from llava.processing import LlavaMedProcessor

Kind = Literal["model", "adapter", "projector"]


def kind_of(path: str | Path) -> Kind:
    """What a folder holds.

    Raises:
        CheckpointError: nothing this loader reads; says what was found.
    """
    folder = Path(path)
    names = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    if "adapter_config.json" in names:
        return "adapter"
    if names & {PROJECTOR_FILE, PROJECTOR_SAFE_FILE} and not any(_is_weights(name) for name in names):
        return "projector"
    if "config.json" in names and any(_is_weights(name) for name in names):
        model_type = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
        if model_type == "llava_med":
            return "model"
        raise CheckpointError(
            f"{path} is a model of type {model_type!r}, expected 'llava_med' as this package writes it; "
            "a plain language model is trained with --model_name_or_path and --vision_tower"
        )
    found = ", ".join(sorted(names)[:8]) or "nothing"
    raise CheckpointError(f"{path}: no model, adapter or projector; found {found}")


def _is_weights(name: str) -> bool:
    return name.startswith("model") and name.endswith((".safetensors", ".safetensors.index.json"))


def read_origin(path: str | Path) -> dict[str, Any]:
    """`llava_origin.json` of a folder, or an empty table."""
    file = Path(path) / ORIGIN_FILE
    return cast(dict[str, Any], json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def load(
    path: str | Path,
    *,
    base: str | None = None,
    dtype: torch.dtype | Literal["auto"] = "auto",
    device_map: str | None = None,
    bits: int = 16,
    merge: bool = True,
) -> Loaded:
    """Load whatever this package saved.

    Args:
        path: folder of a model, an adapter or a projector.
        base: model that an adapter or projector builds on, instead of the recorded one.
        dtype: of the weights; "auto" keeps the saved one (float32 for parts that are built anew).
        device_map: passed to transformers; None loads on the CPU.
        bits: 16, or 8 or 4 to quantize the language model.
        merge: add an adapter into the weights; False leaves it a peft adapter.

    Raises:
        CheckpointError: the folder holds nothing loadable, a part is missing, or weights do not fit.
    """
    kind = kind_of(path)
    if kind == "model":
        return _load_model(path, dtype, device_map, bits)
    loaded = _load_base(path, base, dtype, device_map, bits)
    loaded.processor = LlavaMedProcessor.from_pretrained(path)
    if kind == "projector":
        load_projector(loaded.model, path)
        return loaded
    adapted = PeftModel.from_pretrained(cast(Any, loaded.model), str(path))
    load_extra(adapted, Path(path))
    loaded.model = cast(Any, adapted.merge_and_unload() if merge else adapted)
    return loaded


def _load_model(path: str | Path, dtype: torch.dtype | str, device_map: str | None, bits: int) -> Loaded:
    compute = dtype if isinstance(dtype, torch.dtype) else torch.float32
    try:
        model, report = cast(Any, LlavaMedForConditionalGeneration).from_pretrained(
            path,
            dtype=dtype,
            device_map=device_map,
            quantization_config=quantization_config(bits, compute),
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be loaded: {str(error).splitlines()[0]}") from error
    wrong = {name: sorted(report[name])[:5] for name in ("missing_keys", "unexpected_keys") if report.get(name)}
    if wrong or report.get("mismatched_keys"):
        raise CheckpointError(f"{path}: weights do not fit the model: {wrong or report['mismatched_keys']}")
    return finish(model.eval(), LlavaMedProcessor.from_pretrained(path), {"base": str(path)})


def _load_base(
    path: str | Path, base: str | None, dtype: torch.dtype | str, device_map: str | None, bits: int
) -> Loaded:
    origin = read_origin(path)
    if base is None and "build" in origin:
        options = {**origin["build"], "bits": bits}
        return build(dtype=dtype if isinstance(dtype, torch.dtype) else torch.float32, **options)
    base = base or origin.get("base")
    if base is None:
        raise CheckpointError(f"{path} builds on another model and does not say which; give it with --model-base")
    return load(base, dtype=cast(Any, dtype), device_map=device_map, bits=bits)
