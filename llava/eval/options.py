"""Options of every evaluation that runs a model, and the values derived from them.

Importing this module does not load torch.
"""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llava.constants import PROCESSOR_FILE
from llava.errors import ConfigError
from llava.generation import fingerprint
from llava.generation.options import (
    IMAGE_HELP,
    MODEL_HELP,
    MORE_MODEL_HELP,
    add_engine_options,
    connected,
    served_by,
    template_of,
)
from llava.generation.protocol import Sampling
from llava.imaging.dicom.policy import DicomPolicy
from llava.model.checkpoint.formats import CONFIG_FILE, OUR_TYPE, read_json
from llava.utils.cli import Parser
from llava.utils.provenance import provenance_fields

logger = logging.getLogger(__name__)

NO_EFFECT = ("mm_projector", "vision_tower")
"""Options of published commands that name parts which the checkpoint now stores itself."""


FIRST_HELP = {
    "model and data": ("--model", "--data", "--image-folder", "--out", "--train-data", "--limit"),
    "tasks and metrics": ("--tasks", "--data-root", "--metrics", "--rules"),
    "controls and comparisons": ("--controls", "--by", "--compare"),
    "answers": ("--max-new-tokens", "--temperature", "--batch-size", "--num-examples"),
    "machine": ("--device", "--dtype", "--engine"),
}
"""Options that `llava eval --help` shows; `--help all` shows every one."""


FIRST_MODEL_HELP = {"model": ("--engine", *MODEL_HELP), "sampling": ("--max-new-tokens", "--temperature")}
"""Options of `add_model_options` that the short help of a published command shows."""

MORE_MODEL_OPTIONS = {
    "model": (*MORE_MODEL_HELP, "--mm-projector"),
    "sampling": ("--top-p", "--num-beams", "--repetition-penalty", "--seed"),
    "image files": IMAGE_HELP,
}
"""Its options that only `--help all` shows."""


def add_model_options(parser: Parser, *, compat: tuple[str, ...] = ("answers",)) -> None:
    """Add the options that select model or server and sampling; `--compat` accepts the names of `compat`."""
    model = parser.add_argument_group("model")
    add_engine_options(model, compat=compat, remote=True)
    model.add_argument("--mm-projector", help="no effect: the checkpoint contains its projector")
    choice = parser.add_argument_group("sampling")
    choice.add_argument("--temperature", type=float, default=0.0, help="sampling temperature; 0 is greedy decoding")
    choice.add_argument("--top-p", type=float, default=1.0, help="probability mass of nucleus sampling")
    choice.add_argument("--num-beams", type=int, default=1, help="number of beams; above 1: beam search")
    choice.add_argument(
        "--repetition-penalty", type=float, default=1.0, help="above 1: repeated tokens are less likely"
    )
    choice.add_argument("--max-new-tokens", type=int, default=None, help="limit of an answer in tokens")
    choice.add_argument("--seed", type=int, default=0, help="seed of sampling and of the intervals' resampling")


def connected_model(args: Namespace) -> Namespace:
    """Return the options with the model of the server that `--engine` names.

    Every evaluation calls this before it reads `args.model`.

    Raises:
        ConfigError: an option does not suit a server.
        GenerationError: the server cannot be reached.
    """
    args = connected(args)
    if served_by(args) is not None and args.num_beams != 1:
        raise ConfigError(f"--num-beams {args.num_beams}: servers offer no beam search; expected 1 with --engine")
    return args


def sampling_of(args: Namespace, *, max_new_tokens: int) -> Sampling:
    """Return the sampling parameters that the options give."""
    return Sampling(
        max_new_tokens=max_new_tokens if args.max_new_tokens is None else args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        num_beams=args.num_beams,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed if args.temperature > 0 else None,
    )


def model_id_of(args: Namespace) -> str:
    """Return the model name for answer rows: the last component of its path, or its name on a server."""
    if (served := served_by(args)) is not None:
        return served.shown_name
    return Path(args.model).resolve().name if Path(args.model).exists() else str(args.model)


def warn_no_effect(args: Namespace) -> None:
    """Log one warning that names the given options without effect."""
    names = [name for name in NO_EFFECT if name != "vision_tower" or _is_ours(args.model)]
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name)]
    if given:
        logger.warning("%s: no effect; the checkpoint contains these parts", ", ".join(given))


def _is_ours(model: str) -> bool:
    return read_json(Path(model) / CONFIG_FILE).get("model_type") == OUR_TYPE


def dicom_policy_of(args: Namespace) -> DicomPolicy:
    """Return the DICOM policy of the options; unset options use the checkpoint's policy.

    Raises:
        ConfigError: an option or the checkpoint names an unknown policy.
    """
    kept = read_json(Path(args.model) / PROCESSOR_FILE).get("dicom")
    return DicomPolicy.of(kept).changed(args.dicom_window, args.dicom_frame)


def facts_of(
    args: Namespace, words: Sequence[str], sampling: Sampling, data: Mapping[str, str | Path]
) -> dict[str, Any]:
    """Return the provenance of `llava eval` with the options `words` on the files of `data`, by role."""
    served = served_by(args)
    return provenance_fields(
        data=data,
        command=["llava", "eval", *words],
        template=template_of(args),
        weights=fingerprint.weights_hash(args.model) if served is None else served.weights,
        seed=args.seed,
        sampling=asdict(sampling),
        limit=args.limit,
    )
