"""Parsing of the training command line into arguments, see `parsed`."""

from __future__ import annotations

import difflib
import logging
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from llava.errors import ConfigError, LlavaError
from llava.train import legacy_flags, precision
from llava.train.args import DataArguments, LlavaTrainingArguments, ModelArguments
from llava.train.bounds import check_bounds
from llava.train.checkpointing import DEFAULT_OUTPUT
from llava.train.option_parser import TrainingParser, make_parser, registered_words, show_dashes
from llava.train.parsed import Parsed, check_pairs, with_compat, with_validation
from llava.train.specs import ResumeSpec
from llava.utils.cli import with_dashes
from llava.utils.plugins import load_plugins

logger = logging.getLogger(__name__)


def parse_training_args(
    argv: Sequence[str] | None = None, *, bf16: bool | Literal["auto"] = False, log_lines: int = 0
) -> Parsed:
    """Return the arguments of a training command line.

    Args:
        argv: command line; None for that of the process.
        bf16: default of `--bf16`.
        log_lines: default of `--log-lines`; with `--logging-steps` it is 0.

    Raises:
        ConfigError: an option is unknown, a value is invalid, or values contradict each other.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    words = registered_words(words)
    named = legacy_flags.is_named("logging_steps", words)
    parser = make_parser(bf16=bf16, defaults={"log_lines": 0 if named else log_lines})
    show_dashes(parser)
    for notice in parser.notices(words):
        logger.info("%s", notice)
    options = parser.parse_known_args(words)[0]
    check_bounds(vars(options))
    load_plugins(options.plugin or ())
    choice = _chosen_bf16(options)
    both = options.fp16 and options.bf16 is True  # transformers refuses them
    if options.fp16 and not both and not precision.computes_fp16(fp16=options.fp16, use_cpu=options.use_cpu):
        words += ["--fp16", "False"]  # the record of the run states what it computes
    parsed, unknown = _arguments(parser, [*words, "--bf16", str(choice)])
    if (agreed := precision.agreed(choice, world_size=parsed.training.world_size)) != choice:
        parsed, unknown = _arguments(parser, [*words, "--bf16", str(agreed)])
    if unknown:
        known = list(parser._option_string_actions)
        near = [match for word in unknown for match in difflib.get_close_matches(word, known, n=1)]
        hint = f"; did you mean {', '.join(with_dashes(near))}?" if near else ""
        raise ConfigError(f"unknown option: {' '.join(with_dashes(unknown))}{hint} (--help lists every option)")
    standard = (ModelArguments(model_name_or_path="x"), DataArguments(data_path="x"), LlavaTrainingArguments)
    legacy_flags.warn_without_effect(words, parsed[:3], standard)
    parsed = with_validation(with_compat(parsed))
    check_pairs(parsed)
    training = parsed.training
    precision.warn_of_slow_bf16(
        parsed.model.model_name_or_path,
        bf16=training.bf16,
        device_type=training.device.type,
        resumed=options.bf16 == "auto",  # the resumed run chose bfloat16 on another machine, where it was fast
    )
    return parsed


def _chosen_bf16(options: Namespace) -> bool:
    """Return the value of `--bf16` of a command line that transformers has not validated yet."""
    folder = Path(options.output_dir or DEFAULT_OUTPUT)
    return precision.chosen_bf16(
        options.bf16,
        model=options.model_name_or_path,
        fp16=options.fp16,
        use_cpu=options.use_cpu,
        resume=ResumeSpec(folder, options.resume_from_checkpoint, options.overwrite_output_dir),
    )


def _arguments(parser: TrainingParser, words: list[str]) -> tuple[Parsed, list[str]]:
    """Return the arguments and the unparsed words.

    Raises:
        ConfigError: a value is invalid; the message is the first line of the library's error.
    """
    try:
        *groups, unknown = parser.parse_args_into_dataclasses(words, return_remaining_strings=True)
        return Parsed(*groups), unknown
    except LlavaError:
        raise
    except (ValueError, ImportError, NotImplementedError, OSError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        what = lines[0] if lines else type(error).__name__
        raise ConfigError(f"invalid training option: {what} (--help lists every option)") from error
