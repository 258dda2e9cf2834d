"""Parser of the training options: every spelling of an option, repeated lists, and errors in one line.

words --underscored, gathered--> transformers' parser of the option classes --> option classes
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NoReturn

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from llava.errors import ConfigError
from llava.train import precision
from llava.train.args import DataArguments, LlavaTrainingArguments, ModelArguments
from llava.train.preference_args import PreferenceArguments
from llava.train.rollout_args import RolloutArguments
from llava.train.rollout_names import translated
from llava.utils.cli import one_line, prefix_notices, with_dashes

LISTS = (
    "--pref_loss", "--pref_loss_weights", "--kto_weights", "--report_to", "--styles", "--lora_target_modules",
    "--modules_to_save", "--plugin",
)  # fmt: skip
"""Options that take several values and may be repeated."""


class TrainingParser(HfArgumentParser):
    """transformers' parser of option classes; a wrong value is a `ConfigError` of one line."""

    def error(self, message: str) -> NoReturn:
        """Raise the error of a command line.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"{one_line(message)} (--help lists every option)")

    def notices(self, words: Sequence[str]) -> list[str]:
        """Return a notice for each option that was given by a prefix."""
        return prefix_notices(words, self._option_string_actions)


def make_parser(*, bf16: bool | Literal["auto"], defaults: Mapping[str, Any] | None = None) -> TrainingParser:
    """Return the parser of the training options; words have underscores when it parses them.

    Args:
        bf16: default of `--bf16`.
        defaults: defaults of other options, by name with underscores.
    """
    parser = TrainingParser(
        (ModelArguments, DataArguments, LlavaTrainingArguments, PreferenceArguments, RolloutArguments),  # type: ignore[arg-type]
        add_help=False,  # `llava.train.help` writes it without torch
    )
    precision.accept_auto(parser, default=bf16)
    for action in parser._actions:
        if action.type is string_to_bool and action.nargs is None:  # a switch without default takes no value either
            action.nargs, action.const = "?", True
        if action.dest == "report_to":  # transformers takes a list, but only from Python
            action.nargs = "+"
    parser.set_defaults(**(defaults or {}))
    return parser


def show_dashes(parser: HfArgumentParser) -> None:
    """Show options with dashes in the help; words have underscores when they are parsed."""
    for action in parser._actions:
        for name in action.option_strings:
            if "-" in name[2:]:  # with two spellings, a prefix of an option would be ambiguous
                parser._option_string_actions.pop(name, None)
        action.option_strings = list(dict.fromkeys(with_dashes(action.option_strings)))


def registered_words(words: Sequence[str]) -> list[str]:
    """Return a command line with options in the registered spelling and repeated lists gathered."""
    return translated(_gathered([_underscored(word) for word in words]))


def _gathered(words: Sequence[str]) -> list[str]:
    """Return the arguments with repeated list options joined at the first occurrence, commas as spaces."""
    # A repeated option would replace its earlier values.
    found: list[str] = []
    values: dict[str, list[str]] = {}
    current: list[str] | None = None
    for word in words:
        name, equals, value = word.partition("=")
        if name in LISTS:
            if name not in values:
                found.append(name)
            current = values.setdefault(name, [])
            current += value.split(",") if equals else []
        elif current is None or word.startswith("--"):
            current = None
            found.append(word)
        else:
            current += word.split(",")
    return [part for word in found for part in (word, *values.get(word, []))]


def _underscored(word: str) -> str:
    """Return `word` with its option name in the registered spelling; values are unchanged."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value
