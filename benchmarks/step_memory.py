"""Peak anonymous memory of one training step of one side, above weights, gradients and optimiser state.

    python -m benchmarks.step_memory ours        # prints MiB; run by benchmarks.train_throughput, a process a side

The resident anonymous pages of the process are read from another thread while the step runs; the kernels release the
interpreter, so the reader is never kept waiting for long.
"""

from __future__ import annotations

import ctypes
import re
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.common import Questions, say
from benchmarks.sides import SIDES
from benchmarks.workloads import WORKLOADS

STATUS = Path("/proc/self/status")
INTERVAL_S = 0.002


def anonymous_mib() -> float:
    """Resident anonymous memory of this process in MiB."""
    found = re.search(r"RssAnon:\s+(\d+) kB", STATUS.read_text())
    if found is None:
        raise RuntimeError("this system does not report RssAnon; memory can be measured on Linux only")
    return int(found.group(1)) / 1024


class Peak(threading.Thread):
    """Keeps the largest reading until told to stop."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.largest = 0.0
        self._ends = threading.Event()

    def run(self) -> None:
        """Read again and again."""
        while not self._ends.is_set():
            self.largest = max(self.largest, anonymous_mib())
            time.sleep(INTERVAL_S)

    def stop(self) -> float:
        """End the thread and return its largest reading."""
        self._ends.set()
        self.join()
        return self.largest


def step_memory(name: str, questions: Questions) -> float:
    """MiB that a step of this side needs on top of what is there between steps with gradients kept."""
    side = SIDES[name]()
    first = questions.sequences[0]
    side.step([first], questions.images)  # libraries allocate their own things once
    for parameter in filter(lambda weight: weight.requires_grad, side.model.parameters()):
        parameter.grad = torch.full_like(parameter, 1e-8)
    side.optimizer.step()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = anonymous_mib()
    peak = Peak()
    peak.start()
    side.step(questions.sequences, questions.images)
    return peak.stop() - before


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the side that the first argument names, on one batch of the 8-question workload."""
    name = (sys.argv[1:] if argv is None else argv)[0]
    torch.set_num_threads(2)
    say(f"{step_memory(name, WORKLOADS['8q'].questions(num_batches=1)):.1f}")


if __name__ == "__main__":
    main()
