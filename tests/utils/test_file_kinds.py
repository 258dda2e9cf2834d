"""Texts in other encodings are named with the command that converts them, wherever a file of a user is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava.data.converters.tables import read_table
from llava.errors import LlavaError
from llava.model.checkpoint.formats import read_json
from llava.model.config_sizes import MAX_JSON_BYTES
from llava.symbolic.document import read_document
from llava.train.early_checks import check_json
from llava.utils.config_file import read_config
from llava.utils.file_kinds import utf8_text, wide_encoding
from llava.utils.json_rows import read_records
from llava.utils.jsonl import read_object, read_text

ENCODINGS = {
    "utf-16": "UTF-16", "utf-16-le": "UTF-16LE", "utf-16-be": "UTF-16BE", "utf-32": "UTF-32", "utf-32-le": "UTF-32LE",
    "utf-32-be": "UTF-32BE", "latin-1": "WINDOWS-1252", "cp1252": "WINDOWS-1252",
}  # fmt: skip

ROWS = json.dumps([{"id": "Mü", "report": "Größe"}], ensure_ascii=False)
LINE = json.dumps({"id": "Mü", "report": "Größe"}, ensure_ascii=False) + "\n"

READERS: dict[str, tuple[str, str, Callable[[Path], Any]]] = {
    "array": ("rows.json", ROWS, lambda path: list(read_records(path))),
    "lines": ("rows.jsonl", LINE, lambda path: list(read_records(path))),
    "table": ("rows.csv", "id,Größe\n1,2\n", lambda path: list(read_table(path))),
    "cells": ("rows.csv", "id,text\n1,Größe\n", lambda path: list(read_table(path))),
    "tabs": ("rows.tsv", "id\ttext\n1\tGröße\n", lambda path: list(read_table(path))),
    "object": ("settings.json", LINE, read_object),
    "options": ("train.yaml", "# Größe\nseed: 1\n", read_config),
    "rules": ("rules.yaml", "name: Größe\n", read_document),
    "template": ("chat.jinja", "{# Größe #}{{ messages }}", read_text),
    "configuration": ("config.json", LINE, read_json),
    "deepspeed": ("zero.json", LINE, lambda path: check_json({"deepspeed": str(path)})),
}


@pytest.mark.parametrize("encoding", sorted(ENCODINGS))
@pytest.mark.parametrize("reader", sorted(READERS))
def test_another_encoding_is_named_with_the_command_that_converts_it(
    tmp_path: Path, reader: str, encoding: str
) -> None:
    name, text, read = READERS[reader]
    (tmp_path / name).write_bytes(text.encode(encoding))
    with pytest.raises(LlavaError, match=rf"expected UTF-8; .*iconv -f {ENCODINGS[encoding]} -t UTF-8") as caught:
        read(tmp_path / name)
    message = str(caught.value)
    assert name in message and "\n" not in message
    assert "Größe" not in message and "Gr\\xf6" not in message


@pytest.mark.parametrize("reader", sorted(set(READERS) - {"configuration", "deepspeed"}))
def test_a_byte_order_mark_of_utf8_changes_nothing(tmp_path: Path, reader: str) -> None:
    name, text, read = READERS[reader]
    (tmp_path / name).write_text(text, encoding="utf-8")
    plain = read(tmp_path / name)
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert repr(read(tmp_path / name)) == repr(plain)


@pytest.mark.parametrize("reader", ["configuration", "deepspeed"])
def test_a_mark_that_libraries_do_not_know_is_refused(tmp_path: Path, reader: str) -> None:
    name, text, read = READERS[reader]
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    with pytest.raises(LlavaError, match="begins with a byte order mark; save it as UTF-8 without one"):
        read(tmp_path / name)


@pytest.mark.parametrize("text", ["", "a", "ab", "äöü", "{}", "[1]", "\0\0", "a\0\0b", "日本語のテキスト"])
def test_utf8_text_is_not_taken_for_another_encoding(text: str) -> None:
    assert wide_encoding(text.encode()) is None
    assert utf8_text(text.encode()) == text


def test_a_line_of_a_wrong_byte_is_named() -> None:
    with pytest.raises(ValueError, match=r"not UTF-8 text in line 3; expected UTF-8; save it so, or run: iconv"):
        utf8_text(b"a\nb\n\xe4\n")


def test_a_configuration_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "config.json", "wb") as stream:
        stream.truncate(MAX_JSON_BYTES + 1)
    with pytest.raises(LlavaError, match=r"config\.json cannot be read as JSON: more than 67,108,864 bytes"):
        read_json(tmp_path / "config.json")
