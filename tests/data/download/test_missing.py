"""Data files without the rows whose images are missing: kept rows and format."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from llava.data.download.missing import write_available
from llava.utils.json_rows import read_records
from tests.support.tiny import tiny_image

ROWS = [{"id": "0", "image": "0.png"}, {"id": "1", "image": "gone.png"}, {"id": "2"}]


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.json.gz", "rows"])
@pytest.mark.parametrize("form", ["array", "lines"])
def test_format_is_that_of_the_content_not_of_the_name(tmp_path: Path, name: str, form: str) -> None:
    tiny_image(0).save(tmp_path / "0.png")
    text = json.dumps(ROWS) if form == "array" else "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    done = write_available(tmp_path / name, tmp_path)
    assert (done.num_kept, done.num_dropped) == (2, 1)
    assert list(read_records(done.path)) == [ROWS[0], ROWS[2]]
    assert done.path.read_text().startswith("[" if form == "array" else "{")
