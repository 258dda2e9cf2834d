"""The one loader: a folder is recognised by what it holds, never by its name (`layout`).

model        config.json (llava_med) + model*.safetensors
adapter      adapter_config.json + adapter_model.safetensors, on the parts that llava_origin.json names
projector    mm_projector.safetensors or .bin, on the same
others       the legacy layouts (`foreign`) and transformers' Llava (`hf_llava`)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch

from llava.errors import CheckpointError, ConfigError
from llava.model.anyres import use_policy
from llava.model.builder import Loaded, build, finish, portable
from llava.model.checkpoint.assemble import ForeignOptions, check_report, quiet
from llava.model.checkpoint.formats import KINDS, ORIGIN_FILE, OUR_TYPE, OURS, Kind, Layout, read_json, sniff
from llava.model.checkpoint.hub import is_hub_name, local_folder
from llava.model.checkpoint.legacy.load import load_foreign
from llava.model.checkpoint.load_hf import load_hf
from llava.model.checkpoint.load_parts import load_adapter, load_projector
from llava.model.modeling import LlavaMedForConditionalGeneration
from llava.model.multimodal_encoder.towers import UNREADABLE, first_line
from llava.model.quantization import Quantization
from llava.processing import LlavaMedProcessor

Dtype = torch.dtype | Literal["auto"]

PART_FLAGS = {
    "base": "--model-base",
    "vision_tower": "--vision_tower",
    "vision_tower_config": "--vision_tower_config",
    "vision_tower_checkpoint": "--vision_tower_checkpoint",
    "tower_adapter": "--lora_pretrain",
    "template": "--template",
}
USED_PARTS: dict[Kind, tuple[str, ...]] = {
    "model": ("template",),
    "hf_llava": ("template",),
    "adapter": ("base", "template"),
    "projector": ("base", "template"),
}
"""What can be given beside a checkpoint that holds or names its other parts itself; the other kinds take them all."""


def read_origin(path: str | Path) -> dict[str, Any]:
    """`llava_origin.json` of a folder, or an empty table."""
    return read_json(Path(path) / ORIGIN_FILE)


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
    **foreign: Any,
) -> Loaded:
    """Load a checkpoint of this package, of the legacy layouts, or of transformers' Llava.

    Args:
        path: folder (or hub name) of a model, an adapter or a projector.
        base: what an adapter or projector builds on, instead of the recorded parts: a model of this package, or a plain
            language model (the recorded tower stays).
        dtype: of the weights; "auto" keeps the saved one.
        device_map: passed to transformers; None loads on the CPU.
        bits, double_quant, quant_type: of the language model, see `Quantization`.
        merge: add an adapter into the weights; False leaves it a peft adapter.
        foreign: parts of checkpoints of other layouts, see `ForeignOptions` (`vision_tower`, `template`, ...); all
            kinds take a `template`.

    Raises:
        CheckpointError: the folder holds nothing loadable, a part is missing, or weights do not fit.
        ConfigError: a part is given that this kind of checkpoint does not take, see `USED_PARTS`.
    """
    path = local_folder(path) if is_hub_name(path) else path
    layout, quantization = sniff(path), Quantization(bits, double_quant, quant_type)
    check_parts(layout, {"base": base, **foreign})
    if layout.kind in OURS:
        loaded = _load_ours(layout, base, dtype=dtype, device_map=device_map, quantization=quantization, merge=merge)
        if template := foreign.get("template"):
            loaded.processor.use_template(template)
            loaded.model.config.template = template
        return loaded
    options = ForeignOptions(
        base=base, dtype=dtype, device_map=device_map, quantization=quantization, merge=merge, **foreign
    )
    return _load_other(layout, options)


def check_parts(layout: Layout, given: Mapping[str, Any]) -> None:
    """Refuse parts that would be passed over: the checkpoint holds or names its own.

    Args:
        layout: the checkpoint.
        given: by the names of `PART_FLAGS`; what is None is not given.

    Raises:
        ConfigError: names those that are not used, and those that are.
    """
    used = USED_PARTS.get(layout.kind, tuple(PART_FLAGS))
    unused = [PART_FLAGS.get(name, name) for name, value in given.items() if value is not None and name not in used]
    if unused:
        raise ConfigError(
            f"{layout.path}: {KINDS[layout.kind]}, for which {', '.join(unused)} would change nothing; leave it out. "
            f"Used with it: {', '.join(PART_FLAGS[name] for name in used)}"
        )


def _load_ours(
    layout: Layout, base: str | None, *, dtype: Dtype, device_map: Any, quantization: Quantization, merge: bool
) -> Loaded:
    """A model, an adapter or a projector of this package."""
    path, kind = layout.path, layout.kind
    if kind == "model":
        return _load_model(path, dtype, device_map, quantization)
    processor = LlavaMedProcessor.from_pretrained(path)
    source = layout.config.get("source") or {}
    if kind == "projector" and source.get("kind") == "legacy_projector":
        return _load_converted(
            layout,
            source,
            processor,
            ForeignOptions(base=base, dtype=dtype, device_map=device_map, quantization=quantization),
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
    loaded.origin = {"base": portable(str(path))}  # another adapter on top builds on this one, not on its base
    return loaded


def _load_other(layout: Layout, options: ForeignOptions) -> Loaded:
    """A checkpoint of another layout.

    Raises:
        CheckpointError: it is only a part of a model.
    """
    if layout.kind in ("legacy", "legacy_adapter", "legacy_projector"):
        return load_foreign(layout, options)
    if layout.kind == "hf_llava":
        return load_hf(layout, options)
    what = f"{layout.path}: {KINDS[layout.kind]} (type {layout.config.get('model_type')!r})"
    if layout.kind == "tower_adapter":
        raise CheckpointError(f"{what}; load the model it belongs to and give this folder with --lora-pretrain")
    raise CheckpointError(
        f"{what} is only a part; put it together by training: --model_name_or_path and --vision_tower"
    )


def _load_model(path: str | Path, dtype: Dtype, device_map: Any, quantization: Quantization) -> Loaded:
    processor = LlavaMedProcessor.from_pretrained(path)
    compute = dtype if isinstance(dtype, torch.dtype) else torch.float32
    try:
        with quiet():
            model, report = cast(Any, LlavaMedForConditionalGeneration).from_pretrained(
                path,
                dtype=dtype,
                device_map=device_map,
                quantization_config=quantization.config(compute),
                ignore_mismatched_sizes=True,  # they are refused below, by name
                output_loading_info=True,
            )
    except UNREADABLE as error:
        raise CheckpointError(f"{path} cannot be loaded: {first_line(error)}") from error
    check_report(report, str(path))
    return finish(model.train(False), processor, {"base": portable(str(path))})


def _load_converted(
    layout: Layout, source: dict[str, Any], processor: LlavaMedProcessor, options: ForeignOptions
) -> Loaded:
    """A projector that was converted from a legacy one: its base is put together by that layout's rules."""
    parts = dict(read_origin(layout.path).get("load") or {})
    parts["base"] = options.base or parts.get("base")
    legacy = replace(layout, kind="legacy_projector", config=source["config"])
    loaded = load_foreign(legacy, replace(options, **parts))
    loaded.processor = processor
    loaded.origin = {"base": portable(str(layout.path))}
    return loaded


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
        _check_bases(Path(path), Path(base))
        folder = local_folder(base) if is_hub_name(base) else base
        used = USED_PARTS.get(sniff(folder).kind, tuple(PART_FLAGS))
        parts = {name: value for name, value in origin.get("load", {}).items() if name in used}
        return load(folder, dtype=dtype, device_map=device_map, **asdict(quantization), **parts)
    try:
        loaded = build(dtype=dtype, device_map=device_map, **{**options, **asdict(quantization)})
    except TypeError as error:
        raise CheckpointError(
            f"{Path(path) / ORIGIN_FILE}: options that this version does not know: {error}"
        ) from error
    loaded.model.train(False)
    return loaded


def _check_bases(path: Path, base: Path) -> None:
    """Make sure that a part and what it builds on end at a model.

    Raises:
        CheckpointError: a part builds on itself, at once or by way of others.
    """
    seen = [path.resolve()]
    place: Path | None = base
    while place is not None and place.is_dir():
        if place.resolve() in seen:
            chain = " -> ".join(map(str, [*seen, place.resolve()]))
            raise CheckpointError(
                f"{path} names itself as its base ({chain}); give the model it was trained on with --model-base"
            )
        seen.append(place.resolve())
        named = read_origin(place).get("base") if sniff(place).kind in ("adapter", "projector") else None
        place = None if named is None else Path(named)


def _is_ours(base: str) -> bool:
    return Path(base).is_dir() and read_json(Path(base) / "config.json").get("model_type") == OUR_TYPE
