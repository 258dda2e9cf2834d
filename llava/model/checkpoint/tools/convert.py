"""Convert any checkpoint that loads to any format that can hold it (`llava checkpoint convert`).

ours     this package's folder: a model, an adapter or a projector, as the source is
model    a whole model of this package; adapters merged
legacy   the original format, as the source is
hf       transformers' LlavaForConditionalGeneration; adapters merged
peft     base/ as hf, and adapter/ as a plain peft adapter for it
"""

from __future__ import annotations

import shutil
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from llava.errors import CheckpointError, ConfigError, LlavaError
from llava.model.builder import LoadedModel
from llava.model.checkpoint.assemble import LoadOptions
from llava.model.checkpoint.export_hf import export_hf
from llava.model.checkpoint.folder import keep_source, source_of
from llava.model.checkpoint.formats import ADAPTER_FILE, KINDS, Checkpoint
from llava.model.checkpoint.legacy.export import export_legacy, remember_tower
from llava.model.checkpoint.legacy.export_parts import (
    convert_adapter,
    convert_projector,
    export_legacy_adapter,
    export_legacy_projector,
)
from llava.model.checkpoint.load import PART_FLAGS, load_checkpoint
from llava.model.checkpoint.save import new_files, save_model
from llava.model.multimodal_encoder.towers import first_line
from llava.utils.cli import Parser
from llava.utils.lookup import lookup

DTYPES: dict[str, Any] = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def open_source(checkpoint: Checkpoint, options: LoadOptions, *, merge: bool = True) -> LoadedModel:
    """Load the source with the parts that were given."""
    parts: dict[str, Any] = {name: value for name, value in options.parts.items() if name != "base"}
    loaded = load_checkpoint(checkpoint.path, base=options.base, dtype=options.dtype, merge=merge, **parts)
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
        export_legacy_adapter(checkpoint.folder, path)
    elif checkpoint.kind == "projector":
        export_legacy_projector(checkpoint.folder, path)
    else:
        export_legacy(open_source(checkpoint, options), path, source_folder=source_of(checkpoint))


def to_hf(checkpoint: Checkpoint, options: LoadOptions, path: Path) -> None:
    """Write transformers' format."""
    export_hf(open_source(checkpoint, options), path, source_folder=source_of(checkpoint))


def to_peft(checkpoint: Checkpoint, options: LoadOptions, path: Path) -> None:
    """Write the base in transformers' format, and the adapter for it.

    Raises:
        CheckpointError: the source is not an adapter.
    """
    if checkpoint.kind not in ("adapter", "legacy_adapter"):
        raise CheckpointError(f"{checkpoint.path} is {KINDS[checkpoint.kind]}; --to peft needs an adapter")
    loaded = open_source(checkpoint, options, merge=False)
    adapted: Any = loaded.model
    config = adapted.peft_config["default"]
    config.base_model_name_or_path = str((path / "base").resolve())
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
EXPORTS = ("hf", "legacy", "peft")


def convert_checkpoint(
    source: str | Path, target: str | Path, to: str, options: LoadOptions | None = None
) -> Checkpoint:
    """Write a checkpoint in another format and return what was written.

    Args:
        source: folder or weight file of any kind that loads.
        target: a folder that does not exist or is empty.
        to: key of `WRITERS`.
        options: parts that the source needs.

    Raises:
        CheckpointError: the source does not load, or the format cannot hold it; nothing is written.
        ConfigError: the target holds files, or the format is unknown.

    Example::

        tower = "openai/clip-vit-large-patch14-336"
        convert_checkpoint("llava-v1.5-7b", "ours", "ours", LoadOptions(vision_tower=tower))
    """
    writer = lookup(WRITERS, to, "format")
    path = Path(target)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{target} is not empty; name a new folder")
    existed = path.is_dir()
    try:
        writer(Checkpoint.open(source), options or LoadOptions(), path)
    except BaseException as error:
        _clear(path, keep=existed)
        if isinstance(error, OSError | SafetensorError) and not isinstance(error, LlavaError):
            raise CheckpointError(f"{target} cannot be written: {first_line(error)}") from error
        raise
    return Checkpoint.open(path / "adapter" if to == "peft" else path)


def _clear(path: Path, *, keep: bool) -> None:
    """Remove what an unfinished conversion left in a folder that was empty before."""
    if not path.is_dir():
        return
    for item in list(path.iterdir()):
        shutil.rmtree(item, ignore_errors=True) if item.is_dir() else item.unlink()
    if not keep:
        path.rmdir()


def add_part_options(parser: Parser) -> None:
    """Add the options that name parts which a checkpoint needs."""
    parser.add_argument("--model-base", help="language model that an adapter or projector builds on; a tokenizer")
    parser.add_argument("--vision_tower", help="folder or hub name, instead of the one that the checkpoint names")
    parser.add_argument("--vision_tower_config", help="open_clip model configuration")
    parser.add_argument("--vision_tower_checkpoint", help="open_clip weights")
    parser.add_argument("--lora_pretrain", help="LoRA adapter of the vision tower (STLLaVA-Med's Vit-lora)")
    parser.add_argument("--template", help="conversation template, instead of the one the content suggests")
    parser.add_argument("--dtype", default="auto", choices=sorted(DTYPES), help="dtype of the written weights")


def part_options(args: Namespace) -> LoadOptions:
    """Return the values of the options of `add_part_options`."""
    return replace(
        LoadOptions(),
        base=args.model_base,
        vision_tower=args.vision_tower,
        vision_tower_config=args.vision_tower_config,
        vision_tower_checkpoint=args.vision_tower_checkpoint,
        tower_adapter=args.lora_pretrain,
        template=args.template,
        dtype=DTYPES[args.dtype],
    )


def _run(argv: Sequence[str] | None, command: str, choices: Sequence[str], default: str) -> None:
    parser = Parser(prog=f"llava checkpoint {command}", description=f"{command} a checkpoint to another format")
    parser.add_argument("source", help="checkpoint folder or weight file, of any kind that loads")
    parser.add_argument("target", help="new folder")
    parser.add_argument("--to", default=default, choices=list(choices), help="format to write")
    add_part_options(parser)
    args = parser.parse_args(argv)
    written = convert_checkpoint(args.source, args.target, args.to, part_options(args))
    sys.stdout.write(f"{args.target}: {KINDS[written.kind]}, {len(written.tensors) + len(written.extra)} tensors\n")


def convert_main(argv: Sequence[str] | None = None) -> None:
    """Run `llava checkpoint convert`."""
    _run(argv, "convert", tuple(WRITERS), "ours")


def export_main(argv: Sequence[str] | None = None) -> None:
    """Run `llava checkpoint export`."""
    _run(argv, "export", EXPORTS, "hf")
