"""Parsing of the training command line into arguments."""

from __future__ import annotations

import difflib
import logging
import sys
from collections.abc import Sequence
from typing import Any, Literal, cast

from transformers import HfArgumentParser
from transformers.trainer_utils import IntervalStrategy

from llava.compat import parse_compat
from llava.errors import ConfigError
from llava.train import legacy_flags, precision
from llava.train.args import DataArguments, LlavaTrainingArguments, ModelArguments, Parsed
from llava.utils.cli import with_dashes

logger = logging.getLogger(__name__)


def settle_compat(data: DataArguments, args: LlavaTrainingArguments) -> None:
    """Set the options that the names of `--compat` select.

    Raises:
        ConfigError: a name is unknown, or has no effect in training.
    """
    names = parse_compat(args.compat, "training")
    if "micro_batch_loss" in names:
        args.loss_normalization = "micro_batches"
    if "cut_before_images" in names:
        data.image_counts_as_one = True


def settle_validation(data: DataArguments, args: LlavaTrainingArguments) -> None:
    """Set the defaults of validation: after every epoch, keeping the best checkpoint.

    Raises:
        ConfigError: validation or early stopping without held-out rows, or `--save-strategy best`.
    """
    if args.save_strategy == "best":
        raise ConfigError(
            "--save-strategy best is not supported; expected no, steps or epoch. To keep the best checkpoint, use "
            "--eval-data-path FILE and --save-strategy epoch"
        )
    if data.eval_data_path is None:
        if args.eval_strategy != "no" or args.early_stopping_patience:
            raise ConfigError(
                "--eval-strategy and --early-stopping-patience need held-out rows; set --eval-data-path FILE"
            )
        return
    if args.eval_strategy == "no" and args.evaluation_strategy is None:
        args.eval_strategy = IntervalStrategy.EPOCH
    every = args.eval_strategy == args.save_strategy == "epoch"
    together = args.eval_strategy == args.save_strategy == "steps" and args.eval_steps == args.save_steps
    if every or together:
        args.load_best_model_at_end = True
        args.metric_for_best_model = args.metric_for_best_model or "eval_loss"
        args.greater_is_better = False if "loss" in args.metric_for_best_model else args.greater_is_better is not False
    elif args.early_stopping_patience:
        raise ConfigError(
            "--early-stopping-patience needs --save-strategy and --eval-strategy both epoch, or both steps with "
            "--save-steps equal to --eval-steps"
        )
    else:
        logger.info(
            "the best checkpoint is kept only if --save-strategy and --eval-strategy are both epoch, or both steps"
        )


EXAMPLE = """example:
  llava train --model-name-or-path LM --vision-tower TOWER --data-path train.json --image-folder images \\
      --output-dir runs/first --num-train-epochs 1 --per-device-train-batch-size 16
"""


def parse_training_args(argv: Sequence[str] | None = None, *, bf16: bool | Literal["auto"] = False) -> Parsed:
    """Return the arguments of a training command line.

    Args:
        argv: command line; None for that of the process.
        bf16: default of `--bf16`.

    Raises:
        ConfigError: an option is unknown, a value is invalid, or values contradict each other.
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
        hint = f"; did you mean {', '.join(with_dashes(near))}?" if near else ""
        raise ConfigError(f"unknown option: {' '.join(with_dashes(unknown))}{hint} (--help lists every option)")
    model, data, training = cast(Parsed, tuple(groups))
    standard = (ModelArguments(model_name_or_path="x"), DataArguments(data_path="x"), LlavaTrainingArguments)
    legacy_flags.warn_without_effect(words, (model, data, training), standard)
    settle_compat(data, training)
    settle_validation(data, training)
    precision.warn_of_slow_bf16(model, training)
    return model, data, training


def _dataclasses(parser: HfArgumentParser, words: list[str]) -> tuple[Any, ...]:
    """Return the three groups and the unparsed words.

    Raises:
        ConfigError: a value is invalid; the message is the first line of the library's error.
    """
    try:
        return parser.parse_args_into_dataclasses(words, return_remaining_strings=True)
    except ConfigError:
        raise
    except (ValueError, ImportError, NotImplementedError, OSError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        what = lines[0] if lines else type(error).__name__
        raise ConfigError(f"invalid training option: {what} (--help lists every option)") from error


def _underscored(word: str) -> str:
    """Return `word` with its option name in the registered spelling; values are unchanged."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value
