"""Argument parser that accepts every published spelling of an option, and runner of commands.

`--max-size` and `--max_size` are one option, a prefix of an option is enough (`--base` for `--base-model-path`), and a
switch takes an optional value (`--flag`, `--flag True`, `--flag False`).
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import os
import re
import select
import sys
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast
from urllib.parse import urlsplit

from llava.errors import ConfigError, LlavaError
from llava.utils.faults import fault_line
from llava.utils.help_groups import COLUMN, HelpGroups, asks_for_all, brief_usage, grouped_help, help_width, with_others
from llava.utils.log import silent_libraries
from llava.utils.plugins import FLAG, given_plugins, load_plugins
from llava.utils.terminal import visible_lines, visible_message

T = TypeVar("T")

TRACEBACK_VARIABLE = "LLAVA_TRACEBACK"
"""Environment variable that, when set, shows the traceback of expected errors."""

MAX_NAMES = 1000
"""Maximum number of folder entries searched for a similar name."""

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


def is_server_url(text: str) -> bool:
    """Return whether text is the http(s) URL of a server, without user, password, query or fragment."""
    try:
        parts = urlsplit(text)
        is_valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # the port is no number, or the host no address
        return False
    return is_valid and text.isprintable() and not any(mark in text for mark in "@?# ")


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


def prefix_of(word: str, options: Iterable[str]) -> str | None:
    """Return the one option that a word is a prefix of; None for an exact or an ambiguous match."""
    name = word.partition("=")[0]
    known = list(options)
    if not name.startswith("--") or name == "--" or name in known:
        return None
    found = [option for option in known if option.startswith(name)]
    return found[0] if len(found) == 1 else None


def prefix_notices(words: Sequence[str], options: Iterable[str]) -> list[str]:
    """Return a notice for each option of a command line that was given by a prefix."""
    known = list(options)
    given = words[: words.index("--")] if "--" in words else words
    pairs = dict.fromkeys((word.partition("=")[0], option) for word in given if (option := prefix_of(word, known)))
    return [f"{flag_name(short)} taken as {flag_name(option)}" for short, option in pairs]


def unknown_options(words: Sequence[str], options: Iterable[str]) -> list[str]:
    """Return the names of options on a command line that are no option and begin none."""
    known = list(options)
    given = words[: words.index("--")] if "--" in words else words
    names = [word.partition("=")[0] for word in given if word.startswith("--")]
    return [name for name in names if not any(option.startswith(name) for option in known)]


def flag_name(word: str) -> str:
    """Return an option in the spelling of messages, with dashes."""
    return with_dashes([word])[0]


def near_options(words: Sequence[str], options: Iterable[str]) -> str:
    """Return the hint for unknown options: the most similar known ones, or nothing."""
    known = list(options)
    near = [match for word in words for match in difflib.get_close_matches(word.partition("=")[0], known, n=1)]
    return f"; did you mean {', '.join(map(flag_name, dict.fromkeys(near)))}?" if near else ""


def near_path(path: str | Path) -> str:
    """Return the hint for a path that does not exist: its parent, or a similar name in it; or nothing."""
    parent = Path(path).parent
    if not parent.is_dir():
        return f" ({parent} does not exist either)"
    try:
        names = sorted(item.name for item in parent.iterdir())[:MAX_NAMES]
    except OSError:
        return ""
    return near_options([Path(path).name], names)


def check_folder(path: str | Path | None, option: str) -> None:
    """Check that the folder of images of an option exists, if the option is given.

    Raises:
        ConfigError: it does not exist, or is a file; names a similar one.
    """
    if path and not Path(path).is_dir():
        found = "is a file" if Path(path).exists() else "no such folder"
        raise ConfigError(f"{option} {path}: {found}; expected the folder of the images{near_path(path)}")


def one_line(message: str) -> str:
    """Return an argparse error in this package's form: `--seed: got 'x', expected a whole number`."""
    text = re.sub(r"^argument (\S+?)(?:/\S+)*: ", lambda found: f"{flag_name(found[1])}: ", " ".join(message.split()))
    for kind, expected in (("int", "a whole number"), ("float", "a number")):
        text = re.sub(rf"invalid {kind} value: '(.{{0,80}}).*'$", rf"got '\1', expected {expected}", text)
    if choice := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)$", text):
        known = [word.strip().strip("'\"") for word in choice[2].split(",")]
        hint = near_options([choice[1]], known)
        text = text[: choice.start()] + f"got {choice[1]!r}, expected one of {', '.join(known)}{hint}"
    return text


def run_target(target: str, argv: Sequence[str] | None) -> None:
    """Import a function that is named as text (`module:function`), and call it with a command line."""
    module, function = target.split(":")
    getattr(importlib.import_module(module), function)(argv)


def chunk_of(items: Sequence[T], num_chunks: int, index: int) -> list[T]:
    """Return chunk `index` of `num_chunks` consecutive chunks of ceil(n / num_chunks) items each.

    The last chunks may be short or empty (9 items in 8 chunks fill five of them); joined in order, the chunks are
    `items`.

    Raises:
        ConfigError: `num_chunks` is below 1, or `index` is out of range.
    """
    if num_chunks < 1:
        raise ConfigError(f"--num-chunks must be at least 1, got {num_chunks}")
    if not 0 <= index < num_chunks:
        raise ConfigError(f"--chunk-idx must be between 0 and {num_chunks - 1}, got {index}")
    size = -(-len(items) // num_chunks)
    return list(items[index * size : (index + 1) * size])


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help formatter as wide as the terminal, with short value names and only informative defaults."""

    first_names = False
    """Whether only the first name of an option is shown."""

    def __init__(self, prog: str, **kwargs: Any) -> None:
        super().__init__(prog, **{"max_help_position": COLUMN, "width": help_width(), **kwargs})

    def _get_help_string(self, action: argparse.Action) -> str | None:
        is_silent = action.default is None or action.default is False or action.default in ("", [], ())
        if is_silent or not isinstance(action.default, list | tuple):
            return action.help if is_silent else super()._get_help_string(action)
        # As typed on a command line, not as a Python literal.
        shown = " ".join(map(str, action.default)).replace("%", "%%")
        return f"{action.help} (default: {shown})"

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        kinds = {int: "N", float: "X"}
        return kinds.get(cast(type, action.type)) or action.dest.rpartition("_")[2].upper()

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        names = action.option_strings[:1] if self.first_names else action.option_strings
        value = self._format_args(action, self._get_default_metavar_for_optional(action)) if action.nargs != 0 else ""
        return f"{', '.join(names)} {value}".strip()


class ExampleFormatter(HelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help formatter that also keeps the line breaks of descriptions and examples."""


WATCHER: ContextVar[Callable[[Parser], None] | None] = ContextVar("watcher", default=None)
"""Called with each parser before it parses a line; see `llava.completion`."""


class Parser(argparse.ArgumentParser):
    """Argument parser that accepts options with dashes or underscores, and prefixes of both."""

    # Options are registered with dashes, and the command line is rewritten. Underscores registered as aliases would
    # make every prefix ambiguous.

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._first: HelpGroups = {}
        self._more: HelpGroups = {}
        self._unknown: list[str] = []
        kwargs.setdefault("allow_abbrev", True)
        kwargs.setdefault("formatter_class", HelpFormatter)
        super().__init__(*args, **kwargs)
        self._positionals.title = "arguments"

    def add_argument(self, *names: Any, **kwargs: Any) -> argparse.Action:
        """Register an option under its name with dashes; its attribute has underscores.

        Help and errors write an argument without dashes in capitals, one of a list in the singular: `files` as `FILE`.
        """
        if names and not names[0].startswith("-"):
            word = names[0].removesuffix("s") if kwargs.get("nargs") in ("+", "*") else names[0]
            kwargs.setdefault("metavar", word.upper())
        return super().add_argument(*with_dashes(names), **kwargs)

    def show_first(self, first: HelpGroups, more: HelpGroups | None = None) -> None:
        """Let `--help` show these options by topic, and `--help all` every option.

        Args:
            first: options of the short help.
            more: further options of `--help all` by topic; the topics of `first` may come again. None keeps the
                argument groups of the parser.
        """
        self._first, self._more = first, more or {}

    def format_help(self) -> str:
        """Return the help: the short one of `show_first`, or that with every option."""
        if not self._first:
            return self._whole_help()
        return grouped_help(self, self._first, note=f"every option: {self.prog} --help all", first_names=True)

    def _whole_help(self) -> str:
        """Return the help with every option."""
        if self._more:
            titles = dict.fromkeys([*self._first, *self._more])
            both = {title: [*self._first.get(title, ()), *self._more.get(title, ())] for title in titles}
            return grouped_help(self, with_others(self, both))
        usage, self.usage = self.usage, self.usage or brief_usage(self)
        try:
            return super().format_help()
        finally:
            self.usage = usage

    def _print_message(self, message: str, file: Any = None) -> None:
        super()._print_message(visible_lines(message), file)

    def add_switch(self, name: str, default: bool = False, **kwargs: Any) -> argparse.Action:
        """Register a boolean option that is true without a value and also takes `True` or `False`."""
        return self.add_argument(
            name, type=parse_bool, nargs="?", const=True, default=default, metavar="BOOL", **kwargs
        )

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse `args`, by default the command line of the process, after rewriting option names.

        Raises:
            ConfigError: a plug-in cannot be loaded.
        """
        if (watch := WATCHER.get()) is not None:
            watch(self)
        words = with_dashes(sys.argv[1:] if args is None else list(args))
        if "--help" in self._option_string_actions and asks_for_all(words):
            self._print_message(self._whole_help(), sys.stdout)
            self.exit()
        self._unknown = unknown_options(words, self._option_string_actions)
        if FLAG in self._option_string_actions:  # before the other options, which may name what plug-ins add
            load_plugins(given_plugins(words))
        found = super().parse_known_args(words, namespace)
        for notice in prefix_notices(words, self._option_string_actions) if self.allow_abbrev else ():
            sys.stderr.write(f"{visible_message(notice)}\n")
        return found

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse `args` and refuse unknown options, with the most similar known ones."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"unknown: {' '.join(unknown)}{near_options(unknown, self._option_string_actions)}")
        return found

    def error(self, message: str) -> NoReturn:
        """Write the error of a command line in one line and exit with status 2."""
        if self._unknown and " required: " in message:  # what is missing was probably mistyped
            message = f"unknown: {' '.join(self._unknown)}{near_options(self._unknown, self._option_string_actions)}"
        wanted = "--help all" if self._first else "--help"
        self.exit(2, f"{self.prog}: error: {visible_message(one_line(message))} ({self.prog} {wanted} lists all)\n")


CLOSED_PIPE = 141
"""Exit status after the reader of the output has ended (`| head`), as shells report it."""

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells report it."""


def run_program(program: Callable[[], None]) -> None:
    """Run a command; expected errors print their message and exit with status 2.

    Expected errors are every `LlavaError` and faults of the machine: every `OSError` (no permission, full disk), and
    a full disk as other libraries report it. After Ctrl-C the status is `INTERRUPTED`. If the reader of the output has
    ended, the command exits silently with status `CLOSED_PIPE`.
    """
    try:
        with silent_libraries():
            _run(program)
    except LlavaError as error:
        _end(error, str(error))
    except KeyboardInterrupt as error:
        _end(error, "interrupted; rerun the same command to continue", status=INTERRUPTED)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _is_output_closed():
            _drop_output()
            raise SystemExit(CLOSED_PIPE) from None
        line = fault_line(error)
        if line is None:
            raise
        _end(error, line)


def _run(program: Callable[[], None]) -> None:
    """Run a program and flush its output."""
    try:
        program()
    except SystemExit:
        sys.stdout.flush()
        raise
    sys.stdout.flush()
    _leave_process_group()


def _leave_process_group() -> None:
    """Destroy the default process group of `torch.distributed`, if the command joined one."""
    # Its threads may still release tensors, for which they need the interpreter; if that has begun to end, the process
    # aborts ("terminate called without an active exception") after all work is done.
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _end(error: BaseException, message: str, *, status: int = 2) -> NoReturn:
    if os.environ.get(TRACEBACK_VARIABLE):
        raise error
    try:
        sys.stdout.flush()
    except (OSError, ValueError):  # standard output is broken, and flushing it would fail again at interpreter exit
        _drop_output()
    with contextlib.suppress(OSError):
        sys.stderr.write(f"llava: error: {visible_message(message)}\n")
    raise SystemExit(status) from None


def _drop_output() -> None:
    """Discard all further writes to standard output."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_output_closed() -> bool:
    """Return whether standard output is a pipe without a reader."""
    # The broken pipe may also be another one, to a subprocess or a server.
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
    except (OSError, ValueError):  # standard output has no file descriptor
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))
