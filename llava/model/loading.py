"""The one loader: a folder is recognised by what it holds, never by its name.

model        config.json (llava_med) + model*.safetensors
adapter      adapter_config.json + adapter_model.safetensors, on the parts that llava_origin.json names
projector    mm_projector.safetensors or .bin, on the same
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, cast

import torch

from llava.errors import CheckpointError
from llava.model.building import Loaded, build, finish, portable
from llava.model.checkpoint import (
    ADAPTER_CONFIG_FILE,
    ORIGIN_FILE,
    PROJECTOR_FILE,
    PROJECTOR_SAFE_FILE,
    is_model_weights,
    load_adapter,
    load_projector,
)
from llava.model.config import LlavaMedConfig
from llava.model.modeling import LlavaMedForConditionalGeneration
from llava.model.multimodal_encoder.towers import UNREADABLE, first_line
from llava.model.quantization import Quantization
from llava.processing import LlavaMedProcessor

Kind = Literal["model", "adapter", "projector"]
Dtype = torch.dtype | Literal["auto"]

OUR_TYPE = LlavaMedConfig.model_type


def kind_of(path: str | Path) -> Kind:
    """What a folder holds.

    Raises:
        CheckpointError: nothing this loader reads; says what was found, and what to do.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{path}: no such folder; expected a model, an adapter or a projector of this package")
    names = {file.name for file in folder.iterdir()}
    has_weights = any(map(is_model_weights, names))
    model_type = _read_json(folder / "config.json").get("model_type")
    if model_type == OUR_TYPE:
        if ADAPTER_CONFIG_FILE in names:
            return "adapter"
        if has_weights:
            return "model"
        if names & {PROJECTOR_FILE, PROJECTOR_SAFE_FILE}:
            return "projector"
    raise CheckpointError(f"{path}: {_explain(names, model_type, has_weights)}")


def _explain(names: set[str], model_type: str | None, has_weights: bool) -> str:
    """Why a folder is not one of ours."""
    found = ", ".join(sorted(name for name in names if not name.startswith("."))[:8]) or "nothing"
    if model_type is None:
        return f"no config.json that names a model type; found {found}"
    if model_type == OUR_TYPE:
        return f"config.json without weights (model*.safetensors, adapter or {PROJECTOR_FILE}); found {found}"
    if model_type.startswith("llava"):
        return (
            f"a checkpoint of type {model_type!r} in another project's layout, expected {OUR_TYPE!r}; found {found}; "
            "train from its language model with --model_name_or_path and --vision_tower instead"
        )
    kind = "a plain language model" if has_weights else "no model of ours"
    return (
        f"{kind} (type {model_type!r}), expected {OUR_TYPE!r}; found {found}; "
        "put it together with a tower by training: --model_name_or_path and --vision_tower"
    )


def _read_json(file: Path) -> dict[str, Any]:
    """A JSON table, or an empty one where there is no file.

    Raises:
        CheckpointError: the file is broken.
    """
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds no JSON object")
    return cast(dict[str, Any], content)


def read_origin(path: str | Path) -> dict[str, Any]:
    """`llava_origin.json` of a folder, or an empty table."""
    return _read_json(Path(path) / ORIGIN_FILE)


def load(
    path: str | Path,
    *,
    base: str | None = None,
    dtype: Dtype = "auto",
    device_map: Any = None,
    bits: int = 16,
    double_quant: bool = True,
    quant_type: str = "nf4",
    merge: bool = True,
) -> Loaded:
    """Load whatever this package saved.

    Args:
        path: folder of a model, an adapter or a projector.
        base: what an adapter or projector builds on, instead of the recorded parts: a model of this package, or a plain
            language model (the recorded tower stays).
        dtype: of the weights; "auto" keeps the saved one.
        device_map: passed to transformers; None loads on the CPU.
        bits, double_quant, quant_type: of the language model, see `Quantization`.
        merge: add an adapter into the weights; False leaves it a peft adapter.

    Raises:
        CheckpointError: the folder holds nothing loadable, a part is missing, or weights do not fit.
    """
    kind, quantization = kind_of(path), Quantization(bits, double_quant, quant_type)
    if kind == "model":
        return _load_model(path, dtype, device_map, quantization)
    processor = LlavaMedProcessor.from_pretrained(path)
    loaded = _load_base(path, base, dtype, device_map, quantization)
    loaded.processor = processor
    loaded.model.config.template = processor.template.name
    if kind == "projector":
        load_projector(loaded.model, path)
        return loaded
    adapted = load_adapter(loaded.model, path)
    loaded.model = cast(Any, adapted.merge_and_unload() if merge else adapted)
    loaded.origin = {"base": portable(str(path))}  # another adapter on top builds on this one, not on its base
    return loaded


def _load_model(path: str | Path, dtype: Dtype, device_map: Any, quantization: Quantization) -> Loaded:
    processor = LlavaMedProcessor.from_pretrained(path)
    compute = dtype if isinstance(dtype, torch.dtype) else torch.float32
    try:
        model, report = cast(Any, LlavaMedForConditionalGeneration).from_pretrained(
            path,
            dtype=dtype,
            device_map=device_map,
            quantization_config=quantization.config(compute),
            output_loading_info=True,
        )
    except UNREADABLE as error:
        raise CheckpointError(f"{path} cannot be loaded: {first_line(error)}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, report.get(kind) or ())):
            some = ", ".join(names[:3])
            raise CheckpointError(f"{path}: weights do not fit the model: {len(names)} {kind} such as {some}")
    return finish(model.train(False), processor, {"base": portable(str(path))})


def _load_base(path: str | Path, base: str | None, dtype: Dtype, device_map: Any, quantization: Quantization) -> Loaded:
    """The parts that an adapter or projector builds on: given, or recorded beside it."""
    origin = read_origin(path)
    options = origin.get("build")
    if base is not None and options is not None and not _is_ours(base):
        options = {**options, "lm": base}
    elif base is not None or options is None:
        base = base or origin.get("base")
        if base is None:
            raise CheckpointError(f"{path} builds on another model and does not say which; give it with --model-base")
        if Path(base).resolve() == Path(path).resolve():
            raise CheckpointError(
                f"{path} names itself as its base; give the model it was trained on with --model-base"
            )
        return load(base, dtype=dtype, device_map=device_map, **asdict(quantization))
    try:
        loaded = build(dtype=dtype, device_map=device_map, **{**options, **asdict(quantization)})
    except TypeError as error:
        raise CheckpointError(
            f"{Path(path) / ORIGIN_FILE}: options that this version does not know: {error}"
        ) from error
    loaded.model.train(False)
    return loaded


def _is_ours(base: str) -> bool:
    return Path(base).is_dir() and _read_json(Path(base) / "config.json").get("model_type") == OUR_TYPE
