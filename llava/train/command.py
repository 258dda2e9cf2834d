"""`llava train` before torch: help, configuration file, early checks, processes; then the trainer.

    words --configuration file--> options --checks--> trainer in this process, or torchrun with one trainer a process

The published scripts, such as `train_mem.py`, run the trainer in this process with the published defaults.
"""

from __future__ import annotations

import os
import shlex
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava.errors import ConfigError, LlavaError
from llava.train.defaults import TODAY
from llava.train.early_checks import check_options
from llava.train.help import help_text
from llava.train.option_table import ALIASES, LAUNCHER, make_parser, read_table
from llava.train.rollout_names import translated
from llava.utils.cli import near_options, prefix_notices, prefix_of, with_dashes
from llava.utils.config_file import expand
from llava.utils.help_groups import asks_for_all
from llava.utils.log import process_rank
from llava.utils.plugins import load_plugins
from llava.utils.terminal import visible_message

PACKAGED_MODELS = ("smollm2-135m", "smollm2-135m-instruct")
PACKAGED_TOWERS = ("dinov2-small",)
"""Names of parts that come in packages (`bash scripts/setup.sh quickstart`); a folder of the same name wins."""

TORCHRUN = {"nproc": "--nproc_per_node", "nnodes": "--nnodes", "node_rank": "--node_rank",
            "master_addr": "--master_addr", "master_port": "--master_port"}  # fmt: skip
"""Options of the command, and those of torchrun."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run `llava train`.

    Raises:
        LlavaError: options, files or data cannot be used.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if wants_help(words):
        sys.stdout.write(help_text(full=asks_for_all(with_dashes(words))))
        return
    words, options = checked_words(words)
    if "nproc" in options and "RANK" not in os.environ:
        launch(words, options)
    words = with_packaged_parts(without_launcher(words), options)
    from llava.train.run import run_sft

    run_sft(words, image_grouping=TODAY.image_grouping, bf16=TODAY.bf16, defaults=TODAY, given=config_options(options))


def run_published(argv: Sequence[str] | None, *, name: str, example: str, first: Sequence[str] = ()) -> None:
    """Train as a published script does, or print its help.

    Args:
        argv: command line; None for that of the process.
        name: name of the script.
        example: options of an example in its help.
        first: options that the command line may replace.

    Raises:
        LlavaError: as `llava.train.run.run_sft`.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if wants_help(words):
        sys.stdout.write(help_text(name, example=example, full=asks_for_all(with_dashes(words))))
        return
    from llava.train.run import run_sft  # loads torch

    run_sft([*first, *words], image_grouping="off", bf16=False)


def with_packaged_parts(words: Sequence[str], options: dict[str, Any]) -> list[str]:
    """Return the arguments with small parts given by name (`smollm2-135m`, `dinov2-small`) as folders.

    Raises:
        MissingDependency: the package that holds a part is not installed.
    """
    found = list(words)
    model, tower = (str(options.get(name) or "").lower() for name in ("model_name_or_path", "vision_tower"))
    if model in PACKAGED_MODELS and not Path(model).exists():
        from llava.model.packaged.pretrained import language_model

        found += ["--model-name-or-path", str(language_model())]
    if tower in PACKAGED_TOWERS and not Path(tower).exists():
        from llava.model.packaged.pretrained import vision_tower

        found += ["--vision-tower", str(vision_tower(options.get("image_size") or 224))]
    return found


def wants_help(words: Sequence[str]) -> bool:
    """Return whether a command line asks for help: `-h`, `--help`, `--help all`."""
    return asks_for_all(with_dashes(words)) or any(word in ("-h", "--help") for word in words)


def checked_words(words: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Return the command line with its configuration file's options by full name, and the options.

    Raises:
        ConfigError: an option is unknown, a value is wrong, a plug-in fails, or a file, a folder or a name does not
            exist.
        DataError: the first row of a data file cannot be used.
        SystemExit: on ranks other than the first in these cases, so that the message appears once.
    """
    try:
        found = full_names(expanded(words))
        options = parsed(found)
        load_plugins(options.get("plugin") or ())
        check_options(options)
    except LlavaError:
        if process_rank() == 0:
            raise
        raise SystemExit(2) from None
    return found, options


def expanded(words: Sequence[str]) -> list[str]:
    """Return a command line with the options of its configuration file."""
    rows = read_table()
    lists = {row.name for row in rows if row.nargs in ("+", "*")}
    return translated(expand(words, lists=lists, known={row.name for row in rows}, aliases=ALIASES))


def full_names(words: Sequence[str]) -> list[str]:
    """Return a command line with dashes, whole names instead of prefixes, and a notice for each prefix."""
    known = [row.name for row in read_table()]
    given = with_dashes(words)
    if process_rank() == 0:
        for notice in prefix_notices(given, known):
            sys.stderr.write(f"{visible_message(notice)}\n")
    return [
        (option + word[len(word.partition("=")[0]) :]) if (option := prefix_of(word, known)) else word for word in given
    ]


def parsed(words: Sequence[str]) -> dict[str, Any]:
    """Return the given options of a command line by name with underscores.

    Raises:
        ConfigError: an option is unknown, or a value is wrong.
    """
    parser = make_parser(read_table())
    found, unknown = parser.parse_known_args(_with_lists(words), Namespace())
    if unknown:
        known = [row.name for row in read_table()]
        raise ConfigError(f"{_unknown_text(unknown, known)} (llava train --help lists the options)")
    values: dict[str, Any] = vars(found)
    return values


def _unknown_text(unknown: Sequence[str], known: Sequence[str]) -> str:
    """Return the message for words that no option takes: an unknown option, or a path without its option."""
    if unknown[0].startswith("-"):
        return f"unknown option: {' '.join(unknown)}{near_options(unknown, known)}"
    if Path(unknown[0]).suffix in (".json", ".jsonl"):
        return f"unexpected word {unknown[0]}; name the rows with --data-path {shlex.quote(unknown[0])}"
    return f"unexpected word {unknown[0]}; quote a value with spaces, such as --image-folder 'my images'"


def _with_lists(words: Sequence[str]) -> list[str]:
    """Return the words without commas in lists of numbers, as the trainer splits them."""
    lists = {row.name for row in read_table() if row.nargs in ("+", "*") and row.kind != "str"}
    found: list[str] = []
    in_list = False
    for word in words:
        name, equals, value = word.partition("=")
        if word.startswith("--"):
            in_list = name in lists
            found += [name, *value.split(",")] if in_list and equals else [word]
        else:
            found += word.split(",") if in_list else [word]
    return found


def without_launcher(words: Sequence[str]) -> list[str]:
    """Return a command line of full names without the options of the launcher."""
    names = {row.name for row in LAUNCHER}
    found: list[str] = []
    skips = False
    for word in words:
        name, equals, _ = word.partition("=")
        if skips:
            skips = False
        elif name in names:
            skips = not equals
        else:
            found.append(word)
    return found


def launch(words: Sequence[str], options: dict[str, Any]) -> None:
    """Replace this process by torchrun, which runs the command in `--nproc` processes.

    Raises:
        ConfigError: a number is below 1, or several machines lack an address.
    """
    command = torchrun_command(words, options)
    os.execv(command[0], command)


def torchrun_command(words: Sequence[str], options: dict[str, Any]) -> list[str]:
    """Return the command line of torchrun for a command line of full names; raises as `launch`."""
    for name in ("nproc", "nnodes"):
        if options.get(name, 1) < 1:
            raise ConfigError(f"--{name} is {options[name]}; expected at least 1")
    nodes = options.get("nnodes", 1)
    missing = [name for name in ("node_rank", "master_addr") if name not in options]
    if nodes > 1 and missing:
        flags = ", ".join("--" + name.replace("_", "-") for name in missing)
        raise ConfigError(
            f"--nnodes {nodes} also needs {flags}: the number of this machine and the first one's address"
        )
    if not 0 <= options.get("node_rank", 0) < nodes:
        raise ConfigError(f"--node-rank is {options['node_rank']}; expected 0 to {nodes - 1}")
    given = [f"{TORCHRUN[name]}={options[name]}" for name in TORCHRUN if name in options]
    alone = ["--standalone"] if nodes == 1 and "master_port" not in options else []
    return [sys.executable, "-m", "torch.distributed.run", *alone, *given, "-m", "llava.cli", "train",
            *without_launcher(words)]  # fmt: skip


def config_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that a configuration file of the run holds: all but those of the launcher."""
    launcher = {row.name.removeprefix("--").replace("-", "_") for row in LAUNCHER}
    return {name: value for name, value in options.items() if name not in launcher}
