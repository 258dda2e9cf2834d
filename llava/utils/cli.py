"""Argument parser that accepts every published spelling of an option, and runner of commands.

`--max-size` and `--max_size` are one option, a prefix of an option is enough (`--base` for `--base-model-path`), and a
switch takes an optional value (`--flag`, `--flag True`, `--flag False`).
"""

from __future__ import annotations

import argparse
import logging
import os
import select
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from llava.errors import LlavaError

TRACEBACK_VARIABLE = "LLAVA_TRACEBACK"
"""Environment variable that, when set, shows the traceback of expected errors."""

TRUE_WORDS = frozenset({"true", "t", "yes", "y", "on", "1"})
FALSE_WORDS = frozenset({"false", "f", "no", "n", "off", "0"})


def parse_bool(text: str | bool) -> bool:
    """Return the value of a switch.

    Raises:
        argparse.ArgumentTypeError: the text is neither true nor false; argparse turns this into a usage message.
    """
    if isinstance(text, bool):
        return text
    word = text.strip().lower()
    if word in TRUE_WORDS:
        return True
    if word in FALSE_WORDS:
        return False
    raise argparse.ArgumentTypeError(f"got {text!r}, expected true or false")


def with_dashes(argv: Sequence[str]) -> list[str]:
    """Replace `_` by `-` in option names; values, and all words after a bare `--`, are unchanged."""
    rewritten: list[str] = []
    for position, word in enumerate(argv):
        if word == "--":
            return rewritten + list(argv[position:])
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            rewritten.append(name.replace("_", "-") + equals + value)
        else:
            rewritten.append(word)
    return rewritten


def flag(name: str) -> str:
    """Return the option of a field as help and messages write it: `--data-path` for `data_path`."""
    return "--" + name.replace("_", "-")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help formatter that shows the default of each option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class ExampleFormatter(HelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help formatter that also keeps the line breaks of descriptions and examples."""


class Parser(argparse.ArgumentParser):
    """Argument parser that accepts options with dashes or underscores, and prefixes of both."""

    # Options are registered with dashes, and the command line is rewritten. Underscores registered as aliases would
    # make every prefix ambiguous.

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", True)
        kwargs.setdefault("formatter_class", HelpFormatter)
        super().__init__(*args, **kwargs)

    def add_argument(self, *names: Any, **kwargs: Any) -> argparse.Action:
        """Register an option under its name with dashes; its attribute has underscores."""
        return super().add_argument(*with_dashes(names), **kwargs)

    def add_switch(self, name: str, default: bool = False, **kwargs: Any) -> argparse.Action:
        """Register a boolean option that is true without a value and also takes `True` or `False`."""
        return self.add_argument(
            name, type=parse_bool, nargs="?", const=True, default=default, metavar="BOOL", **kwargs
        )

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse `args`, by default the command line of the process, after rewriting option names."""
        return super().parse_known_args(with_dashes(sys.argv[1:] if args is None else list(args)), namespace)


NOISY = "bitsandbytes.backends.cpu.ops"
"""Logger that warns at every start that kernels of a hub, which llava never uses, are missing."""


CLOSED_PIPE = 141
"""Exit status after the reader of the output has ended (`| head`), as shells report it."""


def run_program(program: Callable[[], None]) -> None:
    """Run a command; expected errors print their message and exit with status 2.

    Expected errors are every `LlavaError` and every `OSError` (no permission, full disk). If the reader of the output
    has ended, the command exits silently with status `CLOSED_PIPE`.
    """
    logging.getLogger(NOISY).setLevel(logging.ERROR)
    try:
        _run(program)
    except LlavaError as error:
        _end(error, str(error))
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _is_output_closed():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at interpreter exit
            raise SystemExit(CLOSED_PIPE) from None
        _end(error, " ".join(str(error).split()) or type(error).__name__)


def _run(program: Callable[[], None]) -> None:
    """Run a program and flush its output."""
    try:
        program()
    except SystemExit:
        sys.stdout.flush()
        raise
    sys.stdout.flush()


def _end(error: Exception, message: str) -> NoReturn:
    if os.environ.get(TRACEBACK_VARIABLE):
        raise error
    sys.stderr.write(f"llava: error: {message}\n")
    raise SystemExit(2) from None


def _is_output_closed() -> bool:
    """Return whether standard output is a pipe without a reader."""
    # The broken pipe may also be another one, to a subprocess or a server.
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
    except (OSError, ValueError):  # standard output has no file descriptor
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))
