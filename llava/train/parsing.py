"""Command line to arguments: old spellings, bare booleans, negative values, prefixes."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from typing import Any, Literal, cast

from transformers import HfArgumentParser

from llava.errors import ConfigError
from llava.train import legacy_flags, precision
from llava.train.args import DataArguments, LlavaTrainingArguments, ModelArguments, Parsed

EXAMPLE = """example:
  llava train --model_name_or_path LM --vision_tower TOWER --data_path train.json --image_folder images \\
      --output_dir runs/first --num_train_epochs 1 --per_device_train_batch_size 16
"""


def parse(argv: Sequence[str] | None = None, *, bf16: bool | Literal["auto"] = False) -> Parsed:
    """Read the command line of every training entry.

    Args:
        argv: command line; that of the process when None.
        bf16: what an absent `--bf16` means.

    Raises:
        ConfigError: an option is unknown, or values contradict each other.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, LlavaTrainingArguments),  # type: ignore[arg-type]
        description="Train: stage 1 alignment, stage 2 instruction tuning, downstream fine-tuning, LoRA.",
        epilog=EXAMPLE,
    )
    precision.accept_auto(parser, default=bf16)
    words = [_underscored(word) for word in words]
    choice = precision.chosen_bf16(parser.parse_known_args(words)[0])
    *groups, unknown = _dataclasses(parser, [*words, "--bf16", str(choice)])
    if (agreed := precision.agreed(choice, groups[2])) != choice:
        *groups, unknown = _dataclasses(parser, [*words, "--bf16", str(agreed)])
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        near = [match for word in unknown for match in difflib.get_close_matches(word, known, n=1)]
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise ConfigError(f"not understood: {' '.join(unknown)}{hint} (--help lists every option)")
    model, data, training = cast(Parsed, tuple(groups))
    standard = (ModelArguments(model_name_or_path="x"), DataArguments(data_path="x"), LlavaTrainingArguments)
    legacy_flags.warn_without_effect(words, (model, data, training), standard)
    legacy_flags.settle_compat(data, training)
    legacy_flags.settle_validation(data, training)
    precision.warn_of_slow_bf16(model, training)
    return model, data, training


def _dataclasses(parser: HfArgumentParser, words: list[str]) -> tuple[Any, ...]:
    """The three groups and the words left over; what the library finds wrong is told in one line.

    Raises:
        ConfigError: a value cannot be used.
    """
    try:
        return parser.parse_args_into_dataclasses(words, return_remaining_strings=True)
    except ConfigError:
        raise
    except (ValueError, ImportError, NotImplementedError, OSError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        what = lines[0] if lines else type(error).__name__
        raise ConfigError(f"a training option cannot be used: {what} (--help lists every option)") from error


def _underscored(word: str) -> str:
    """Option names in the one spelling that is registered; values stay as they are."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value
