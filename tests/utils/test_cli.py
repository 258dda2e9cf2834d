"""Command-line rules: spellings, prefixes, switches, errors."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from llava.utils.cli import Parser, parse_bool, run_program


def make_parser() -> Parser:
    parser = Parser(prog="x")
    parser.add_argument("--max_size", type=int, default=0)
    parser.add_argument("--base-model-path", default=None)
    parser.add_argument("--mm_vision_select_layer", type=int, default=-1)
    parser.add_switch("--use_inline_mentions")
    return parser


@pytest.mark.parametrize("words", [["--max-size", "6"], ["--max_size", "6"], ["--max_size=6"], ["--max-s", "6"]])
def test_both_spellings_and_prefixes(words: list[str]) -> None:
    assert make_parser().parse_args(words).max_size == 6


@pytest.mark.parametrize(("word", "notice"), [("--max_s", "--max-s taken as --max-size\n"), ("--max_size", "")])
def test_a_prefix_is_said_on_standard_error(word: str, notice: str, capsys: pytest.CaptureFixture[str]) -> None:
    make_parser().parse_args([word, "4"])
    assert capsys.readouterr().err == notice


def test_a_mistyped_option_is_named_before_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser(prog="x")
    parser.add_argument("--image-folder", required=True)
    for words, expected in (
        (["--image-foldr", "a"], "unknown: --image-foldr; did you mean --image-folder?"),
        ([], "the following arguments are required: --image-folder"),
        (["--image", "a", "--other"], "unknown: --other"),
    ):
        with pytest.raises(SystemExit):
            parser.parse_args(words)
        assert capsys.readouterr().err.splitlines()[-1].startswith(f"x: error: {expected}")


def test_short_form_of_a_seed() -> None:
    assert make_parser().parse_args(["--base", "some_base"]).base_model_path == "some_base"
    assert make_parser().parse_args(["--base_m=some_base"]).base_model_path == "some_base"


def test_negative_number_is_a_value() -> None:
    assert make_parser().parse_args(["--mm_vision_select_layer", "-2"]).mm_vision_select_layer == -2


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], False),
        (["--use_inline_mentions"], True),
        (["--use-inline-mentions", "True"], True),
        (["--use_inline_mentions", "false"], False),
        (["--use_inline_mentions=0"], False),
        (["--use_inline_mentions", "--max_size", "3"], True),
    ],
)
def test_switch(words: list[str], expected: bool) -> None:
    assert make_parser().parse_args(words).use_inline_mentions is expected


def test_bad_switch_word_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        make_parser().parse_args(["--use_inline_mentions", "perhaps"])
    assert "got 'perhaps', expected true or false" in capsys.readouterr().err


def test_values_and_words_after_two_dashes_stay() -> None:
    parser = Parser()
    parser.add_argument("--name")
    parser.add_argument("rest", nargs="*")
    parsed = parser.parse_args(["--name", "a_b", "--", "--c_d"])
    assert parsed.name == "a_b"
    assert parsed.rest == ["--c_d"]


def test_unknown_arguments_can_be_returned() -> None:
    parsed, unknown = make_parser().parse_known_args(["--max_size", "2", "--some_thing", "v_w"])
    assert parsed.max_size == 2
    assert unknown == ["--some-thing", "v_w"]


def test_help_names_defaults_that_there_are() -> None:
    parser = Parser()
    parser.add_argument("--count", type=int, default=3, help="how many")
    parser.add_argument("--out", required=True, help="where to")
    shown = parser.format_help()
    assert "how many (default: 3)" in shown
    assert "where to\n" in shown and "None" not in shown


def test_sys_argv_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["prog", "--max_size", "9"])
    assert make_parser().parse_args().max_size == 9


def test_parse_bool() -> None:
    assert parse_bool("Yes") and parse_bool(True) and not parse_bool("0")
    with pytest.raises(argparse.ArgumentTypeError):
        parse_bool("")


LONG = "import sys\nfrom llava.utils.cli import run_program\ndef program():\n    {}\nrun_program(program)\n"


@pytest.mark.parametrize(
    "program",
    [
        "sys.stdout.write('row\\n' * 100_000)",
        "sys.stdout.write('row\\n' * 2000); raise SystemExit(1)",
        "[sys.stdout.write('row\\n') for _ in range(100_000)]",
    ],
)
def test_output_without_a_reader_ends_silently(program: str) -> None:
    """As `llava checkpoint inspect X | head -1`."""
    writer = subprocess.Popen(
        [sys.executable, "-c", LONG.format("sys.stdin.read(); " + program)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert writer.stdin is not None and writer.stdout is not None and writer.stderr is not None
    writer.stdout.close()
    writer.stdin.close()
    assert writer.stderr.read() == b""
    assert writer.wait() == 141


def test_what_the_system_refuses_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as stop:
        run_program(lambda: tmp_path.read_text() and None)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("llava: error: ") and str(tmp_path) in message
    assert "traceback" not in message.lower() and message.count("\n") == 1
    with pytest.raises(SystemExit) as stop:
        run_program(broken_connection)
    assert stop.value.code == 2 and "BrokenPipeError" in capsys.readouterr().err
    monkeypatch.setenv("LLAVA_TRACEBACK", "1")
    with pytest.raises(IsADirectoryError):
        run_program(lambda: tmp_path.read_text() and None)


def broken_connection() -> None:
    """A pipe that is not standard output."""
    raise BrokenPipeError


def test_process_group_is_destroyed_at_the_end(tmp_path: Path) -> None:
    def join() -> None:
        dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)

    run_program(join)
    assert not dist.is_initialized()


def test_arguments_are_in_capitals_and_lists_are_shown_as_given(capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser(prog="x")
    parser.add_argument("files", nargs="+", help="what to read")
    parser.add_argument("--fields", nargs="+", default=("patient", "study"), help="names, 100 %% free")
    shown = parser.format_help()
    assert shown.startswith("usage: x FILE [FILE ...] [--OPTION ...]\n")
    assert "arguments:\n  FILE " in shown and "names, 100 % free (default: patient study)" in shown
    with pytest.raises(SystemExit):
        parser.parse_args([])
    assert "required: FILE" in capsys.readouterr().err


def test_help_by_topic_and_every_option_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser(prog="x", description="Do it.")
    parser.add_argument("file", help="what to read")
    parser.add_argument("--out", required=True, metavar="DIR", help="where to")
    parser.add_argument("--count", type=int, default=3, help="how many")
    parser.add_argument("--rare", help="100 %% rare")
    parser.add_argument("--odd", help="odd")
    parser.show_first({"first": ("--out", "--count")}, {"first": ("--rare",)})
    shown = parser.format_help()
    assert shown.startswith("usage: x FILE --out DIR [--OPTION ...]\n\nDo it.\n")
    assert "\nfirst:\n  --out DIR" in shown and "how many (default: 3)" in shown and "--rare" not in shown
    assert shown.endswith("every option: x --help all\n")
    for words in (["--help", "all"], ["-h", "all"], ["--help=all"], ["--help_all"]):
        with pytest.raises(SystemExit) as end:
            parser.parse_args(words)
        whole = capsys.readouterr().out
        assert end.value.code == 0 and "100 % rare" in whole and "other options:\n" in whole
    with pytest.raises(SystemExit):
        parser.parse_args(["f", "--out", "x", "--cuont", "3"])
    assert "(x --help all lists all)" in capsys.readouterr().err


def test_usage_is_one_line() -> None:
    assert make_parser().format_help().startswith("usage: x [--OPTION ...]\n")
