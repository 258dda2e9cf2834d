"""Command lines that accept every spelling the seeds printed.

`--max-size` and `--max_size` are one option, a prefix of an option is enough (`--base` for `--base-model-path`), and a
switch may stand alone or carry a word (`--flag`, `--flag True`, `--flag False`).
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
"""Environment variable; when set, a deliberate error shows its traceback instead of its message only."""

TRUE_WORDS = frozenset({"true", "t", "yes", "y", "on", "1"})
FALSE_WORDS = frozenset({"false", "f", "no", "n", "off", "0"})


def parse_bool(text: str | bool) -> bool:
    """Read a switch's word.

    Raises:
        argparse.ArgumentTypeError: the word is neither a yes nor a no (argparse turns this into a usage message).
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
    """Rewrite `_` to `-` in option names only: values, and all that follows a bare `--`, stay as they are."""
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


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Says the default of an option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class ExampleFormatter(HelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Leaves examples as they are written, besides."""


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that knows each option in one spelling only, the one with dashes.

    A second spelling registered as an alias would make every prefix of it ambiguous, so the words of the command line
    are rewritten instead.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", True)
        kwargs.setdefault("formatter_class", HelpFormatter)
        super().__init__(*args, **kwargs)

    def add_argument(self, *names: Any, **kwargs: Any) -> argparse.Action:
        """Register an option under its name with dashes; its value is still found under underscores."""
        return super().add_argument(*with_dashes(names), **kwargs)

    def add_switch(self, name: str, default: bool = False, **kwargs: Any) -> argparse.Action:
        """Register an option that is true when it stands alone and may carry `True` or `False`."""
        return self.add_argument(
            name, type=parse_bool, nargs="?", const=True, default=default, metavar="BOOL", **kwargs
        )

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse `args` (the process's own words by default) after rewriting option names."""
        return super().parse_known_args(with_dashes(sys.argv[1:] if args is None else list(args)), namespace)


NOISY = "bitsandbytes.backends.cpu.ops"
"""Warns at every start that it found no kernels of a hub which is never asked."""


CLOSED_PIPE = 141
"""Exit status when whoever read the output has stopped (`| head`), as shells write it."""


def run_program(program: Callable[[], None]) -> None:
    """Run an entry; what the user can mend ends with its message and status 2 instead of a traceback.

    That is every deliberate error, and what the system refuses (a file that may not be read, a full disk). Output that
    nobody reads any more is no error, and ends in silence.
    """
    logging.getLogger(NOISY).setLevel(logging.ERROR)
    try:
        _run(program)
    except LlavaError as error:
        _end(error, str(error))
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _is_output_closed():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the last flush of the interpreter
            raise SystemExit(CLOSED_PIPE) from None
        _end(error, " ".join(str(error).split()) or type(error).__name__)


def _run(program: Callable[[], None]) -> None:
    """Run a program up to its last written word."""
    try:
        program()
    except SystemExit:
        sys.stdout.flush()
        raise
    sys.stdout.flush()


def _end(error: Exception, message: str) -> NoReturn:
    if os.environ.get(TRACEBACK_VARIABLE):
        raise error
    sys.stderr.write(f"llava: error: {message}\n(set {TRACEBACK_VARIABLE}=1 to see where it was raised)\n")
    raise SystemExit(2) from None


def _is_output_closed() -> bool:
    """Whether standard output is a pipe without a reader; a broken pipe may also be one of the program's own."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
    except (OSError, ValueError):  # no file of the system's
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))
