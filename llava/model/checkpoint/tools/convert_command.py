"""Commands `llava checkpoint convert` and `llava checkpoint export`; torch is imported after parsing."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llava.constants import DTYPES
from llava.model.checkpoint.formats import KINDS
from llava.utils.cli import Parser
from llava.utils.plugins import add_plugin_option
from llava.utils.terminal import write_out

if TYPE_CHECKING:
    from llava.model.checkpoint.assemble import LoadOptions

FORMATS = ("ours", "model", "legacy", "hf", "peft")
EXPORTS = ("hf", "legacy", "peft")
"""Formats that `convert` and `export` write: the keys of `llava.model.checkpoint.tools.convert.WRITERS`."""


def add_part_options(parser: Parser) -> None:
    """Add the options that name parts which a checkpoint needs."""
    parser.add_argument("--model-base", help="language model that an adapter or projector builds on; a tokenizer")
    parser.add_argument("--vision_tower", help="folder or hub name, instead of the one that the checkpoint names")
    parser.add_argument("--vision_tower_config", help="open_clip model configuration")
    parser.add_argument("--vision_tower_checkpoint", help="open_clip weights")
    parser.add_argument("--lora_pretrain", help="LoRA adapter of the vision tower (STLLaVA-Med's Vit-lora)")
    parser.add_argument("--template", help="conversation template, instead of the one the content suggests")
    parser.add_argument(
        "--dtype", default="auto", choices=sorted(["auto", *DTYPES]), help="dtype of the written weights"
    )


def part_options(args: Namespace) -> LoadOptions:
    """Return the values of the options of `add_part_options`."""
    import torch

    from llava.model.checkpoint.assemble import LoadOptions

    return LoadOptions(
        base=args.model_base,
        vision_tower=args.vision_tower,
        vision_tower_config=args.vision_tower_config,
        vision_tower_checkpoint=args.vision_tower_checkpoint,
        tower_adapter=args.lora_pretrain,
        template=args.template,
        dtype="auto" if args.dtype == "auto" else getattr(torch, args.dtype),
    )


def _run(argv: Sequence[str] | None, command: str, choices: Sequence[str], default: str) -> None:
    parser = Parser(
        prog=f"llava checkpoint {command}", description=f"{command.capitalize()} a checkpoint to another format."
    )
    parser.add_argument("source", help="checkpoint folder, weight file or hub name, of any kind that loads")
    parser.add_argument("target", help="new folder")
    parser.add_argument("--to", default=default, choices=list(choices), help="format to write")
    add_part_options(parser)
    add_plugin_option(parser)
    args = parser.parse_args(argv)
    from llava.model.checkpoint.tools.convert import convert_checkpoint  # seconds, for which --help does not wait

    written = convert_checkpoint(args.source, args.target, args.to, part_options(args))
    write_out(f"{args.target}: {KINDS[written.kind]}, {len(written.tensors) + len(written.extra)} tensors\n")


def convert_main(argv: Sequence[str] | None = None) -> None:
    """Run `llava checkpoint convert`."""
    _run(argv, "convert", FORMATS, "ours")


def export_main(argv: Sequence[str] | None = None) -> None:
    """Run `llava checkpoint export`."""
    _run(argv, "export", EXPORTS, "hf")
