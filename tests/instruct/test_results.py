"""Files of a generation run with any content."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.errors import DataError
from llava.instruct.prompts import read_captions
from llava.instruct.results import Results
from llava.openai_transport import ApiFailure
from llava.utils.json_rows import read_records


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


ORDER = {str(number): number for number in range(8)}
EVENTS = st.lists(st.tuples(st.sampled_from(sorted(ORDER)), st.booleans(), st.sampled_from(["a", "a\u2028b", "é\r"])))


@settings(deadline=None)
@given(EVENTS)
def test_settling_sorts_both_files_and_keeps_the_last_answer(folder: Path, events: list[tuple[str, bool, str]]) -> None:
    path = folder / "gen.jsonl"
    for file in (path, folder / "gen.failed.jsonl"):
        file.unlink(missing_ok=True)
    results = Results(path)
    texts, failed = {}, set()
    for key, good, text in events:
        if good:
            results.append_answer({"pair_id": key}, text, model="m", tokens=(1, 2))
            texts[key] = text
        else:
            results.append_failure({"pair_id": key}, ApiFailure("timeout"))
            failed.add(key)
    results.settle(ORDER)
    found = list(read_records(path)) if path.exists() else []
    assert [(row["pair_id"], row["result"]) for row in found] == sorted(texts.items())
    left = sorted(failed - texts.keys())
    assert results.failed_path.exists() is bool(left)
    assert not left or [row["pair_id"] for row in read_records(results.failed_path)] == left
    again = Results(path)
    assert again.answered.keys() == texts.keys() and sorted(again.failed) == left
    assert again.spent() == (len(texts), 2 * len(texts))
    before = path.read_bytes() if path.exists() else b""
    again.settle(ORDER)
    assert (path.read_bytes() if path.exists() else b"") == before


ROWS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "pair_id",
                    "result",
                    "generation",
                    "failure",
                    "wasted",
                    "prompt_tokens",
                    "fig_caption",
                    "in_text_mention",
                ]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=10,
)
CONTENTS = st.lists(ROWS.map(lambda row: json.dumps(row).encode()) | st.binary(max_size=20), max_size=4).map(b"\n".join)


@settings(deadline=None)
@given(CONTENTS, CONTENTS)
def test_any_files_are_read_or_refused(folder: Path, answers: bytes, failures: bytes) -> None:
    (folder / "any.jsonl").write_bytes(answers)
    (folder / "any.failed.jsonl").write_bytes(failures)
    try:
        results = Results(folder / "any.jsonl")
        results.repair()
        results.settle({})
    except DataError as error:
        assert "any." in str(error)
        return
    assert all(isinstance(count, int) for count in results.spent())


@settings(deadline=None)
@given(CONTENTS)
def test_any_captions_are_read_or_refused(folder: Path, content: bytes) -> None:
    path = folder / "captions.json"
    path.write_bytes(content)
    for skip_bad in (False, True):
        try:
            rows = read_captions(path, skip_bad=skip_bad)
        except DataError as error:
            assert "captions.json" in str(error)
        else:
            assert json.dumps(rows, ensure_ascii=False).encode()


def test_incomplete_line_is_dropped_before_rows_are_appended(tmp_path: Path) -> None:
    path = tmp_path / "gen.jsonl"
    results = Results(path)
    results.append_answer({"pair_id": "1"}, "x", model="m", tokens=(1, 1))
    whole = path.read_bytes()
    for length in range(1, len(whole) - 1):
        path.write_bytes(whole + whole[:length])
        results = Results(path)
        assert list(results.answered) == ["1"]
        results.repair()
        assert path.read_bytes() == whole
