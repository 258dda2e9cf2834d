"""The reader of rows: any form in any pieces; damage is a named error, never a crash."""

from __future__ import annotations

import gzip
import json
import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.data.check.rows import view_row
from llava.errors import BrokenFileError, DataError, NotUnicodeError
from llava.utils import json_rows
from llava.utils.json_rows import form_of, iter_lists, iter_rows, read_records, read_rows
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
        return list(iter_rows(path))


def decoded(content: str) -> list[Any]:
    """Return the rows of a text as the decoder of the standard library reads them."""
    text = content.removeprefix("\ufeff").strip()
    if text.startswith("["):
        found: list[Any] = json.loads(text.replace(",]", "]"))
        return found
    return [json.loads(line) for line in text.split("\n") if line.strip()]


@pytest.mark.parametrize("piece", [1, 2, 7, 1 << 20])
@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_rows_are_those_of_the_decoder(form: str, zipped: bool, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "PIECE", piece)
    content = FORMS[form].encode()
    assert read(gzip.compress(content) if zipped else content) == list(enumerate(decoded(FORMS[form])))


@settings(max_examples=80, deadline=None)
@given(rows=st.lists(values, max_size=5), piece=st.integers(1, 40), indent=st.sampled_from([None, 2]))
def test_any_rows_in_any_pieces(rows: list[Any], piece: int, indent: int | None) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_rows, "PIECE", piece)
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
        patch.setattr(json_rows, "PIECE", piece)
        found = read(content)
    assert [row for row, _ in found] == list(range(len(found)))
    assert all(not isinstance(value, BrokenFileError) for _, value in found[:-1])
    try:
        whole = decoded(content.decode())
    except ValueError:
        return
    readable = [value for _, value in found if not isinstance(value, DataError)]
    assert repr(readable) == repr(whole) or any(isinstance(value, DataError) for _, value in found)


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
    monkeypatch.setattr(json_rows, "PIECE", 8)
    content = "[" + '{"a": 1}, ' * 10 + "{x}]" + " " * 100
    assert f"character {content.index('x')} " in str(read(content.encode())[10][1])


def test_a_mistake_is_found_without_reading_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "PIECE", 64)
    path = tmp_path / "rows.json"
    path.write_text('[{"a" 1}, ' + '{"a": 1}, ' * 1000 + "]")
    asked: list[int] = []
    original = json_rows._DECODE

    def spy(text: str, place: int) -> Any:
        asked.append(len(text))
        return original(text, place)

    monkeypatch.setattr(json_rows, "_DECODE", spy)
    assert [type(value) for _, value in iter_rows(path)] == [BrokenFileError]
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
        list(iter_rows(tmp_path / "absent.json"))
    with pytest.raises(DataError, match="cannot be opened"):
        form_of(tmp_path)


TURNS = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
"""Turns of a good row."""

HALF = {
    "high in an answer": {"conversations": [TURNS[0], {"from": "gpt", "value": "a \ud83d"}]},
    "low in a question": {"conversations": [{"from": "human", "value": "\udc4d?"}, TURNS[1]]},
    "in a later turn": {"conversations": [*TURNS, {"from": "human", "value": "and \ud800 now"}, TURNS[1]]},
    "in a system text": {"conversations": [{"from": "system", "value": "\udfff"}, *TURNS]},
    "two halves in the wrong order": {"conversations": TURNS, "note": "\ude00\ud83d"},
    "in the name of a field": {"conversations": TURNS, "a\ud83d": 1},
    "in an inner name": {"conversations": TURNS, "meta": [{"\udc00": 1}]},
    "in an image name": {"conversations": TURNS, "image": ["a.png", "b\ud83d.png"]},
    "in an id": {"id": "\ud83d", "conversations": TURNS},
    "of a question file": {"question_id": 1, "text": "What \ud83d?"},
}
"""Rows with half of a surrogate pair."""


@pytest.mark.parametrize("lines", [True, False])
@pytest.mark.parametrize("case", HALF)
def test_half_a_surrogate_pair_spoils_its_row_only(case: str, lines: bool) -> None:
    rows = [row(0), HALF[case], row(2, note="\U0001f600 whole")]
    text = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows)
    found = read(text.encode())
    assert found[0] == (0, rows[0]) and found[2] == (2, rows[2])
    assert isinstance(found[1][1], NotUnicodeError) and "half of a surrogate pair" in str(found[1][1])


def test_the_field_of_half_a_surrogate_pair_is_named() -> None:
    [(_, problem)] = read(json.dumps({"a": [1, {"b": ["x", "\ud83d"]}]}).encode())
    assert str(problem).startswith("field a[1].b[1] is not Unicode text")


@pytest.mark.parametrize("depth", [101, 900, 5_000, 50_000])
@pytest.mark.parametrize("brackets", ["[]", "{}"])
@pytest.mark.parametrize("lines", [True, False])
def test_deep_nesting_spoils_its_row_only(depth: int, brackets: str, lines: bool) -> None:
    opening = "[" if brackets == "[]" else '{"]": '
    deep = '{"id": "x", "note": ' + opening * depth + '"}"' + brackets[1] * depth + "}"
    parts = [json.dumps(row(0)), deep, json.dumps(row(2))]
    found = read(("\n".join(parts) if lines else f"[{', '.join(parts)}]").encode())
    assert found[0] == (0, row(0)) and found[2] == (2, row(2))
    assert type(found[1][1]) is DataError and "nested more than 100 levels" in str(found[1][1])


def test_nesting_up_to_the_limit_is_read() -> None:
    value = json.loads("[" * 99 + "1" + "]" * 99)
    assert read(json.dumps([value, row(1)]).encode()) == [(0, value), (1, row(1))]


FOLLOWED = {
    "a second array": '[{"a": 1}, {"a": 2}][{"a": 3}]',
    "a second array on a line": '[{"a": 1}, {"a": 2}]\n\n [{"a": 3}]\n',
    "a second array after a byte order mark": '[{"a": 1}, {"a": 2}]\ufeff[{"a": 3}]',
    "an object": '[{"a": 1}, {"a": 2}] {"a": 3}',
    "a comma": '[{"a": 1}, {"a": 2}],',
    "a bracket": '[{"a": 1}, {"a": 2}]]',
    "a word": '[{"a": 1}, {"a": 2}] null',
}
"""Arrays of two rows with something behind them."""


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("case", FOLLOWED)
def test_what_follows_an_array_is_an_error_that_names_the_row_before(case: str, zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    first, second = FOLLOWED[case][:20].encode(), FOLLOWED[case][20:].encode()
    path.write_bytes(gzip.compress(first) + gzip.compress(second) if zipped else first + second)
    assert [row for row, _ in iter_rows(path)] == [0, 1, 2]
    for reader in (read_rows, read_records):
        with pytest.raises(DataError, match=r"rows\.json, row 2: text follows the .* \(after row 1\)"):
            list(reader(path))


@pytest.mark.parametrize("behind", ['{"a": 2}', " x", "[1]", ","])
def test_what_follows_an_object_of_a_line_is_an_error_of_that_line(behind: str) -> None:
    found = read(f'{{"a": 1}}{behind}\n{{"a": 3}}'.encode())
    assert "not JSON: Extra data" in str(found[0][1]) and found[1] == (1, {"a": 3})


def test_files_of_lines_may_be_joined_with_their_byte_order_marks() -> None:
    assert read('\ufeff{"a": 1}\n\ufeff{"a": 2}\n'.encode()) == [(0, {"a": 1}), (1, {"a": 2})]


def test_several_gzip_members_are_one_file() -> None:
    assert read(gzip.compress(b'[{"a": 1}') + gzip.compress(b', {"a": 2}]')) == [(0, {"a": 1}), (1, {"a": 2})]


def test_earlier_lines_are_not_decoded(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_text('not JSON\n\n{"a": 1}\n{"a": 2}\n')
    assert list(iter_rows(path, start=1)) == [(1, {"a": 1}), (2, {"a": 2})]


@pytest.mark.parametrize("first", ["[]", "[1]", '[{"a": 0}]', "[[]]", '["a", "b"]'])
def test_a_first_line_that_is_an_array_is_a_row_of_lines_where_lines_are_expected(first: str, tmp_path: Path) -> None:
    path = tmp_path / "list.jsonl"
    path.write_text(f'\n{first}\n{{"a": 1}}\n')
    assert list(iter_rows(path, lines=True)) == [(0, json.loads(first)), (1, {"a": 1})]


@pytest.mark.parametrize("blank", [" ", "\n", "\r\n", "\t"])
@pytest.mark.parametrize(("before", "after"), [("", ""), ('{"a": 1}\n', ""), ("[", "]"), ('[{"a": 1}', ', {"a": 2}]')])
def test_millions_of_blanks_need_no_time_each(blank: str, before: str, after: str) -> None:
    content = gzip.compress((before + blank * 20_000_000 + after).encode(), 1)
    start = time.process_time()
    assert all(isinstance(value, dict) for _, value in read(content))
    assert time.process_time() - start < 3.0


def test_a_row_of_more_characters_than_allowed_is_a_broken_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "MAX_ROW", 1000)
    monkeypatch.setattr(json_rows, "PIECE", 100)
    for content in ('["' + "x" * 5000 + '"]', '{"a": "' + "x" * 5000 + '"}', "[" + "1" * 3000 + "]"):
        assert isinstance(read(content.encode())[-1][1], BrokenFileError)


@pytest.mark.parametrize("name", ["pipe", "rows.json", "rows.jsonl", "rows.json.gz", "rows.csv", "link", "/dev/zero"])
@pytest.mark.parametrize("lines", [False, True])
def test_a_named_pipe_is_refused_without_waiting(tmp_path: Path, name: str, lines: bool) -> None:
    path = tmp_path / name
    if name == "link":
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to("pipe")
    elif not path.exists():
        os.mkfifo(path)
    with pytest.raises(DataError, match="cannot be opened: it is a pipe or a device"):
        list(iter_rows(path, lines=lines))


@pytest.mark.parametrize("piece", [1, 5, 1 << 20])
def test_lists_of_an_object_come_one_by_one(piece: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(json_rows, "PIECE", piece)
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({"xray": [{"a": 1}, 2], "note": {"x": []}, "ct": [], "mri": [None]}, indent=1))
    assert list(iter_lists(path)) == [("xray", 0, {"a": 1}), ("xray", 1, 2), ("mri", 0, None)]


@pytest.mark.parametrize("text", ['{"a": [1, 2', '{"a" [1]}', "{1: [2]}", '{"a": [1] "b": 2}', '{"a": [1', "{"])
def test_a_broken_object_of_lists_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "captions.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"captions\.json: "):
        list(iter_lists(path))


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        ('[{"id": 1}]'.encode("utf-16"), "UTF-16 text"),
        ('[{"id": 1}]'.encode("utf-16-le"), "UTF-16LE text"),
        (b"\x89PNG\r\n", "an image (PNG)"),
        (bytes(128) + b"DICM", "an image (DICOM)"),
        (b"PAR1", "Parquet"),
        (gzip.compress(b"PK\x03\x04", mtime=0), "a zip archive"),
    ],
)
def test_a_file_of_another_kind_is_named(content: bytes, kind: str) -> None:
    ((row, error),) = read(content)
    assert row == 0 and isinstance(error, BrokenFileError) and f"the file is {kind}" in str(error)


def test_a_folder_is_no_file_of_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="it is a folder; expected a file of rows"):
        list(iter_rows(tmp_path))


def test_a_table_is_named_by_its_suffix_unless_it_holds_rows(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("file,report\n")
    (tmp_path / "b.csv").write_text('\ufeff{"id": 1}\n')
    assert "the file is a table" in str(next(iter_rows(tmp_path / "a.csv"))[1])
    assert next(iter_rows(tmp_path / "b.csv"))[1] == {"id": 1}
