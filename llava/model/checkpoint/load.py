"""Load a checkpoint of any supported format, which is recognized by content (`formats`).

model        config.json (llava_med) + model*.safetensors
adapter      adapter_config.json + adapter_model.safetensors, on the parts that llava_origin.json names
projector    mm_projector.safetensors or .bin, on the same
others       the legacy formats (`legacy.load`), transformers' Llava (`load_hf`), its adapters (`load_hf_adapter`)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import torch

from llava.errors import CheckpointError, ConfigError
from llava.model.anyres import use_policy
from llava.model.builder import LoadedModel, build_model, finish_model, portable_path
from llava.model.checkpoint.assemble import LoadOptions, check_report, check_room, quiet_transformers
from llava.model.checkpoint.files.shards import list_tensors
from llava.model.checkpoint.formats import KINDS, ORIGIN_FILE, OUR_KINDS, OUR_TYPE, Checkpoint, Kind, read_json
from llava.model.checkpoint.hub import is_hub_name, local_folder
from llava.model.checkpoint.legacy.load import load_legacy
from llava.model.checkpoint.legacy.parts import named_base
from llava.model.checkpoint.load_hf import load_hf
from llava.model.checkpoint.load_hf_adapter import attach_hf_adapter, check_hf_adapter, merge_hf_adapter
from llava.model.checkpoint.load_parts import load_adapter, load_projector
from llava.model.checkpoint.plugged import check_plugins
from llava.model.config import LlavaMedConfig
from llava.model.fitting import check_processor
from llava.model.modeling import LlavaMedForConditionalGeneration
from llava.model.multimodal_encoder.towers import MALFORMED, UNREADABLE, first_line
from llava.model.quantization import Quantization
from llava.model.torch_files.archive import check_torch_weights
from llava.processing import LlavaMedProcessor
from llava.utils.faults import sensible

Dtype = torch.dtype | Literal["auto"]

CheckpointSource: TypeAlias = str | Path | Checkpoint
"""A checkpoint's folder, weight file or hub name; or the checkpoint, already open."""

HF_ADAPTER_BASES: tuple[Kind, ...] = ("hf_llava", "model")
"""What an adapter of transformers' Llava is loaded on: that model, or one of this package with the same layers."""

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
    "hf_adapter": ("base", "template"),
}
"""Options that apply to a checkpoint that holds or names its other parts itself; the other kinds take all of them."""


def read_origin(path: str | Path) -> dict[str, Any]:
    """Return `llava_origin.json` of a folder, or an empty table."""
    return read_json(Path(path) / ORIGIN_FILE)


def open_checkpoint(source: CheckpointSource) -> Checkpoint:
    """Open a folder, a weight file or a hub name; what is open already is returned unchanged.

    Raises:
        CheckpointError: it is in no known format, or cannot be downloaded.
    """
    if isinstance(source, Checkpoint):
        return source
    return Checkpoint.open(local_folder(source) if is_hub_name(source) else source)


def load_checkpoint(
    path: CheckpointSource,
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
        path: folder (or hub name) of a model, an adapter or a projector; or the same, opened by `open_checkpoint`.
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

    >>> loaded = load_checkpoint(model_folder)
    >>> loaded.processor.num_image_tokens
    4
    """
    checkpoint, quantization = open_checkpoint(path), Quantization(bits, double_quant, quant_type)
    check_parts(checkpoint, {"base": base, **foreign})
    options = LoadOptions(
        base=base, dtype=dtype, device_map=device_map, quantization=quantization, merge=merge, **foreign
    )
    with sensible(checkpoint.path, "loaded", MALFORMED):
        return _load(checkpoint, options)


def _load(checkpoint: Checkpoint, options: LoadOptions, above: tuple[Path, ...] = ()) -> LoadedModel:
    """Load an opened checkpoint.

    Args:
        checkpoint: the checkpoint.
        options: its other parts, and settings.
        above: folders of the adapters and projectors that build on it.

    Raises:
        CheckpointError: it is only a part of a model, or cannot be loaded.
    """
    check_plugins(checkpoint)
    if checkpoint.kind in OUR_KINDS:
        loaded = _load_ours(checkpoint, options, above)
        if options.template:
            loaded.model.config.template = options.template
            return replace(loaded, processor=loaded.processor.changed(template=options.template))
        return loaded
    if checkpoint.kind in ("legacy", "legacy_adapter", "legacy_projector"):
        return load_legacy(checkpoint, options)
    if checkpoint.kind == "hf_llava":
        return load_hf(checkpoint, options)
    if checkpoint.kind == "hf_adapter":
        return _load_hf_adapter(checkpoint, options)
    what = f"{checkpoint.path} is {KINDS[checkpoint.kind]} (type {checkpoint.config.get('model_type')!r})"
    if checkpoint.kind == "tower_adapter":
        raise CheckpointError(f"{what}; load the model it belongs to and pass this folder with --lora-pretrain")
    raise CheckpointError(
        f"{what}, only a part of a model; train a model with it: --model-name-or-path and --vision-tower"
    )


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


def _load_ours(checkpoint: Checkpoint, options: LoadOptions, above: tuple[Path, ...]) -> LoadedModel:
    """Load a model, an adapter or a projector of this package."""
    path, kind = checkpoint.path, checkpoint.kind
    if kind == "model":
        return _load_model(path, options)
    processor = LlavaMedProcessor.from_pretrained(path)
    source = checkpoint.config.get("source") or {}
    if kind == "projector" and source.get("kind") == "legacy_projector":
        return _load_converted(checkpoint, source, processor, options)
    loaded = replace(_load_base(checkpoint, options, above), processor=processor)
    check_processor(loaded.model, processor, str(path))
    loaded.model.config.template = processor.template.name
    use_policy(loaded.model, processor)
    if kind == "projector":
        load_projector(loaded.model, path)
        return loaded
    adapted = load_adapter(loaded.model, path)
    model = cast(Any, adapted.merge_and_unload() if options.merge else adapted)
    # Another adapter on top builds on this one, not on its base.
    return replace(loaded, model=model, origin={"base": portable_path(str(path))})


def _load_hf_adapter(checkpoint: Checkpoint, options: LoadOptions) -> LoadedModel:
    """Load an adapter of transformers' Llava, on that model or on its conversion to this package's format.

    Raises:
        CheckpointError: the base is missing or another kind, or the adapter does not fit it.
    """
    check_hf_adapter(checkpoint)
    base = Checkpoint.open(named_base(checkpoint, options, "the transformers' Llava it was trained on"))
    if base.kind not in HF_ADAPTER_BASES:
        raise CheckpointError(
            f"{base.path} is {KINDS[base.kind]}; {checkpoint.path} needs the transformers' Llava it was trained on"
        )
    loaded = _load(base, replace(options, base=None))
    adapted = attach_hf_adapter(loaded.model, checkpoint)
    merge = options.merge and options.quantization.bits == 16
    model = merge_hf_adapter(adapted, checkpoint) if merge else cast(Any, adapted)
    return replace(loaded, model=model, origin={"base": portable_path(str(checkpoint.path))})


def _load_model(path: Path, options: LoadOptions) -> LoadedModel:
    processor = LlavaMedProcessor.from_pretrained(path)
    compute = options.dtype if isinstance(options.dtype, torch.dtype) else torch.float32
    check_torch_weights(path)
    try:
        num_stored = sum(math.prod(entry.shape) for entry in list_tensors(path).values())
        check_room(LlavaMedConfig.from_pretrained(path), num_stored, str(path))
        with quiet_transformers():
            model, report = cast(Any, LlavaMedForConditionalGeneration).from_pretrained(
                path,
                dtype=options.dtype,
                device_map=options.device_map,
                quantization_config=options.quantization.config(compute),
                ignore_mismatched_sizes=True,  # they are rejected below, by name
                output_loading_info=True,
            )
    except CheckpointError:
        raise
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
    return replace(loaded, processor=processor, origin={"base": portable_path(str(checkpoint.path))})


def _load_base(checkpoint: Checkpoint, options: LoadOptions, above: tuple[Path, ...]) -> LoadedModel:
    """Load the parts that an adapter or projector builds on: those given, or those recorded with it."""
    path, base, origin = checkpoint.path, options.base, read_origin(checkpoint.path)
    build = origin.get("build")
    if base is not None and build is not None and not _is_ours(base):
        build = {**build, "lm": base}
    elif base is not None or build is None:
        base = base or origin.get("base")
        if base is None:
            raise CheckpointError(f"{path} builds on another model but does not name it; pass it with --model-base")
        above = (*above, path.resolve())
        _check_not_above(Path(base), above)
        below = open_checkpoint(base)
        used = USED_PARTS.get(below.kind, tuple(PART_FLAGS))
        parts = {name: value for name, value in origin.get("load", {}).items() if name in used}
        settings = LoadOptions(dtype=options.dtype, device_map=options.device_map, quantization=options.quantization)
        return _load(below, replace(settings, **parts), above)
    how: dict[str, Any] = {"dtype": options.dtype, "device_map": options.device_map, **asdict(options.quantization)}
    try:
        loaded = build_model(**{**build, **how})
    except TypeError as error:
        raise CheckpointError(f"{path / ORIGIN_FILE} holds options that this version does not know: {error}") from error
    loaded.model.train(False)
    return loaded


def _check_not_above(base: Path, above: tuple[Path, ...]) -> None:
    """Check that a chain of bases ends at a model.

    Raises:
        CheckpointError: a part builds on itself, directly or through others.
    """
    if base.is_dir() and base.resolve() in above:
        chain = " -> ".join(map(str, [*above, base.resolve()]))
        raise CheckpointError(
            f"{above[0]} names itself as its base ({chain}); pass the model it was trained on with --model-base"
        )


def _is_ours(base: str) -> bool:
    return Path(base).is_dir() and read_json(Path(base) / "config.json").get("model_type") == OUR_TYPE
