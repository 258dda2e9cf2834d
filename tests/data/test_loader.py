"""Loaders: errors of their reading processes, and which signals end these."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from llava.data.loader import StreamLoader, outlive_signals
from llava.data.streaming import StreamedRow, StreamSource
from llava.errors import DataError
from tests.support.processes import run_command


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


@pytest.mark.parametrize("sent", ["TERM", "INT"])
def test_a_worker_outlives_a_signal_to_the_job(sent: str) -> None:
    loader = DataLoader(list(range(100)), num_workers=1, worker_init_fn=outlive_signals)  # type: ignore[arg-type]
    numbers = iter(loader)
    next(numbers)
    (worker,) = numbers._workers  # type: ignore[attr-defined]
    subprocess.run(["kill", f"-{sent}", str(worker.pid)], check=True)
    assert len(list(numbers)) == 99


def test_a_worker_ends_by_its_parent() -> None:
    loader = DataLoader(list(range(100)), num_workers=1, worker_init_fn=outlive_signals)  # type: ignore[arg-type]
    numbers = iter(loader)
    next(numbers)
    (worker,) = numbers._workers  # type: ignore[attr-defined]
    os.kill(worker.pid, signal.SIGTERM)
    worker.join(120)
    assert worker.exitcode == 0


CRASH = """
from torch.utils.data import DataLoader, _utils
from llava.data.loader import outlive_signals
_utils.worker.MP_STATUS_CHECK_INTERVAL = 0.2  # seconds between two looks at the parent
numbers = iter(DataLoader(list(range(100)), num_workers=2, worker_init_fn=outlive_signals))
next(numbers)
{end}
"""


@pytest.mark.parametrize(
    "end", ["raise ValueError", "raise SystemExit(3)", "import os; os.kill(os.getpid(), 9)", "pass"]
)
def test_a_process_with_workers_ends(python: Path, end: str) -> None:
    done = run_command([python, "-c", CRASH.format(end=end)], timeout=900)  # until the workers have closed its streams
    assert done.returncode == {"r": 1, "i": -9, "p": 0}[end[0]] or (end.endswith("(3)") and done.returncode == 3)
