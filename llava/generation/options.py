"""Command-line options that name a model and how it is loaded, and the engine that they open.

Importing this module does not load torch; opening an engine does.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from llava.compat import PLACES, compat_help, parse_compat
from llava.constants import DTYPES
from llava.imaging.dicom.policy import add_dicom_options
from llava.imaging.jpeg import add_fast_jpeg_option

if TYPE_CHECKING:
    from llava.generation.engine import LocalEngine


def add_engine_options(parser: argparse._ActionsContainer, *, compat: tuple[str, ...] = ("answers",)) -> None:
    """Add the options for model, device and precision; `--compat` accepts the names of `compat`."""
    parser.add_argument(
        "--model", "--model-name", "--model-path", dest="model", required=True, help="checkpoint folder"
    )
    parser.add_argument("--model-base", help="base model of an adapter; default: the one it names")
    parser.add_argument("--vision-tower", help="vision tower of a checkpoint in another format; ours name theirs")
    parser.add_argument("--conv-mode", help="conversation template that replaces the checkpoint's")
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


def answer_defects(args: argparse.Namespace) -> frozenset[str]:
    """Return the names of `--compat` that concern answers."""
    return parse_compat(args.compat, *args.compat_places) & parse_compat("all", "answers")


def engine_of(args: argparse.Namespace) -> LocalEngine:
    """Load the model that the options name and return its engine.

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
        template=args.conv_mode,
        compat=",".join(answer_defects(args)),
        dicom_window=args.dicom_window,
        dicom_frame=args.dicom_frame,
        fast_jpeg=args.fast_jpeg,
    )
