"""Open the parts of a legacy checkpoint once each: its base, its adapter and the tower's adapter."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llava.errors import CheckpointError
from llava.model.checkpoint.assemble import LoadOptions
from llava.model.checkpoint.formats import KINDS, Checkpoint
from llava.model.checkpoint.hub import local_folder
from llava.model.checkpoint.legacy.lora_files import LegacyLora, check_copies, read_lora


@dataclass(frozen=True, slots=True)
class LegacyParts:
    """Opened parts of a legacy checkpoint; each path is opened once.

    Attributes:
        written: config.json as it is in the folder.
        checkpoint: the checkpoint, with its base's settings where it has none.
        base: what it builds on.
        adapters: its adapter, and that of its tower.
    """

    written: dict[str, Any]
    checkpoint: Checkpoint
    base: Checkpoint | None
    adapters: list[LegacyLora]


def open_parts(checkpoint: Checkpoint, options: LoadOptions) -> LegacyParts:
    """Open what a legacy checkpoint consists of and builds on.

    Raises:
        CheckpointError: a part is missing (names the flag that gives it), or an adapter cannot be read.
    """
    whole, base = with_base(checkpoint, options)
    adapters = [read_lora(checkpoint)] if checkpoint.kind == "legacy_adapter" else []
    tower = checkpoint.tower
    if options.tower_adapter:
        tower = open_tower_adapter(options.tower_adapter)
    if tower is not None:
        adapters.append(read_lora(tower, tower=True))
    elif adapters:
        check_copies(adapters[0])
    return LegacyParts(checkpoint.config, whole, base, adapters)


def with_base(checkpoint: Checkpoint, options: LoadOptions) -> tuple[Checkpoint, Checkpoint | None]:
    """Return the checkpoint, with missing settings taken from its base, and the base itself.

    Raises:
        CheckpointError: a base is needed and not given, or its kind does not fit.
    """
    if checkpoint.kind == "legacy":
        base = Checkpoint.open(local_folder(options.base)) if options.base else None
        return checkpoint, base
    base = Checkpoint.open(named_base(checkpoint, options, "the language model it was trained on"))
    folder = base.folder
    if base.kind not in ("language_model", "legacy"):
        raise CheckpointError(
            f"{folder} is {KINDS[base.kind]}; {checkpoint.path} needs the plain language model it was trained on"
        )
    is_whole = "hidden_size" in checkpoint.config
    return (checkpoint if is_whole else replace(checkpoint, config={**base.config, **checkpoint.config})), base


def named_base(checkpoint: Checkpoint, options: LoadOptions, what: str) -> Path:
    """Return the folder that a part builds on: as given, or as its files name it if that is a folder here.

    Args:
        checkpoint: the part.
        options: its `base` is the given one.
        what: what the base is, for the message.

    Raises:
        CheckpointError: no base is given, and the named one is not a folder here.
    """
    named = options.base or checkpoint.adapter.get("base_model_name_or_path") or checkpoint.config.get("_name_or_path")
    given = bool(options.base)
    if named is None or not (given or Path(named).is_dir() or (checkpoint.folder / named).is_dir()):
        words = f" (it names {named!r}, which is not a folder here)" if named else ""
        raise CheckpointError(
            f"{checkpoint.path} is {KINDS[checkpoint.kind]}, which needs {what}{words}; pass it with --model-base"
        )
    return local_folder(named) if given or Path(named).is_dir() else checkpoint.folder / named


def open_tower_adapter(folder: str | Path) -> Checkpoint:
    """Open a tower's adapter: that in a folder, or in a subfolder of it.

    Raises:
        CheckpointError: neither holds one.
    """
    checkpoint = Checkpoint.open(folder)
    if checkpoint.kind == "tower_adapter":
        return checkpoint
    if checkpoint.tower is not None:
        return checkpoint.tower
    raise CheckpointError(f"{folder} is {KINDS[checkpoint.kind]}; expected the folder of a vision tower's adapter")
