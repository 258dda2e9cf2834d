"""Load a checkpoint of any supported format, which is recognized by content (`formats`).

model        config.json (llava_med) + model*.safetensors
adapter      adapter_config.json + adapter_model.safetensors, on the parts that llava_origin.json names
projector    mm_projector.safetensors or .bin, on the same
others       the legacy formats (`legacy.load`) and transformers' Llava (`load_hf`)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch

from llava.errors import CheckpointError, ConfigError
from llava.model.anyres import use_policy
from llava.model.builder import LoadedModel, build_model, finish_model, portable_path
from llava.model.checkpoint.assemble import LoadOptions, check_report, quiet_transformers
from llava.model.checkpoint.formats import KINDS, ORIGIN_FILE, OUR_KINDS, OUR_TYPE, Checkpoint, Kind, read_json
from llava.model.checkpoint.hub import is_hub_name, local_folder
from llava.model.checkpoint.legacy.load import load_legacy
from llava.model.checkpoint.load_hf import load_hf
from llava.model.checkpoint.load_parts import load_adapter, load_projector
from llava.model.modeling import LlavaMedForConditionalGeneration
from llava.model.multimodal_encoder.towers import UNREADABLE, first_line
from llava.model.quantization import Quantization
from llava.processing import LlavaMedProcessor

Dtype = torch.dtype | Literal["auto"]

PART_FLAGS = {
    "base": "--model-base",
    "vision_tower": "--vision-tower",
    "vision_tower_config": "--vision-tower-config",
    "vision_tower_checkpoint": "--vision-tower-checkpoint",
    "tower_adapter": "--lora-pretrain",
    "template": "--template",
}
USED_PARTS: dict[Kind, tuple[str, ...]] = {
    "model": ("template",),
    "hf_llava": ("template",),
    "adapter": ("base", "template"),
    "projector": ("base", "template"),
}
"""Options that apply to a checkpoint that holds or names its other parts itself; the other kinds take all of them."""


def read_origin(path: str | Path) -> dict[str, Any]:
    """Return `llava_origin.json` of a folder, or an empty table."""
    return read_json(Path(path) / ORIGIN_FILE)


def load_checkpoint(
    path: str | Path,
    *,
    base: str | None = None,
    dtype: Dtype = "auto",
    device_map: Any = None,
    bits: int = 16,
    double_quant: bool = True,
    quant_type: str = "nf4",
    merge: bool = True,
    **foreign: Any,
) -> LoadedModel:
    """Load a checkpoint of this package, of the legacy formats, or of transformers' Llava.

    Args:
        path: folder (or hub name) of a model, an adapter or a projector.
        base: what an adapter or projector builds on, instead of the recorded parts: a model of this package, or a plain
            language model (the recorded tower stays).
        dtype: dtype of the weights; "auto" keeps the saved one.
        device_map: passed to transformers; None loads on the CPU.
        bits, double_quant, quant_type: quantization of the language model, see `Quantization`.
        merge: add an adapter to the weights; False keeps it as a peft adapter.
        foreign: parts of checkpoints of other formats, see `LoadOptions` (`vision_tower`, `template`, ...); all
            kinds take a `template`.

    Raises:
        CheckpointError: the folder holds nothing loadable, a part is missing, or weights do not fit.
        ConfigError: an option does not apply to this kind of checkpoint, see `USED_PARTS`.

    Example::

        loaded = load_checkpoint("checkpoints/llava-med-v1.5")
        model, processor = loaded.model, loaded.processor
    """
    path = local_folder(path) if is_hub_name(path) else path
    checkpoint, quantization = Checkpoint.open(path), Quantization(bits, double_quant, quant_type)
    check_parts(checkpoint, {"base": base, **foreign})
    if checkpoint.kind in OUR_KINDS:
        loaded = _load_ours(
            checkpoint, base, dtype=dtype, device_map=device_map, quantization=quantization, merge=merge
        )
        if template := foreign.get("template"):
            loaded.processor.use_template(template)
            loaded.model.config.template = template
        return loaded
    options = LoadOptions(
        base=base, dtype=dtype, device_map=device_map, quantization=quantization, merge=merge, **foreign
    )
    return _load_other(checkpoint, options)


def check_parts(checkpoint: Checkpoint, given: Mapping[str, Any]) -> None:
    """Check that every given part is used: a checkpoint may hold or name its own.

    Args:
        checkpoint: the checkpoint.
        given: values by the names of `PART_FLAGS`; None means not given.

    Raises:
        ConfigError: a part would not be used; names the unused and the used flags.
    """
    used = USED_PARTS.get(checkpoint.kind, tuple(PART_FLAGS))
    unused = [PART_FLAGS.get(name, name) for name, value in given.items() if value is not None and name not in used]
    if unused:
        raise ConfigError(
            f"{checkpoint.path} is {KINDS[checkpoint.kind]}, for which {', '.join(unused)} would change nothing; "
            f"omit it. Used with it: {', '.join(PART_FLAGS[name] for name in used)}"
        )


def _load_ours(
    checkpoint: Checkpoint, base: str | None, *, dtype: Dtype, device_map: Any, quantization: Quantization, merge: bool
) -> LoadedModel:
    """Load a model, an adapter or a projector of this package."""
    path, kind = checkpoint.path, checkpoint.kind
    if kind == "model":
        return _load_model(path, dtype, device_map, quantization)
    processor = LlavaMedProcessor.from_pretrained(path)
    source = checkpoint.config.get("source") or {}
    if kind == "projector" and source.get("kind") == "legacy_projector":
        return _load_converted(
            checkpoint,
            source,
            processor,
            LoadOptions(base=base, dtype=dtype, device_map=device_map, quantization=quantization),
        )
    loaded = _load_base(path, base, dtype, device_map, quantization)
    loaded.processor = processor
    loaded.model.config.template = processor.template.name
    use_policy(loaded.model, processor)
    if kind == "projector":
        load_projector(loaded.model, path)
        return loaded
    adapted = load_adapter(loaded.model, path)
    loaded.model = cast(Any, adapted.merge_and_unload() if merge else adapted)
    loaded.origin = {"base": portable_path(str(path))}  # another adapter on top builds on this one, not on its base
    return loaded


def _load_other(checkpoint: Checkpoint, options: LoadOptions) -> LoadedModel:
    """Load a checkpoint of another format.

    Raises:
        CheckpointError: it is only a part of a model.
    """
    if checkpoint.kind in ("legacy", "legacy_adapter", "legacy_projector"):
        return load_legacy(checkpoint, options)
    if checkpoint.kind == "hf_llava":
        return load_hf(checkpoint, options)
    what = f"{checkpoint.path} is {KINDS[checkpoint.kind]} (type {checkpoint.config.get('model_type')!r})"
    if checkpoint.kind == "tower_adapter":
        raise CheckpointError(f"{what}; load the model it belongs to and pass this folder with --lora-pretrain")
    raise CheckpointError(
        f"{what}, only a part of a model; train a model with it: --model-name-or-path and --vision-tower"
    )


def _load_model(path: str | Path, dtype: Dtype, device_map: Any, quantization: Quantization) -> LoadedModel:
    processor = LlavaMedProcessor.from_pretrained(path)
    compute = dtype if isinstance(dtype, torch.dtype) else torch.float32
    try:
        with quiet_transformers():
            model, report = cast(Any, LlavaMedForConditionalGeneration).from_pretrained(
                path,
                dtype=dtype,
                device_map=device_map,
                quantization_config=quantization.config(compute),
                ignore_mismatched_sizes=True,  # they are rejected below, by name
                output_loading_info=True,
            )
    except UNREADABLE as error:
        raise CheckpointError(f"{path} cannot be loaded: {first_line(error)}") from error
    check_report(report, str(path))
    return finish_model(model.train(False), processor, {"base": portable_path(str(path))})


def _load_converted(
    checkpoint: Checkpoint, source: dict[str, Any], processor: LlavaMedProcessor, options: LoadOptions
) -> LoadedModel:
    """Load a projector that was converted from a legacy one, on a base loaded by that format's rules."""
    parts = dict(read_origin(checkpoint.path).get("load") or {})
    parts["base"] = options.base or parts.get("base")
    legacy = replace(checkpoint, kind="legacy_projector", config=source["config"])
    loaded = load_legacy(legacy, replace(options, **parts))
    loaded.processor = processor
    loaded.origin = {"base": portable_path(str(checkpoint.path))}
    return loaded


def _load_base(
    path: str | Path, base: str | None, dtype: Dtype, device_map: Any, quantization: Quantization
) -> LoadedModel:
    """Load the parts that an adapter or projector builds on: those given, or those recorded with it."""
    origin = read_origin(path)
    options = origin.get("build")
    if base is not None and options is not None and not _is_ours(base):
        options = {**options, "lm": base}
    elif base is not None or options is None:
        base = base or origin.get("base")
        if base is None:
            raise CheckpointError(f"{path} builds on another model but does not name it; pass it with --model-base")
        _check_bases(Path(path), Path(base))
        folder = local_folder(base) if is_hub_name(base) else base
        used = USED_PARTS.get(Checkpoint.open(folder).kind, tuple(PART_FLAGS))
        parts = {name: value for name, value in origin.get("load", {}).items() if name in used}
        return load_checkpoint(folder, dtype=dtype, device_map=device_map, **asdict(quantization), **parts)
    try:
        loaded = build_model(dtype=dtype, device_map=device_map, **{**options, **asdict(quantization)})
    except TypeError as error:
        raise CheckpointError(
            f"{Path(path) / ORIGIN_FILE} holds options that this version does not know: {error}"
        ) from error
    loaded.model.train(False)
    return loaded


def _check_bases(path: Path, base: Path) -> None:
    """Check that the chain of bases ends at a model.

    Raises:
        CheckpointError: a part builds on itself, directly or through others.
    """
    seen = [path.resolve()]
    place: Path | None = base
    while place is not None and place.is_dir():
        if place.resolve() in seen:
            chain = " -> ".join(map(str, [*seen, place.resolve()]))
            raise CheckpointError(
                f"{path} names itself as its base ({chain}); pass the model it was trained on with --model-base"
            )
        seen.append(place.resolve())
        named = read_origin(place).get("base") if Checkpoint.open(place).kind in ("adapter", "projector") else None
        place = None if named is None else Path(named)


def _is_ours(base: str) -> bool:
    return Path(base).is_dir() and read_json(Path(base) / "config.json").get("model_type") == OUR_TYPE
