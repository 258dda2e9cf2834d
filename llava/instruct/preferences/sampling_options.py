"""Options shared by commands that sample from a model: file to resume, sampling, and model."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from llava.errors import ConfigError
from llava.generation.options import IMAGE_HELP, MODEL_HELP, MORE_MODEL_HELP, add_engine_options
from llava.generation.protocol import Sampling
from llava.utils.cli import Parser

FIRST_HELP = {"sampling": ("--temperature", "--max-new-tokens", "--seed"), "model": MODEL_HELP}
"""Options of `add_sampling_options` that the short help shows, by topic."""

MORE_HELP = {
    "sampling": ("--top-k", "--top-p", "--batch-size"),
    "model": MORE_MODEL_HELP,
    "resuming": ("--resume", "--retry-failed"),
    "image files": IMAGE_HELP,
}
"""Its options that only `--help all` shows."""


def add_sampling_options(
    parser: Parser, *, items: str, asked: str, count: str, num: int, count_help: str, top_k: int, max_new_tokens: int,
    batch_size: int,
) -> None:  # fmt: skip
    """Add the options of a command that samples texts about images and resumes by line.

    Args:
        parser: parser of the command.
        items: what is sampled, in the plural, such as "answers".
        asked: what a line is about, such as "question".
        count: name of the option for the number of texts about each.
        num: default of `count`.
        count_help: help of `count`.
        top_k: default number of tokens that are sampled from.
        max_new_tokens: default limit of a text.
        batch_size: default number of lines computed at once.
    """
    one_of_them = f"{'an' if asked[0] in 'aeiou' else 'a'} {asked}"
    parser.add_argument("--out", type=Path, required=True, help=f"{items} as JSON lines, one line {one_of_them}")
    parser.add_switch("--resume", default=True, help=f"keep the {items} that the file already has")
    parser.add_switch("--retry-failed", help=f"try each {asked} again that failed in an earlier run")
    choice = parser.add_argument_group("sampling")
    choice.add_argument(count, dest="num_sampled", type=int, default=num, help=count_help)
    choice.add_argument("--temperature", type=float, default=1.2, help=f"sampling temperature of the {items}")
    choice.add_argument("--top-k", type=int, default=top_k, help="likeliest tokens that are sampled from; 0: all")
    choice.add_argument("--top-p", type=float, default=0.95, help="probability mass that is sampled from")
    choice.add_argument("--max-new-tokens", type=int, default=max_new_tokens, help=f"limit of the {items} in tokens")
    choice.add_argument("--seed", type=int, default=0, help="seed of the run")
    choice.add_argument("--batch-size", type=int, default=batch_size, help=f"{asked}s passed to the engine at once")
    add_engine_options(parser.add_argument_group("model"))


def sampling_of(args: Namespace) -> Sampling:
    """Return the sampling that the options of `add_sampling_options` describe.

    Raises:
        ConfigError: a value is out of range.
    """
    if args.batch_size < 1:
        raise ConfigError(f"--batch-size must be at least 1, got {args.batch_size}")
    return Sampling(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        n=args.num_sampled,
        seed=args.seed,
    )
