"""Memory per row: a few numbers, independent of the length of its text."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

from llava.data.check.row_index import NameStore, RowIndex
from llava.data.check.rules import CheckFindings
from llava.data.check.scan import scan_file
from llava.data.groups import GROUP_FIELDS
from tests.support.check_files import row, write_rows


def kept_bytes(tmp_path: Path, num_rows: int, *, compares: bool) -> int:
    """Return the memory that is held after a scan of rows of 2 kB each."""
    rows = [row(number, f"image {number}.png", patient=str(number), note="word " * 400) for number in range(num_rows)]
    path = write_rows(tmp_path / f"{num_rows}.json", rows)
    del rows
    index = RowIndex(GROUP_FIELDS, NameStore(), root=0, compares=compares)
    tracemalloc.start()
    scan = scan_file(path, index, 0, CheckFindings())
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert scan.num_readable == num_rows
    return held


def test_a_row_costs_less_than_a_hundred_bytes(tmp_path: Path) -> None:
    _, few, many = (kept_bytes(tmp_path, number, compares=True) for number in (10, 200, 1200))
    assert 20 < (many - few) / 1000 < 100


def test_findings_cost_four_bytes_a_row() -> None:
    findings = CheckFindings(max_listed=10)
    for number in range(1000):
        findings.add("repeated-row", 0, [number], "words")
    found = findings.of("repeated-row", 0)
    assert found.count == 1000 and len(found.rows) == 1000 and found.rows.itemsize == 4
    assert len(found.listed) == 10
