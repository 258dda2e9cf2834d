"""Commands in code blocks of the documents exist, and so do their options."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from llava.cli import COMMANDS, split_command
from llava.completion import options_of
from llava.utils.cli import with_dashes

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "examples/README.md", "data/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]

FENCE = re.compile(r"^```(?:bash|shell|sh)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def commands(path: Path) -> list[str]:
    """Return the lines of a document's shell blocks, with continued lines joined."""
    blocks = FENCE.findall(path.read_text(encoding="utf-8"))
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


FENCED = [(path.name, command) for path in DOCUMENTS for command in commands(path)]


def check_llava(words: list[str]) -> None:
    """Parse a `llava` line with the parser of its command if that needs no files."""
    name, rest = split_command(words)
    if words in (["--help"], ["--version"]):
        return
    assert name in COMMANDS, f"llava {name} does not exist"
    if name == "eval":
        from llava.eval.run import make_parser
        from llava.utils.config_file import with_config

        parser = make_parser()
        if "--plugin" in rest:  # a file that the reader writes; tests/docs/test_blocks.py runs the line
            assert {word for word in rest if word.startswith("--")} <= parser._option_string_actions.keys()
            return
        parser.parse_args(with_config(parser, rest))
    elif name == "chat":
        from llava.serve.cli import make_parser as chat_parser

        chat_parser().parse_args(rest)
    elif name == "data check":
        from llava.data.check.cli import make_parser as check_parser

        check_parser().parse_args(rest)
    elif name == "data dicom":
        from llava.data.dicom.rows import make_parser as dicom_parser

        dicom_parser().parse_args(rest)
    elif name == "data deid":
        from llava.data.dicom.deid import make_parser as deid_parser

        deid_parser().parse_args(rest)
    elif name == "quickstart":
        from llava.quickstart.settings import make_parser as quickstart_parser

        quickstart_parser().parse_args(rest)
    elif name == "train":
        from llava.train.option_table import read_table

        known = {row.name for row in read_table()} | {"--help"}
        assert {word for word in with_dashes(rest) if word.startswith("--")} <= known
    elif known := options_of(name, COMMANDS[name].target).keys() | {"--help"}:
        given = {word.partition("=")[0] for word in with_dashes(rest) if word.startswith("--")}
        assert len(known) == 1 or given <= known, given - known


def check(words: list[str]) -> None:
    """Check that the program of a command line exists and accepts its words."""
    program, rest = words[0], words[1:]
    if program == "llava":
        check_llava(rest)
    elif program in ("bash", "sh", "source"):
        assert rest[0] == ".venv/bin/activate" or (ROOT / rest[0]).is_file(), f"{rest[0]} does not exist"
    elif program in ("python", "python3", "torchrun"):
        scripts = [word for word in rest if word.endswith(".py")]
        modules = [rest[rest.index("-m") + 1]] if "-m" in rest else []
        assert scripts or modules
        assert all((ROOT / script).is_file() for script in scripts), scripts
        assert all((ROOT / f"{module.replace('.', '/')}.py").is_file() for module in modules), modules
    else:
        assert program in ("pip", "git", "cd"), f"unknown program {program}"


@pytest.mark.parametrize(("document", "command"), FENCED, ids=[f"{name}:{line[:50]}" for name, line in FENCED])
def test_fenced_commands(document: str, command: str) -> None:
    check(shlex.split(command))


INLINE = re.compile(r"`(llava [^`]+)`|^    (llava .+)$", re.MULTILINE)
"""Commands in sentences and in indented blocks; dots stand for what is left out, capitals for a value."""


@pytest.mark.parametrize("path", [*DOCUMENTS, ROOT / "CHANGELOG.md"], ids=lambda path: path.name)
def test_commands_in_sentences(path: Path) -> None:
    for found in INLINE.findall(path.read_text(encoding="utf-8")):
        words = "".join(found).split()[1:]
        name, rest = split_command(words)
        if (
            words[0].startswith("--")
            or words[0] in ("...", "COMMAND")
            or words[:2] in (["data", "NAME"], ["data", "clinic"])
        ):
            continue  # of `llava` itself, and those that a plug-in adds
        assert name in COMMANDS, f"llava {' '.join(words)}"
        given = {word.partition("=")[0].rstrip(".,;]") for word in with_dashes(rest) if word.startswith("--")}
        known = options_of(name, COMMANDS[name].target).keys() | {"--help", "--plugin"}
        assert len(known) <= 2 or given <= known, given - known


def test_the_two_commands_are_in_the_readme() -> None:
    lines = commands(ROOT / "README.md")
    assert "bash scripts/quickstart.sh" in lines and "bash scripts/test.sh" in lines


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_of_the_llava_command(name: str) -> None:
    check(shlex.split(COMMANDS[name].example))


@pytest.mark.parametrize("name", COMMANDS)
def test_the_table_has_every_command(name: str) -> None:
    """A row names it, or names it after the first of its group (`llava rules new`, `check`)."""
    group, _, word = name.rpartition(" ")
    rows = [row[0] for row in table_rows()]
    grouped = [row for row in rows if f"`llava {group} " in row and f"`{word}`" in row] if group else []
    assert grouped or [row for row in rows if f"llava {name} " in f"{row.replace('`', ' ')} "]


def table_rows() -> list[list[str]]:
    """Return the rows of docs/commands.md as lists of cells."""
    lines = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return [row for row in rows if not set(row[0]) <= {"-", " "} and row[0] not in ("published", "line")]


def test_commands_that_run_as_printed_exist_and_later_ones_do_not() -> None:
    """A published script is there exactly when the table does not say "later"."""
    for row in table_rows():
        if len(row) < 3:
            continue
        scripts = set(re.findall(r"\b(llava/[\w/]+\.py|scripts/[\w/]+\.sh)\b", row[0]))
        modules = {f"{name.replace('.', '/')}.py" for name in re.findall(r"-m (llava(?:\.\w+)+)", row[0])}
        for script in scripts | modules:
            assert (ROOT / script).is_file() is not ("**later**" in row[1]), f"{script}: {row[1]}"


def test_every_published_command_is_in_the_table(shared: Path) -> None:
    table = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    published = (shared / "specs" / "commands.md").read_text(encoding="utf-8")
    names = set(re.findall(r"\b([\w]+\.(?:py|sh))\b", published))
    names |= {name.split(".")[-1] for name in re.findall(r"-m (llava(?:\.\w+)+)", published)}
    names -= {"train.json"}
    assert names, "the list of published commands holds none"
    missing = sorted(name for name in names if name not in table)
    assert not missing, f"docs/commands.md does not name {missing}"
