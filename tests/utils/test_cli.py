"""The command-line rules of `docs/architecture.md`: spellings, prefixes, switches."""

from __future__ import annotations

import argparse

import pytest

from llava.utils.cli import Parser, parse_bool


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


def test_sys_argv_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["prog", "--max_size", "9"])
    assert make_parser().parse_args().max_size == 9


def test_parse_bool() -> None:
    assert parse_bool("Yes") and parse_bool(True) and not parse_bool("0")
    with pytest.raises(argparse.ArgumentTypeError):
        parse_bool("")
