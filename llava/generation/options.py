"""Command-line options that name a model and how it is loaded, and the engine that they open.

Importing this module does not load torch; opening an engine does.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.compat import PLACES, compat_help, parse_compat
from llava.constants import DTYPES, PROCESSOR_FILE
from llava.errors import ConfigError
from llava.imaging.dicom.policy import add_dicom_options
from llava.imaging.jpeg import add_fast_jpeg_option
from llava.utils.jsonl import read_object
from llava.utils.plugins import add_plugin_option

if TYPE_CHECKING:
    from llava.generation.engine import LocalEngine
    from llava.generation.protocol import Engine
    from llava.generation.remote_facts import ServerFacts


MODEL_HELP = ("--model", "--device", "--dtype")
MORE_MODEL_HELP = (
    "--model-base", "--vision-tower", "--lora-pretrain", "--conv-mode", "--plugin", "--bits", "--compat",
)  # fmt: skip
IMAGE_HELP = ("--dicom-window", "--dicom-frame", "--fast-jpeg")
"""Options of `add_engine_options` by topic, for `Parser.show_first`; only `--help all` shows the last two."""


def add_engine_options(
    parser: argparse._ActionsContainer,
    *,
    compat: tuple[str, ...] = ("answers",),
    names: tuple[str, ...] = ("--model", "--model-name", "--model-path"),
    remote: bool = False,
) -> None:
    """Add the options for model, device and precision; `--compat` accepts the names of `compat`.

    Args:
        parser: parser of the command.
        compat: places of defects that `--compat` accepts.
        names: names of the option for the checkpoint.
        remote: whether `--engine` may name a server; the command then calls `connected`.
    """
    more = "; with --engine: its name there" if remote else ""
    parser.add_argument(*names, dest="model", required=not remote, help=f"checkpoint folder{more}")
    if remote:
        parser.add_argument("--engine", metavar="URL", help="server that answers, such as http://localhost:8000/v1")
    parser.add_argument("--model-base", help="base model of an adapter; default: the one it names")
    parser.add_argument("--vision-tower", help="vision tower of a checkpoint in another format; ours name theirs")
    parser.add_argument(
        "--lora-pretrain", help="LoRA adapter of the vision tower (Vit-lora) of a checkpoint in another format"
    )
    parser.add_argument("--conv-mode", help="conversation template that replaces the checkpoint's")
    add_plugin_option(parser)
    parser.add_argument(
        "--dtype",
        choices=["auto", *DTYPES],
        default="auto",
        help="precision of the weights; auto: as saved, or float32 where a CPU is faster with it",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:0 ...; default: the accelerator if present")
    parser.add_argument("--bits", type=int, choices=[4, 8, 16], default=16, help="4 and 8 need bitsandbytes")
    parser.add_argument("--compat", default=PLACES[compat[-1]][1], metavar="LIST", help=compat_help(*compat))
    parser.set_defaults(compat_places=compat)
    add_dicom_options(parser)
    add_fast_jpeg_option(parser)


def connected(args: argparse.Namespace) -> argparse.Namespace:
    """Return the options with the model of the server of `--engine`; unchanged without that option.

    `remote` holds the model's facts, and `model` its name.

    Raises:
        ConfigError: neither a checkpoint nor a server is named, an option does not suit a server, or it does not serve
            the model.
        GenerationError: the server cannot be reached.
    """
    if args.engine is None:
        if args.model is None:
            raise ConfigError("--model is missing; name a checkpoint folder, or a server with --engine URL")
        return args
    from llava.generation.remote import RemoteEngine

    given = [name for name, default in LOADED.items() if getattr(args, name, default) != default]
    given += ["compat"] if answer_defects(args) else []
    if given:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ConfigError(f"{names}: the server of --engine has loaded its model; set this there and remove it here")
    remote = RemoteEngine(args.engine, args.model).facts
    return argparse.Namespace(**{**vars(args), "remote": remote, "model": remote.name})


LOADED: dict[str, Any] = {
    "model_base": None,
    "vision_tower": None,
    "lora_pretrain": None,
    "conv_mode": None,
    "dtype": "auto",
    "device": None,
    "bits": 16,
    "fast_jpeg": None,
    "num_gpus": 1,
}
"""Options that say how a model is loaded, with their defaults; a server has loaded its own."""


def served_by(args: argparse.Namespace) -> ServerFacts | None:
    """Return what the server of `--engine` says about its model; None without one."""
    found: ServerFacts | None = getattr(args, "remote", None)
    return found


def template_of(args: argparse.Namespace) -> str | None:
    """Return the name of the conversation template, from the options or the checkpoint; None if unnamed."""
    if (served := served_by(args)) is not None:
        return served.template
    return str(args.conv_mode) if args.conv_mode else saved_template(args.model)


def saved_template(model: str) -> str | None:
    """Return the name of the template that a checkpoint's files state; None if they state none."""
    from llava.model.checkpoint.formats import CONFIG_FILE  # slower to import than the options
    from llava.model.checkpoint.legacy_keys import TEMPLATE_KEY

    for name, key in ((PROCESSOR_FILE, "template"), (CONFIG_FILE, TEMPLATE_KEY)):
        path = Path(model) / name
        if path.is_file() and (template := read_object(path).get(key)):
            return str(template)
    return None


def answer_defects(args: argparse.Namespace) -> frozenset[str]:
    """Return the names of `--compat` that concern answers."""
    return parse_compat(args.compat, *args.compat_places) & parse_compat("all", "answers")


def local_engine_of(args: argparse.Namespace, **engine: Any) -> LocalEngine:
    """Load the model that the options name and return its engine.

    Args:
        args: parsed options.
        engine: other arguments of `open_engine`, such as `max_slots`.

    Raises:
        CheckpointError: the folder cannot be loaded.
        ConfigError: the template or a name of `compat` is unknown.
    """
    from llava.generation import loading

    return loading.open_engine(
        args.model,
        base=args.model_base,
        dtype=args.dtype,
        device=args.device,
        bits=args.bits,
        vision_tower=args.vision_tower,
        tower_adapter=args.lora_pretrain,
        template=args.conv_mode,
        compat=",".join(answer_defects(args)),
        dicom_window=args.dicom_window,
        dicom_frame=args.dicom_frame,
        fast_jpeg=args.fast_jpeg,
        weights=getattr(args, "weights", "stored"),
        **engine,
    )


def engine_of(args: argparse.Namespace, **engine: Any) -> Engine:
    """Return the engine of the options: the server of `--engine` (after `connected`) or a local one.

    Args:
        args: options.
        engine: arguments of `local_engine_of`.

    Raises:
        LlavaError: as `local_engine_of`.
    """
    served = served_by(args)
    if served is None:
        return local_engine_of(args, **engine)
    from llava.generation.remote import RemoteEngine

    return RemoteEngine(args.engine, facts=served, dicom_window=args.dicom_window, dicom_frame=args.dicom_frame)
