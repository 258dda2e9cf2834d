"""Broken files and rows with half of a surrogate pair: the same for every command that reads rows."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava.data import show
from llava.data.converters import split
from llava.data.converters.tables import read_table
from llava.data.download.missing import pair_ids, write_available
from llava.data.mixture import MixtureSource, load_mixture
from llava.data.quarantine import Quarantine
from llava.data.records import load_samples
from llava.data.shards import rows_in
from llava.errors import DataError
from llava.tokenization import TextTokenizer
from llava.utils.json_rows import read_records

TURNS = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
ROWS: list[dict[str, Any]] = [{"id": str(number), "patient": number, "conversations": TURNS} for number in range(5)]


def table_rows(path: Path) -> list[Any]:
    rows = [row for _, row in read_table(path)]
    if problems := [row for row in rows if isinstance(row, DataError)]:
        raise problems[0]
    return rows


READERS: dict[str, Callable[[Path], object]] = {
    "train and eval": load_samples,
    "data show": lambda path: show.load_row(str(path), 1),
    "data split": lambda path: split.read_rows([str(path)]),
    "a converter's table": table_rows,
    "a mixture": lambda path: load_mixture([MixtureSource("a", path)]),
    "the ids of images": lambda path: pair_ids([path]),
    "the filtered copy": lambda path: write_available(path, path.parent),
    "answers and judges": lambda path: list(read_records(path)),
}
"""Every way in which commands read rows."""

JOINED = {
    "two arrays": json.dumps(ROWS[:2]) + json.dumps(ROWS[2:]),
    "two indented arrays": json.dumps(ROWS[:2], indent=1) + "\n" + json.dumps(ROWS[2:], indent=1) + "\n",
    "an array and lines": json.dumps(ROWS[:2]) + "\n" + "\n".join(map(json.dumps, ROWS[2:])),
    "a word": json.dumps(ROWS[:2]) + " end",
    "a bracket": json.dumps(ROWS[:2]) + "]",
}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("case", JOINED)
def test_what_follows_the_first_array_is_refused(case: str, reader: str, zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_bytes(gzip.compress(JOINED[case].encode()) if zipped else JOINED[case].encode())
    with pytest.raises(DataError, match=r"row 2: text follows the '\]' that ends the array \(after row 1\)"):
        READERS[reader](path)


@pytest.mark.parametrize("case", JOINED)
def test_skipping_bad_rows_does_not_skip_the_rest_of_a_file(case: str, tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_text(JOINED[case])
    with pytest.raises(DataError, match="text follows"):
        load_samples(path, skip_bad=True)


HALF = {
    "an answer": {"conversations": [TURNS[0], {"from": "gpt", "value": "cut \ud83d"}]},
    "a question": {"conversations": [{"from": "human", "value": "\ude00 what?"}, TURNS[1]]},
    "a later turn": {"conversations": [*TURNS, {"from": "human", "value": "\ud800"}, TURNS[1]]},
    "a system text": {"conversations": [{"from": "system", "value": "\udfff"}, *TURNS]},
    "another field": {"conversations": TURNS, "note": ["\ud83d"]},
    "the name of a field": {"conversations": TURNS, "\ud83d": ""},
}


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400", "-1e400"])
@pytest.mark.parametrize("turn", [0, 1])
def test_a_value_that_is_no_number_is_no_text(number: str, turn: int, tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_text(json.dumps(ROWS[:3]).replace(f'"{"qa"[turn]}"', number, 1))
    with pytest.raises(DataError, match=rf"row 0, id '0': conversations.*{turn}.*.value must be text or a number"):
        load_samples(path)
    assert [sample.id for sample in load_samples(path, skip_bad=True)] == ["1", "2"]


@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("case", HALF)
def test_half_a_surrogate_pair_is_named(case: str, reader: str, lines: bool, tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    rows = [ROWS[0], {"id": "1", "patient": 1, **HALF[case]}, ROWS[2]]
    path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows))
    with pytest.raises(DataError, match=r"not Unicode text: it holds half of a surrogate pair") as caught:
        READERS[reader](path)
    assert "row 1" in str(caught.value) or reader == "a converter's table"  # its caller adds file and row
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", HALF)
def test_a_row_with_half_a_surrogate_pair_can_be_skipped(case: str, tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_text(json.dumps([ROWS[0], {"id": "1", **HALF[case]}, ROWS[2]]))
    quarantine = Quarantine(tmp_path / "bad.jsonl")
    assert [sample.id for sample in load_samples(path, skip_bad=True, quarantine=quarantine)] == ["0", "2"]
    assert [bad.row for bad in quarantine.rows] == [1]


@pytest.mark.parametrize("case", HALF)
def test_a_streamed_row_with_half_a_surrogate_pair_is_an_error_of_its_own(case: str, tmp_path: Path) -> None:
    path = tmp_path / "shard.jsonl"
    path.write_text("\n".join(map(json.dumps, [ROWS[0], HALF[case], ROWS[2]])))
    found = [row for _, row in rows_in(path)]
    assert [isinstance(row, DataError) for row in found] == [False, True, False]


@pytest.mark.parametrize("text", ["\ud83d", "a\udc00", "\ude00\ud83d", "x" * 100 + "\udfff", "\ud83d \ude00"])
def test_text_of_other_sources_is_refused_by_the_tokenizer(text: str, tiny: Any) -> None:
    with pytest.raises(DataError, match="half of a surrogate pair"):
        TextTokenizer(tiny.processor.tokenizer)(text)
