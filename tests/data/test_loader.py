"""Loader of streamed steps: errors of its reading processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llava.data.loader import StreamLoader
from llava.data.streaming import StreamedRow, StreamSource
from llava.errors import DataError


class Refusing:
    """Dataset without any usable row."""

    def __init__(self, shard: Path) -> None:
        self.sources = (StreamSource("only", (shard,)),)

    def encode(self, found: StreamedRow) -> Any:
        raise DataError(f"row {found.number}: no token is trained")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_errors_of_reading_processes_are_one_line(tmp_path: Path, num_workers: int) -> None:
    (tmp_path / "shard").write_text('{"id": "0"}\n')
    dataset: Any = Refusing(tmp_path / "shard")
    collator: Any = list
    loader = StreamLoader(dataset, collator, sequences_per_step=1, num_workers=num_workers)
    with pytest.raises(DataError) as raised:
        next(iter(loader))
    assert str(raised.value) == "row 0: no token is trained"
