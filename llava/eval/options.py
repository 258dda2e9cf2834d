"""The options of every evaluation that asks a model, and what they say about it; importing this does not load torch."""

from __future__ import annotations

import json
import logging
from argparse import Namespace
from pathlib import Path

from llava.constants import PROCESSOR_FILE
from llava.generation.options import add_engine_options
from llava.generation.protocol import Sampling
from llava.imaging.dicom.policy import DicomPolicy
from llava.model.checkpoint.formats import CONFIG_FILE, OUR_TYPE, read_json
from llava.utils.cli import Parser
from llava.utils.jsonl import read_text

logger = logging.getLogger(__name__)

NO_EFFECT = ("mm_projector", "vision_tower")
"""Options of published commands that name parts the checkpoint now knows itself."""


def add_model_options(parser: Parser) -> None:
    """Register which model answers and how it chooses its words."""
    model = parser.add_argument_group("model")
    add_engine_options(model)
    model.add_argument("--mm-projector", help="no effect: the checkpoint knows its projector")
    choice = parser.add_argument_group("sampling")
    choice.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token each time")
    choice.add_argument("--top-p", type=float, default=1.0, help="share of probability that is sampled from")
    choice.add_argument("--num-beams", type=int, default=1, help="beam search when above 1")
    choice.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1: used tokens are less likely")
    choice.add_argument("--max-new-tokens", type=int, default=None, help="longest answer")
    choice.add_argument("--seed", type=int, default=0, help="of sampling and of the intervals' resampling")


def sampling_of(args: Namespace, *, max_new_tokens: int) -> Sampling:
    """Return the sampling that the options ask for."""
    return Sampling(
        max_new_tokens=max_new_tokens if args.max_new_tokens is None else args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        num_beams=args.num_beams,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed if args.temperature > 0 else None,
    )


def model_id_of(args: Namespace) -> str:
    """Return what answer rows call the model: the last part of its path."""
    return Path(args.model).resolve().name if Path(args.model).exists() else str(args.model)


def warn_no_effect(args: Namespace) -> None:
    """Name, in one warning, the options given that have no effect."""
    names = [name for name in NO_EFFECT if name != "vision_tower" or _is_ours(args.model)]
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name)]
    if given:
        logger.warning("%s: no effect, the checkpoint knows its parts", ", ".join(given))


def _is_ours(model: str) -> bool:
    return read_json(Path(model) / CONFIG_FILE).get("model_type") == OUR_TYPE


def template_of(args: Namespace) -> str | None:
    """Return the name of the template that questions are put in; None when the checkpoint does not say."""
    if args.conv_mode:
        return str(args.conv_mode)
    path = Path(args.model) / PROCESSOR_FILE
    return json.loads(read_text(path)).get("template") if path.is_file() else None


def dicom_policy_of(args: Namespace) -> DicomPolicy:
    """Return how DICOM files are shown: as the checkpoint says, unless the options do.

    Raises:
        ConfigError: an option, or what the checkpoint says, is none of the known words.
    """
    kept = read_json(Path(args.model) / PROCESSOR_FILE).get("dicom")
    return DicomPolicy.of(kept).changed(args.dicom_window, args.dicom_frame)
