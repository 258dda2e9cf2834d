"""Convert any checkpoint that loads to any format that can hold it.

ours     this package's folder: a model, an adapter or a projector, as the source is
model    a whole model of this package; adapters merged
legacy   the original format, as the source is
hf       transformers' LlavaForConditionalGeneration; adapters merged
peft     base/ as hf, and adapter/ as a plain peft adapter for it
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from safetensors.torch import save_file

from llava.errors import CheckpointError, ConfigError
from llava.model.builder import LoadedModel, portable_path
from llava.model.checkpoint.assemble import LoadOptions
from llava.model.checkpoint.export_hf import export_hf
from llava.model.checkpoint.folder import check_links, keep_source, source_of
from llava.model.checkpoint.formats import ADAPTER_FILE, KINDS, Checkpoint
from llava.model.checkpoint.legacy.export import export_legacy, remember_tower
from llava.model.checkpoint.legacy.export_parts import (
    convert_adapter,
    convert_projector,
    export_legacy_adapter,
    export_legacy_projector,
)
from llava.model.checkpoint.legacy.parts import named_base
from llava.model.checkpoint.load import PART_FLAGS, CheckpointSource, load_checkpoint, open_checkpoint
from llava.model.checkpoint.save import new_files, save_adapter, save_model
from llava.model.multimodal_encoder.towers import MALFORMED
from llava.utils.faults import sensible
from llava.utils.folders import final_path, new_folder
from llava.utils.lookup import lookup


def open_source(checkpoint: Checkpoint, options: LoadOptions, *, merge: bool = True) -> LoadedModel:
    """Load the source with the parts that were given."""
    parts: dict[str, Any] = {name: value for name, value in options.parts.items() if name != "base"}
    loaded = load_checkpoint(checkpoint, base=options.base, dtype=options.dtype, merge=merge, **parts)
    if checkpoint.kind.startswith("legacy") and merge and not (checkpoint.tower_adapter or options.tower_adapter):
        remember_tower(loaded.model)
    return loaded


def to_ours(checkpoint: Checkpoint, options: LoadOptions, path: Path) -> None:
    """Write this package's folder of the same kind."""
    if checkpoint.kind in ("legacy_adapter", "legacy_projector"):
        _refuse_dtype(checkpoint, options)
    if checkpoint.kind == "legacy_adapter":
        convert_adapter(checkpoint, options, path)
    elif checkpoint.kind == "legacy_projector":
        convert_projector(checkpoint, options, path)
    elif checkpoint.kind == "hf_adapter":
        _refuse_dtype(checkpoint, options)
        loaded = open_source(checkpoint, options, merge=False)
        base = portable_path(str(named_base(checkpoint, options, "its base")))
        save_adapter(loaded.model, loaded.processor, path, origin={"base": base})
        return
    elif checkpoint.kind in ("adapter", "projector"):
        raise ConfigError(f"{checkpoint.path} is {KINDS[checkpoint.kind]} already; for a whole model, pass --to model")
    else:
        to_model(checkpoint, options, path)
        return
    keep_source(checkpoint, path)


def _refuse_dtype(checkpoint: Checkpoint, options: LoadOptions) -> None:
    """Check that no dtype is given for adapters and projectors, whose weights are not changed.

    Raises:
        ConfigError: another dtype is given.
    """
    if options.dtype != "auto":
        raise ConfigError(
            f"{checkpoint.path} is {KINDS[checkpoint.kind]}, whose weights keep their dtype; omit --dtype, or pass "
            "--to model for a whole model of that dtype"
        )


def to_model(checkpoint: Checkpoint, options: LoadOptions, path: Path) -> None:
    """Write a whole model of this package."""
    loaded = open_source(checkpoint, options)
    save_model(loaded.model, loaded.processor, path, origin=loaded.origin)
    keep_source(checkpoint, path)


def to_legacy(checkpoint: Checkpoint, options: LoadOptions, path: Path) -> None:
    """Write the legacy format."""
    if checkpoint.kind in ("adapter", "projector"):
        _refuse_dtype(checkpoint, options)
        if options.parts:
            given = ", ".join(PART_FLAGS[name] for name in options.parts)
            raise ConfigError(f"{checkpoint.path}: its files are rewritten, so {given} would change nothing; omit it")
    if checkpoint.kind == "adapter":
        export_legacy_adapter(checkpoint, path)
    elif checkpoint.kind == "projector":
        export_legacy_projector(checkpoint, path)
    else:
        export_legacy(open_source(checkpoint, options), path, source_folder=source_of(checkpoint))


def to_hf(checkpoint: Checkpoint, options: LoadOptions, path: Path) -> None:
    """Write transformers' format."""
    export_hf(open_source(checkpoint, options), path, source_folder=source_of(checkpoint))


def to_peft(checkpoint: Checkpoint, options: LoadOptions, path: Path) -> None:
    """Write the base in transformers' format, and the adapter for it.

    Raises:
        CheckpointError: the source is not an adapter, or one of this format.
    """
    if checkpoint.kind not in ("adapter", "legacy_adapter"):
        already = " already" if checkpoint.kind == "hf_adapter" else "; --to peft needs an adapter"
        raise CheckpointError(f"{checkpoint.path} is {KINDS[checkpoint.kind]}{already}")
    loaded = open_source(checkpoint, options, merge=False)
    adapted: Any = loaded.model
    config = adapted.peft_config["default"]
    config.base_model_name_or_path = str((final_path(path) / "base").resolve())
    state = {
        name.replace(".default.", "."): tensor.detach().clone().contiguous()
        for name, tensor in adapted.state_dict().items()
        if "lora_" in name
    }
    base = LoadedModel(cast(Any, adapted.unload()), loaded.processor, loaded.context_len, loaded.origin)
    export_hf(base, path / "base")
    with new_files(path / "adapter") as folder:
        config.save_pretrained(folder)
        save_file(state, folder / ADAPTER_FILE)


WRITERS: dict[str, Callable[[Checkpoint, LoadOptions, Path], None]] = {
    "ours": to_ours,
    "model": to_model,
    "legacy": to_legacy,
    "hf": to_hf,
    "peft": to_peft,
}


def convert_checkpoint(
    source: CheckpointSource, target: str | Path, to: str, options: LoadOptions | None = None
) -> Checkpoint:
    """Write a checkpoint in another format and return what was written.

    Args:
        source: folder or weight file of any kind that loads, or the same, opened.
        target: a folder that does not exist or is empty.
        to: key of `WRITERS`.
        options: parts that the source needs.

    Raises:
        CheckpointError: the source does not load, or the format cannot hold it; nothing is written.
        ConfigError: the target holds files, or the format is unknown.

    >>> convert_checkpoint(model_folder, new_folder, "hf").kind
    'hf_llava'
    """
    writer = lookup(WRITERS, to, "format")
    path = Path(target)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{target} is not empty; name a new folder")
    checkpoint = open_checkpoint(source)
    check_links(checkpoint.path)
    with new_folder(path) as folder, sensible(checkpoint.path, "converted", MALFORMED):
        writer(checkpoint, options or LoadOptions(), folder)
    return Checkpoint.open(path / "adapter" if to == "peft" else path)
