"""Reader of tables: every format, invalid rows and files, and generated tables."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llava.data.converters.tables import answer_cell, cell_text, column_names, read_table, table_kind, to_json_value
from llava.errors import DataError

IN_ONE_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)


def rows_of(path: Path, **options: Any) -> list[Any]:
    return [row for _, row in read_table(path, **options)]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.csv.gz", "a.json", "a.jsonl", "a.parquet", "named-like-nothing"])
def test_formats_are_detected_by_content(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    wanted = [{"x": "1", "y": "two, three"}, {"x": "4", "y": 'a "b"'}]
    if name == "a.parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(wanted), path)
    elif name == "a.json":
        path.write_text(json.dumps(wanted))
    elif name == "a.jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in wanted))
    else:
        stream = io.StringIO(newline="")
        writer = csv.DictWriter(stream, ["x", "y"], delimiter="\t" if name == "a.tsv" else ",")
        writer.writeheader()
        writer.writerows(wanted)
        data = b"\xef\xbb\xbf" + stream.getvalue().encode()
        path.write_bytes(gzip.compress(data) if name == "a.csv.gz" else data)
    assert rows_of(path, columns=("x", "y")) == wanted
    assert column_names(path) == ["x", "y"]
    assert [origin.row for origin, _ in read_table(path)] == [0, 1]
    with pytest.raises(DataError, match=r"no (column|field) 'z'"):
        for row in rows_of(path, columns=("x", "z")):
            raise row


def test_rows_of_wrong_width_come_as_errors_with_their_place(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('x,y\n1,2\n\n3\n4,"5"6,7\n8,9\n')
    found = list(read_table(path))
    assert [origin.row for origin, _ in found] == [0, 1, 2, 3]
    assert [isinstance(row, DataError) for _, row in found] == [False, True, True, False]
    assert "1 cells, but the header has 2" in str(found[1][1])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "header is empty"),
        (b"\n1,2\n", "header is empty"),
        (b"x,x\n1,2\n", "repeats columns: x"),
        (b"x\n\xff\xfe\n", "header cannot be read"),
        (gzip.compress(b"x\n" + bytes(range(48, 58)) * 2000, mtime=0)[:-20], "row 0: the rest cannot be read"),
        (gzip.compress(b"x\n1\n", mtime=0)[:-9], "cannot be opened or unzipped"),
        (b"PAR1 and nothing", "not a readable Parquet file"),
        ("x,y\n1,2\n".encode("utf-16"), "UTF-16 .*save the table as 'CSV UTF-8'"),
        ("x,y\n1,2\n".encode("utf-16-le"), "UTF-16LE; .*iconv"),
        ("x,ö\n1,2\n".encode("cp1252"), "header cannot be read .*iconv -f WINDOWS-1252"),
        (b"x;y\n1;2\n", r"the header is one column, 'x;y'.*--delimiter ';'"),
        (b"[{", "not JSON"),
        (b"[" * 100_000, "row 0: not JSON that can be decoded: nested more"),
    ],
    ids=[
        "empty",
        "no names",
        "names twice",
        "not text",
        "cut off late",
        "cut off early",
        "no parquet",
        "UTF-16 with a mark",
        "UTF-16 without",
        "Windows",
        "semicolons",
        "no json",
        "too deep",
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "a"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"a(, row \d+)?: .*({reason})|{reason}"):
        rows_of(path)


def test_semicolons_where_they_are_meant(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("findings; impression\nclear\n")
    assert rows_of(tmp_path / "one", delimiter=",") == [{"findings; impression": "clear"}]
    (tmp_path / "two").write_text("x;y\n1;2\n")
    assert rows_of(tmp_path / "two", delimiter=";") == [{"x": "1", "y": "2"}]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (" x ", "x"),
        (None, ""),
        (float("nan"), ""),
        ("NULL", ""),
        (["p", 1], "p 1"),
        (3, "3"),
        ("None", ""),
        (True, "True"),
        (40.0, "40"),
        (1.5, "1.5"),
        (float("inf"), "inf"),
        (40, "40"),
    ],
)
def test_cells(value: Any, text: str) -> None:
    assert cell_text({"a": value}, "a") == text


def test_a_missing_cell_is_empty() -> None:
    assert cell_text({}, "a") == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [(" x ", "x"), (None, ""), (float("nan"), ""), ("NULL", "NULL"), (3, "3"), ("None", "None"), (True, "")],
)
def test_answer_cells(value: Any, text: str) -> None:
    assert answer_cell({"a": value}, "a") == text


def test_values_become_json() -> None:
    assert to_json_value({"a": [float("inf"), 1.5, None]}) == {"a": [None, 1.5, None]}


def test_bytes_are_not_json() -> None:
    with pytest.raises(DataError, match="type bytes"):
        to_json_value(b"x")


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",), exclude_characters="\r\n\0"), max_size=20)
CELLS = st.lists(st.tuples(TEXT, TEXT, TEXT), min_size=1, max_size=10)


@IN_ONE_FOLDER
@given(CELLS, st.sampled_from([",", "\t", ";"]))
def test_generated_tables_come_back(tmp_path: Path, rows: list[tuple[str, str, str]], delimiter: str) -> None:
    path = tmp_path / "table"
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, delimiter=delimiter, quoting=csv.QUOTE_ALL)
        writer.writerows([("a", "b", "c"), *rows])
    assert rows_of(path, delimiter=delimiter) == [dict(zip("abc", row, strict=True)) for row in rows]


@IN_ONE_FOLDER
@given(st.binary(max_size=120) | st.text(st.sampled_from('a,"\n\t[]{}:1\r'), max_size=60).map(str.encode))
def test_any_bytes_give_rows_or_a_named_error(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "table"
    path.write_bytes(data)
    try:
        table_kind(path)
        rows = rows_of(path)
    except DataError as error:
        assert "table" in str(error)
        return
    assert all(isinstance(row, dict | DataError) for row in rows)


@IN_ONE_FOLDER
@given(st.binary(min_size=1, max_size=60), st.integers(0, 200))
def test_damaged_gzip_gives_a_named_error(tmp_path: Path, noise: bytes, place: int) -> None:
    data = bytearray(gzip.compress(b"x,y\n" + b"1,2\n" * 50, mtime=0))
    place = min(place, len(data))
    data[place : place + len(noise)] = noise
    path = tmp_path / "table"
    path.write_bytes(bytes(data))
    try:
        rows_of(path)
    except DataError as error:
        assert "table" in str(error)


def test_an_open_quote_is_not_a_row_to_skip(tmp_path: Path) -> None:
    """All rows after the quote are in one cell; skipping that row would lose them silently."""
    (tmp_path / "t.csv").write_text('a,b\n1,x\n2,"y\n3,z\n4,w\n')
    with pytest.raises(DataError, match=r"row 1, lines 3 to 5: a quote is opened and not closed"):
        list(read_table(tmp_path / "t.csv"))
    (tmp_path / "t.csv").write_text('a,b\n1,x\n2,"y\n3,"z\n4,w\n')
    found = [row for _, row in read_table(tmp_path / "t.csv")]
    assert "lines 3 to 4" in str(found[1]) and found[2] == {"a": "4", "b": "w"}
