"""Streamed rows: equal to the rows that training reads; damage is a named error, never a crash."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.data import records
from llava.data.check.rows import view_row
from llava.data.records import form_of, rows_of, stream_rows
from llava.errors import DataError
from tests.support.check_files import row

ROWS: list[Any] = [{"id": 1, "text": 'é\u2028 ] } , \\ " 😀'}, {"n": [1.5, float("inf"), 10**30]}, 12, -7, "x", []]
"""Values of every kind; numbers may continue across the end of a piece."""

FORMS = {
    "array": json.dumps(ROWS),
    "indented": "\n \t" + json.dumps(ROWS, indent=3, ensure_ascii=False) + " \r\n",
    "lines": "\n".join(json.dumps(row) for row in ROWS),
    "blank lines": "\r\n\r\n" + "\r\n\r\n".join(json.dumps(row) for row in ROWS) + "\n",
    "byte order mark": "\ufeff" + json.dumps(ROWS),
    "trailing comma": "[1, 2,]",
    "empty array": " [ ] ",
    "nothing": "  \n",
}

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def read(content: bytes) -> list[tuple[int, Any]]:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "rows"
        path.write_bytes(content)
        return list(stream_rows(path))


def read_whole(content: bytes) -> list[tuple[int, Any]]:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "rows"
        path.write_bytes(content)
        return list(rows_of(path))


@pytest.mark.parametrize("piece", [1, 2, 7, 1 << 20])
@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_rows_are_those_that_training_reads(
    form: str, zipped: bool, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "PIECE", piece)
    content = FORMS[form].encode()
    assert read(gzip.compress(content) if zipped else content) == read_whole(content)


@settings(max_examples=80, deadline=None)
@given(rows=st.lists(values, max_size=5), piece=st.integers(1, 40), indent=st.sampled_from([None, 2]))
def test_any_rows_in_any_pieces(rows: list[Any], piece: int, indent: int | None) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "PIECE", piece)
        assert read(json.dumps(rows, indent=indent).encode()) == list(enumerate(rows))


@settings(max_examples=150, deadline=None)
@given(
    content=st.binary(max_size=60)
    | st.text(alphabet='[]{}",:\\ \n0123eE.-+tfnul', max_size=40).map(str.encode)
    | st.binary(max_size=40).map(lambda data: gzip.compress(data, mtime=0)),
    piece=st.sampled_from([1, 3, 1 << 20]),
)
def test_any_bytes_are_rows_or_named_errors(content: bytes, piece: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "PIECE", piece)
        found = read(content)
    assert [row for row, _ in found] == list(range(len(found)))
    try:
        whole = read_whole(content)
    except DataError:
        assert any(view_row(value, row).problems for row, value in found)
        return
    readable = [(row, value) for row, value in found if not isinstance(value, DataError)]
    assert repr(readable) == repr([(row, value) for row, value in whole if not isinstance(value, DataError)])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_file_keeps_the_rows_before_the_damage(data: st.DataObject) -> None:
    rows = [{"id": number, "text": "word " * number} for number in range(6)]
    content = bytearray(json.dumps(rows).encode())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] = data.draw(st.integers(0, 127))
    first_hurt = next(number for number in range(6) if len(json.dumps(rows[: number + 1])) >= place)
    found = read(bytes(content))
    if content[0] == ord("["):
        assert found[:first_hurt] == list(enumerate(rows))[:first_hurt]


@pytest.mark.parametrize(
    ("content", "rows", "message"),
    [
        (b'[{"a": 1}, {"a": ', 1, "not JSON"),
        (b'[{"a": 1} {"a": 2}]', 1, "expected ','"),
        (b'[{"a": 1}', 1, "is the file truncated?"),
        (b'[{"a": 1}] x', 1, "text follows the ']'"),
        (b"[" * 100_000, 0, "not JSON"),
        (b"[" + b"1" * 5000 + b"]", 0, "not JSON"),
        (b'{"a": 1}\n{"a": \n{"a": 3}', 2, "not JSON"),
        (gzip.compress(b'[{"a": 1}]' * 100, mtime=0)[:30], 0, "from about here on"),
        (gzip.compress(b'[{"a": 1}]', mtime=0)[:-8] + b"\0" * 8, 0, "from about here on"),
    ],
)
def test_the_error_is_named(content: bytes, rows: int, message: str) -> None:
    found = read(content)
    errors = [value for _, value in found if isinstance(value, DataError)]
    assert len(found) - len(errors) == rows
    assert len(errors) == 1 and message in str(errors[0])


def test_bytes_that_are_no_text_hurt_their_own_row_only() -> None:
    lines = [json.dumps(row(0)).encode(), json.dumps(row(1)).encode().replace(b"seen", b"s\xe9en"), b'{"a\xff": 1}']
    for content in (b"\n".join(lines), b"[" + b",".join(lines) + b"]"):
        found = read(content)
        assert [[problem.rule for problem in view_row(value, number).problems] for number, value in found] == [
            [],
            ["text"],
            ["text"],
        ]


def test_the_place_of_a_mistake_is_counted_from_the_start_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "PIECE", 8)
    content = "[" + '{"a": 1}, ' * 10 + "{x}]" + " " * 100
    assert f"character {content.index('x')} " in str(read(content.encode())[10][1])


def test_a_mistake_is_found_without_reading_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "PIECE", 64)
    path = tmp_path / "rows.json"
    path.write_text('[{"a" 1}, ' + '{"a": 1}, ' * 1000 + "]")
    asked: list[int] = []
    original = records._value

    def spy(text: str, *rest: Any) -> Any:
        asked.append(len(text))
        return original(text, *rest)

    monkeypatch.setattr(records, "_value", spy)
    assert [type(value) for _, value in stream_rows(path)] == [DataError]
    assert asked == [64]


@pytest.mark.parametrize(
    ("content", "form"), [(b"\n [1]", "array"), (b'{"a": 1}', "lines"), (b"", "lines"), (b"\x1f\x8bxx", "lines")]
)
def test_the_form_is_detected_by_content(tmp_path: Path, content: bytes, form: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    assert form_of(path) == form


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be opened"):
        list(stream_rows(tmp_path / "absent.json"))
    with pytest.raises(DataError, match="cannot be opened"):
        form_of(tmp_path)
