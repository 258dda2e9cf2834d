"""Command line to arguments: old spellings, bare booleans, negative values, prefixes."""

from __future__ import annotations

import difflib
import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

from transformers import HfArgumentParser
from transformers.trainer_utils import IntervalStrategy

from llava.compat import parse_names
from llava.errors import ConfigError
from llava.train import legacy_flags, precision
from llava.train.args import DataArguments, LlavaTrainingArguments, ModelArguments, Parsed

if TYPE_CHECKING:
    from llava.train.args import DataArguments, LlavaTrainingArguments


def settle_compat(data: DataArguments, args: LlavaTrainingArguments) -> None:
    """Turn the names of `--compat` into the options that they stand for.

    Raises:
        ConfigError: a name is unknown, or does nothing in training.
    """
    names = parse_names(args.compat, "training")
    if "micro_batch_loss" in names:
        args.loss_normalization = "micro_batches"
    if "cut_before_images" in names:
        data.image_counts_as_one = True


def settle_validation(data: DataArguments, args: LlavaTrainingArguments) -> None:
    """Validate after every epoch where held-out rows are given, and keep the best checkpoint where that is possible.

    Raises:
        ConfigError: validation or early stopping is asked for without held-out rows, or saving by a rule of its own.
    """
    if args.save_strategy == "best":
        raise ConfigError(
            "--save_strategy best is not supported; expected no, steps or epoch. With --eval_data_path FILE and "
            "--save_strategy epoch the best checkpoint is kept"
        )
    if data.eval_data_path is None:
        if args.eval_strategy != "no" or args.early_stopping_patience:
            raise ConfigError("--eval_strategy and --early_stopping_patience need held-out rows: --eval_data_path FILE")
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
            "--early_stopping_patience needs --save_strategy and --eval_strategy both epoch, or both steps"
        )
    else:
        logger.info(
            "the best checkpoint is kept only with --save_strategy and --eval_strategy both epoch or both steps"
        )


logger = logging.getLogger(__name__)


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
    settle_compat(data, training)
    settle_validation(data, training)
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
